"""The checks of a machine: their findings, and that no failure leaves the child process that they run in."""

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qlora_cli.cli.rendering.doctor_text import render_doctor
from qlora_cli.doctor import checks_bitsandbytes, checks_hardware, checks_hub, checks_install, checks_speed
from qlora_cli.doctor.all_checks import Examination
from qlora_cli.doctor.findings import Check, Outcome, Report, Status, failed, ok
from qlora_cli.doctor.isolation import Isolation, without_home
from qlora_cli.events import SilentReporter
from qlora_cli.hardware.driver import explain_no_cuda
from qlora_cli.units import GIB

if TYPE_CHECKING:
    import torch

# torch and bitsandbytes are imported where they are tested: the children that run these checks import this file.
TOKEN = "hf_" + "a1B2" * 6
GPU = checks_hardware.DetectedGpu(
    index=0, name="NVIDIA L4", compute_capability="8.9", bf16=True, total_bytes=24 * GIB, free_bytes=20 * GIB
)


def passes() -> Outcome:
    return ok("fine")


def raises_a_long_error() -> Outcome:
    raise RuntimeError(f"\nno kernel image\nin {Path.home()}/lib.so")


def aborts() -> Outcome:
    os.abort()


def exits() -> Outcome:
    raise SystemExit(3)


def hangs() -> Outcome:
    time.sleep(60)
    return ok("late")


def chatters() -> Outcome:
    os.write(1, b"native output")
    print("python output")
    return ok("said its piece")


def in_child(check: Callable[..., Outcome], *arguments: object, limit_seconds: float = 60) -> Outcome:
    """Run a check in a fresh process, which reads the environment again."""
    with Isolation() as isolation:
        return isolation.run(check, *arguments, advice="do this", limit_seconds=limit_seconds)


def test_an_exception_is_a_finding_with_its_text_and_without_the_home_directory() -> None:
    outcome = in_child(raises_a_long_error)
    assert (outcome.status, outcome.finding) == (Status.FAILED, "RuntimeError: no kernel image")
    assert outcome.advice == "do this"
    assert outcome.details == {"error": "\nno kernel image\nin ~/lib.so"}


@pytest.mark.slow
def test_a_check_that_kills_its_process_is_a_finding_and_the_next_one_runs() -> None:
    with Isolation() as isolation:
        for check, how in ((aborts, "SIGABRT"), (exits, "exit code 3")):
            outcome = isolation.run(check, advice="do this", limit_seconds=60)
            assert (outcome.status, outcome.advice) == (Status.FAILED, "do this")
            assert how in outcome.finding
            assert isolation.run(passes, advice="", limit_seconds=60) == ok("fine")


@pytest.mark.slow
def test_a_check_that_hangs_is_a_finding_and_the_next_one_runs() -> None:
    with Isolation() as isolation:
        assert isolation.run(passes, advice="", limit_seconds=60) == ok("fine")
        outcome = isolation.run(hangs, advice="do this", limit_seconds=1)
        assert (outcome.status, outcome.finding) == (Status.FAILED, "no answer in 1 seconds")
        assert isolation.run(passes, advice="", limit_seconds=60) == ok("fine")


def test_output_of_a_check_does_not_reach_the_streams_of_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert in_child(chatters) == ok("said its piece")
    assert capfd.readouterr() == ("", "")


def test_a_home_at_the_root_replaces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert without_home("/usr/lib/libcuda.so") == "/usr/lib/libcuda.so"


def fails() -> Outcome:
    return failed("broken", "mend it")


def test_checks_that_depend_on_a_failed_one_are_skipped_and_training_cannot_work() -> None:
    with Isolation() as isolation:
        examination = Examination(isolation, SilentReporter())
        examination.check("torch", fails, advice="")
        examination.check("gpu", passes, advice="", needs=("torch",))
        examination.check("attention", passes, advice="", needs=("gpu",))
        examination.check("disk", passes, advice="")
        report = examination.report()
    assert [check.status for check in report.checks] == ["failed", "skipped", "skipped", "ok"]
    assert report.checks[2].advice == "See gpu."
    assert not report.can_train


@pytest.mark.parametrize(("vital", "can_train"), [(True, False), (False, True)])
def test_only_a_failure_that_training_depends_on_prevents_it(vital: bool, can_train: bool) -> None:
    with Isolation() as isolation:
        examination = Examination(isolation, SilentReporter())
        examination.check("hub", fails, advice="", vital=vital)
    assert examination.report().can_train is can_train


