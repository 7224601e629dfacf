"""Mistakes and damage that a newcomer met: each is one message before the weights are used, and none is ignored."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from qlora_cli.errors import ModelError, OutputDirectoryError
from qlora_cli.events import SilentReporter
from qlora_cli.hub.repository import Repository, fetch_files
from qlora_cli.settings.choices import METHODS, Quantization
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Sources, describe, resolve
from qlora_cli.writing import MARK, write_directory
from tests.conftest import RunQlora
from tests.support.models.loading import load, refused, save_model

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def changed(directory: Path, name: str, tensor: torch.Tensor) -> Path:
    """Write a model whose weight `name` is `tensor`."""
    model = save_model(directory)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, name: tensor}, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_an_8_bit_weight_of_an_unquantized_model_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    model = changed(tmp_path / "model", WEIGHT, torch.ones(128, 64).to(dtype))
    message = refused(model, ModelError)
    assert f"model.safetensors: {WEIGHT} is stored as" in message
    assert "give the 16-bit model" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_quantized_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    tensor = torch.ones(128, 64, dtype=torch.bfloat16)
    tensor[77, 33] = value
    message = refused(changed(tmp_path / "model", WEIGHT, tensor), ModelError)
    assert WEIGHT in message
    assert "values that are not finite" in message


@pytest.mark.parametrize("method", METHODS)
def test_a_value_that_is_not_finite_is_named_even_if_transformers_is_silent(
    tmp_path: Path, method: Quantization
) -> None:
    tensor = torch.ones(128, 64, dtype=torch.bfloat16)
    tensor[77, 33] = float("nan")
    model = changed(tmp_path / "model", WEIGHT, tensor)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        message = refused(model, ModelError, quantization__method=method)
        assert transformers_logging.get_verbosity() == logging.ERROR
    finally:
        transformers_logging.set_verbosity(verbosity)
    assert f"{WEIGHT} (in model.safetensors)" in message
    assert "values that are not finite" in message
    assert "The model is damaged" in message
    assert "of one version" not in message


def test_a_value_that_overflows_8_bit_is_distinguished_from_one_that_is_not_finite(tmp_path: Path) -> None:
    tensor = torch.ones(128, 64, dtype=torch.bfloat16)
    tensor[77, 33] = 131072.0
    model = changed(tmp_path / "model", WEIGHT, tensor)
    message = refused(model, ModelError, quantization__method="int8", model__dtype="bf16")
    assert f"{WEIGHT} (in model.safetensors): holds values up to 1.31e+05, which overflow fp16" in message
    assert "damaged" not in message


def test_modules_to_skip_that_match_nothing_are_an_error_that_names_the_layers(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    message = refused(model, ModelError, quantization__skip_modules="nothere,up_proj")
    assert "'nothere' matches no layer" in message
    assert "down_proj" in message


def test_the_reported_compute_dtype_is_the_requested_one(tmp_path: Path) -> None:
    report = load(save_model(tmp_path / "model"), quantization__compute_dtype="bf16").report()
    assert (report.compute_dtype, report.compute_dtype_reason) == ("bf16", "as asked")


@pytest.mark.parametrize("width", ["big", -1])
def test_a_config_with_values_of_the_wrong_kind_is_refused(tmp_path: Path, width: object) -> None:
    model = save_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": width}))
    with pytest.raises(ModelError):
        load(model)


def test_gguf_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    for model in (file, tmp_path):
        assert "is in GGUF" in refused(model, ModelError)


def test_a_settings_file_that_trusts_code_is_refused_by_config_show_too(run_qlora: RunQlora, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model:\n  trust_remote_code: true\n")
    done = run_qlora("config", "show", "--config", tmp_path / "run.yaml")
    assert (done.code, "can't be enabled in a settings file" in done.stderr) == (2, True)
    assert describe(Sources(assignments=["model.trust_remote_code=true"]))


def test_dropout_on_fused_experts_is_refused_by_the_settings_alone() -> None:
    values = {"model.name": "m", "data.dataset": "d", "output.directory": "o", "lora.dropout": 0.1}
    flags = {path: (path, value) for path, value in {**values, "lora.target_parameters": "all-experts"}.items()}
    with pytest.raises(ValueError, match=r"lora.dropout can't be applied to fused experts"):
        resolve(Sources(flags=flags), TrainSettings)


def test_a_cache_that_is_not_a_directory_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from qlora_cli.hub import repository as hub
    from qlora_cli.hub.download import RemoteFile

    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    remote = RemoteFile(name="x", num_bytes=5, blob=tmp_path / "blob")
    monkeypatch.setattr(hub, "_describe_file", lambda *_: remote)
    repository = Repository(name="a/b", revision=None, commit="0" * 40, file_names=frozenset({"x"}))
    with pytest.raises(OutputDirectoryError, match="can't be written to") as caught:
        fetch_files(repository, ["x"], SilentReporter())
    assert "HF_HOME" in str(caught.value.hint)


def test_bars_are_drawn_as_the_terminal_permits(run_qlora: RunQlora, base_model: Path) -> None:
    done = run_qlora("load", base_model, "--device", "cpu", "--error", env={"PYTHONIOENCODING": "ascii"})
    assert done.code == 0, done.stderr
    assert "????" in done.stdout


def test_writers_of_one_directory_leave_each_others_files_alone_and_remove_those_of_a_killed_one(
    tmp_path: Path,
) -> None:
    target = tmp_path / "out"
    killed = tmp_path / ".out.4194305-a.saving"  # beyond the largest number that Linux gives a process
    running = tmp_path / ".out.1-b.saving"
    for path in (killed, running):
        path.mkdir()
        (path / MARK).touch()
    write_directory(target, lambda path: (path / "file").touch())
    assert (target / "file").exists()
    assert (killed.exists(), running.exists()) == (False, True)
