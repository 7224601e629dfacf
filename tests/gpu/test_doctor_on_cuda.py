"""`qlora doctor` on a GPU: what it reports about the card is true, and NF4 and int8 are correct on it."""

import pytest
import torch

from qlora_cli.doctor import checks_hardware
from qlora_cli.doctor.checks_bitsandbytes import check_device
from qlora_cli.hardware.driver import driver_cuda_version
from tests.conftest import RunQlora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_a_machine_with_a_gpu_can_train_on_each_of_its_gpus(run_qlora: RunQlora) -> None:
    done = run_qlora("doctor", "--json")
    assert done.code == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in done.json["checks"]}
    assert checks["driver"]["status"] == "ok"
    assert checks["cuda"]["details"] == {
        "built_for_cuda": torch.version.cuda,
        "num_gpus": torch.cuda.device_count(),
    }
    assert len(checks["gpu"]["details"]["gpus"]) == torch.cuda.device_count()
    for index, gpu in enumerate(checks["gpu"]["details"]["gpus"]):
        properties = torch.cuda.get_device_properties(index)
        assert (gpu["index"], gpu["name"]) == (index, properties.name)
        assert 0 < gpu["free_bytes"] <= gpu["total_bytes"]
        assert checks[f"bitsandbytes_cuda_{index}"]["status"] == "ok"


def test_nf4_and_int8_are_far_below_their_tolerances() -> None:
    outcome = check_device("cuda:0")
    errors, tolerances = outcome.details["relative_errors"], outcome.details["tolerances"]
    assert isinstance(errors, dict)
    assert isinstance(tolerances, dict)
    assert len(errors) == 12
    for name, error in errors.items():
        assert error < tolerances[name] / 2, name


def test_the_driver_knows_the_cuda_version_that_pytorch_was_built_for() -> None:
    driver = driver_cuda_version()
    assert driver is not None
    assert torch.version.cuda is not None
    assert driver[0] >= int(torch.version.cuda.split(".")[0])


def test_memory_efficient_attention_is_available() -> None:
    backends = checks_hardware.check_attention().details["sdpa_backends"]
    assert isinstance(backends, list)
    assert {"efficient_attention", "math"} <= set(backends)


def test_without_visible_gpus_the_machine_can_still_train_and_says_why_it_is_slow(run_qlora: RunQlora) -> None:
    done = run_qlora("doctor", "--json", env={"CUDA_VISIBLE_DEVICES": ""})
    checks = {check["name"]: check for check in done.json["checks"]}
    assert done.code == 0
    assert "CUDA_VISIBLE_DEVICES hides every GPU" in checks["cuda"]["finding"]
    assert checks["gpu"]["status"] == "warning"