def test_bitsandbytes_stores_nf4_as_defined() -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(3))
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    stored = dequantize_4bit(packed, state)
    torch.testing.assert_close(checks_bitsandbytes.nf4_reference(weight), stored, rtol=1e-5, atol=1e-6)


def test_bitsandbytes_that_works_passes_far_below_its_tolerances() -> None:
    outcome = checks_bitsandbytes.check_device("cpu")
    assert outcome.status == Status.OK, outcome.finding
    errors, tolerances = outcome.details["relative_errors"], outcome.details["tolerances"]
    assert isinstance(errors, dict)
    assert isinstance(tolerances, dict)
    assert len(errors) == 12
    for name, error in errors.items():
        assert error < tolerances[name] / 2, name


@pytest.mark.parametrize(
    ("function", "expected"), [("matmul_4bit", "nf4_product_of_1 is off by 5.0%"), ("matmul", "int8_product_to_train")]
)
def test_a_product_that_is_five_percent_off_fails(
    monkeypatch: pytest.MonkeyPatch, function: str, expected: str
) -> None:
    import bitsandbytes

    right = getattr(bitsandbytes, function)
    monkeypatch.setattr(bitsandbytes, function, lambda *given, **named: right(*given, **named) * 1.05)
    outcome = checks_bitsandbytes.check_device("cpu")
    assert outcome.status == Status.FAILED
    assert expected in outcome.finding


def test_quantization_with_wrong_levels_fails_although_its_own_product_agrees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import bitsandbytes

    right = bitsandbytes.functional.quantize_4bit

    def as_fp4(weight: "torch.Tensor", **named: Any) -> Any:
        return right(weight, **{**named, "quant_type": "fp4"})

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", as_fp4)
    outcome = checks_bitsandbytes.check_device("cpu")
    assert outcome.status == Status.FAILED
    assert "1 of 12 comparisons, nf4_stored" in outcome.finding


def test_nan_is_wrong_and_null_in_json() -> None:
    trial = checks_bitsandbytes.Trial("nf4_product", float("nan"), 0.1)
    outcome = checks_bitsandbytes.judge([trial], "cpu", "fp32")
    assert outcome.status == Status.FAILED
    assert outcome.details["relative_errors"] == {"nf4_product": None}


def test_a_speed_that_cannot_be_stored_is_a_warning_with_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    from qlora_cli.timing import measuring

    cache = tmp_path / "cache"
    cache.write_text("a file, where a folder is needed")
    monkeypatch.setenv("QLORA_CACHE", str(cache))
    rates = measuring.measure_rates(torch.device("cpu"), torch.float32, seconds=0.0)
    monkeypatch.setattr(measuring, "measure_rates", lambda *_, **__: rates)
    outcome = checks_speed.check_speed("cpu")
    assert outcome.status == Status.WARNING
    assert "which can't be stored" in outcome.finding
    assert outcome.advice == checks_speed.FREE_DISK
    measured = outcome.details["measured"]
    assert isinstance(measured, dict)
    assert measured["flops"] == rates.flops
    assert outcome.details["data_sheet"] is None


def package(name: str, installed: str | None, within_bounds: bool) -> checks_install.Package:
    return checks_install.Package(name=name, required=">=2", installed=installed, within_bounds=within_bounds)


def test_packages_that_are_missing_or_too_old_are_all_named_with_one_command() -> None:
    packages = [package("a", "1.9", False), package("b", None, False), package("c", "2.0", True)]
    outcome = checks_install.judge_packages(packages)
    assert outcome.status == Status.FAILED
    assert outcome.finding == "a 1.9 (needs >=2); b is not installed (needs >=2)"
    assert outcome.advice == "Run: pip install --upgrade 'a>=2' 'b>=2'"
    assert checks_install.judge_packages(packages[2:]).finding == "all 1 within their bounds: c 2.0"


def test_every_package_of_pyproject_is_compared() -> None:
    import tomllib

    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    outcome = checks_install.check_packages()
    compared = outcome.details["packages"]
    assert isinstance(compared, list)
    required = {(one.name, one.specifier) for one in map(Requirement, pyproject["project"]["dependencies"])}
    assert {(one["name"], SpecifierSet(one["required"])) for one in compared} == required
    assert outcome.status == Status.OK, outcome.finding


