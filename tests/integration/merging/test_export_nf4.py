"""NF4: a merged model quantized again, in the dtype it was merged in, or refused in advance if that is impossible."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qlora_cli.errors import ModelError
from qlora_cli.events import Noted
from qlora_cli.merging.exports.nf4 import Nf4Export, check_nf4, export_nf4
from qlora_cli.settings.choices import Device
from tests.conftest import Recorder
from tests.support.models.loading import load, logits, save_model, without_repacking
from tests.support.models.tiny_models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def export(model: Path, target: Path, recorder: Recorder | None = None) -> Nf4Export:
    return export_nf4(model, target, trust_remote_code=False, device=Device.CPU, reporter=recorder or Recorder())


def dtypes(checkpoint: Path) -> set[str]:
    """Return the dtypes of the tensors that are neither quantized nor part of a quantized weight."""
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.endswith(("norm.weight", "embed_tokens.weight"))]  # noqa: SIM118
        return {str(file.get_tensor(name).dtype) for name in names}


def test_it_is_smaller_in_the_dtype_of_the_merged_model_and_loads_in_transformers(
    base_model: Path, tmp_path: Path
) -> None:
    done = export(base_model, tmp_path / "nf4")
    assert done.dtype == "bf16"
    assert dtypes(tmp_path / "nf4") == {"torch.bfloat16"}  # and not fp32, which a CPU computes in
    assert done.num_bytes == sum(path.stat().st_size for path in (tmp_path / "nf4").iterdir())
    assert done.merged_weight_bytes == 2 * done.num_parameters
    # 4.127 bits a quantized weight, with its tables; 16 a weight of the rest.
    rest = 2 * (done.num_parameters - done.num_quantized_parameters)
    assert done.weight_bytes == pytest.approx(rest + done.num_quantized_parameters * 4.127 / 8, rel=0.02)
    assert done.times_smaller == done.merged_weight_bytes / done.weight_bytes > 2
    config = json.loads((tmp_path / "nf4" / "config.json").read_text(encoding="utf-8"))
    assert "source" not in json.loads((tmp_path / "nf4" / "qlora.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.bfloat16, device_map={"": "cpu"})
    assert torch.equal(logits(without_repacking(plain)), logits(load(base_model, model__dtype="bf16").model))


def test_a_model_in_fp16_stays_in_16_bit_on_a_cpu_too(tmp_path: Path) -> None:
    model, recorder = save_model(tmp_path / "model", dtype=torch.float16), Recorder()
    assert export(model, tmp_path / "nf4", recorder).dtype == "bf16"
    assert dtypes(tmp_path / "nf4") == {"torch.bfloat16"}
    messages = [event.message for event in recorder.events if isinstance(event, Noted)]
    assert any("merged model is in fp16" in message for message in messages)


def test_a_model_in_fp32_stays_in_fp32(tmp_path: Path) -> None:
    assert export(save_model(tmp_path / "model", dtype=torch.float32), tmp_path / "nf4").dtype == "fp32"
    assert dtypes(tmp_path / "nf4") == {"torch.float32"}


def check(family: str, tmp_path: Path) -> tuple[str, ...]:
    save_tiny(tmp_path, family)
    (tmp_path / "model.safetensors").unlink()  # nothing but the config is read
    return check_nf4(tmp_path, trust_remote_code=False, device=Device.CPU)


def test_a_model_with_nothing_to_quantize_is_refused_by_its_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing of FalconForCausalLM can be stored in nf4") as caught:
        check("falcon", tmp_path)
    assert caught.value.hint == "Leave nf4 out of --format."


def test_experts_that_transformers_can_not_load_are_noted(tmp_path: Path) -> None:
    [note] = check("mixtral", tmp_path)
    assert "needs qlora" in note


def test_layers_that_stay_in_16_bit_are_noted_with_the_reason(tmp_path: Path) -> None:
    [note] = check("falcon_h1", tmp_path)
    assert "not all layers" in note
    assert "state-space" in note


def test_a_plain_model_has_no_notes(tmp_path: Path) -> None:
    assert check("llama", tmp_path) == ()