@pytest.mark.parametrize(
    ("built_for", "driver", "visible", "finding", "advice"),
    [
        (None, (12, 8), None, "built without CUDA", "Install a CUDA build"),
        ("13.0", (12, 8), None, "built for CUDA 13.0, and the driver supports up to 12.8", "Update the driver"),
        ("12.8", (12, 8), "", "CUDA_VISIBLE_DEVICES hides", "Unset CUDA_VISIBLE_DEVICES"),
        ("12.8", (12, 4), "0", "reaches no GPU through CUDA 12.8", "nvidia-smi"),
    ],
)
def test_the_reason_why_pytorch_reaches_no_gpu_is_reported(
    built_for: str | None, driver: tuple[int, int], visible: str | None, finding: str, advice: str
) -> None:
    explained = explain_no_cuda(built_for, driver, visible)
    assert finding in explained[0]
    assert advice in explained[1]


@pytest.mark.parametrize(
    ("release", "status"),
    [("6.8.0-49-generic", Status.OK), ("5.15.153.1-microsoft-standard-WSL2", Status.WARNING)],
)
def test_a_driver_that_pages_gpu_memory_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, release: str, status: Status
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(checks_hardware, "_detect_gpu", lambda _: GPU)
    monkeypatch.setattr(platform, "release", lambda: release)
    outcome = checks_hardware.check_gpu()
    assert outcome.status == status
    assert str(GPU) in outcome.finding
    assert ("No Sysmem Fallback" in str(outcome.advice)) == (status == Status.WARNING)


def test_a_gpu_is_described_in_one_line_and_is_crowded_when_half_of_it_is_used() -> None:
    assert str(GPU) == "0: NVIDIA L4 (8.9, bf16), 20.00 GiB of 24.00 GiB free"
    assert not GPU.crowded
    assert replace(GPU, free_bytes=11 * GIB).crowded


def test_attention_names_the_backends_that_ran() -> None:
    import torch

    outcome = checks_hardware.check_attention()
    assert outcome.status == Status.OK
    assert outcome.details["eager"] is True
    backends = outcome.details["sdpa_backends"]
    assert isinstance(backends, list)
    assert "math" in backends
    if not torch.cuda.is_available():
        assert "cudnn_attention" not in backends


@pytest.mark.parametrize(
    ("cache", "here", "advice"),
    [(19, 50, "set HF_HOME"), (50, 1, "--output"), (50, 50, None)],
)
def test_a_disk_too_full_for_a_model_or_for_checkpoints_is_a_warning(
    cache: int, here: int, advice: str | None
) -> None:
    outcome = checks_hub.judge_disk(Path("/cache"), cache * GIB, here * GIB)
    assert outcome.status == ("ok" if advice is None else "warning")
    assert (advice or "") in (outcome.advice or "")
    assert outcome.details["cache_free_bytes"] == cache * GIB


def test_free_space_is_reported_for_a_missing_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    outcome = in_child(checks_hub.check_disk)
    assert outcome.details["cache"] == str(tmp_path / "not" / "yet")
    free = outcome.details["cache_free_bytes"]
    assert isinstance(free, int)
    assert free > 0


REPORT = Report(
    can_train=False,
    checks=(
        Check(name="torch", status=Status.OK, finding="2.13", advice=None, details={}),
        Check(
            name="bitsandbytes_cpu",
            status=Status.FAILED,
            finding=f"wrong results {TOKEN} " + "and more of it " * 8,
            advice="Reinstall it: pip install --force-reinstall --no-deps bitsandbytes",
            details={},
        ),
    ),
)


def test_without_a_terminal_a_finding_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    render_doctor(REPORT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "This machine can't train (1 ok, 1 failed)"
    assert lines[1] == "  ok    torch             2.13"
    assert lines[2].startswith("  FAIL  bitsandbytes_cpu  wrong results hf_*** and more")
    assert lines[3].endswith("-> Reinstall it: pip install --force-reinstall --no-deps bitsandbytes")
    assert len(lines) == 4
    assert "\x1b" not in "".join(lines)


def test_on_a_terminal_lines_fit_into_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    render_doctor(REPORT)
    coloured = capsys.readouterr().out
    assert "\x1b[1;31mFAIL" in coloured
    lines = re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) >= 6
    assert all(line.startswith(" " * 26) for line in lines[3:])
