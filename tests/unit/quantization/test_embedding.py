"""The embedding: held on the host or extended, and the memory of both; on a CPU, the host stands in for the device."""

import dataclasses
from pathlib import Path

import pytest
import torch

from qlora_cli.errors import HardwareError, ModelError
from qlora_cli.events import SilentReporter
from qlora_cli.hardware.device import choose_compute_dtype
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.loading.loader import load_model, load_planned
from qlora_cli.quantization.embedding import embedding_of, extend_vocabulary, offload_device_map
from qlora_cli.quantization.memory_check import needed_bytes
from qlora_cli.quantization.storage_plan import build_on_meta, plan_layout
from qlora_cli.settings.choices import Dtype
from qlora_cli.settings.models import LoadSettings, ModelSettings, QuantizationSettings
from qlora_cli.settings.settle import resolved_in_code
from tests.support.models.loading import save_model
from tests.support.models.tiny_models import tiny_config, tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])


def settings_of(model: Path, method: str) -> LoadSettings:
    """Return settings for a CPU in fp32."""
    return LoadSettings(
        model=ModelSettings(name=str(model), device="cpu", dtype="fp32"),
        quantization=QuantizationSettings(method=method),
    )


@pytest.mark.parametrize("method", ["nf4", "int8", "none"])
def test_an_embedding_on_the_host_is_complete_and_gives_the_same_logits(tmp_path: Path, method: str) -> None:
    settings = settings_of(save_model(tmp_path / "model"), method)
    expected = load_model(settings).base.eval()(input_ids=IDS).logits
    load_plan = plan_load(resolved_in_code(settings), SilentReporter())
    offloading = settings.model.model_copy(update={"offload_embedding": True})
    # Planning refuses this on a CPU, where it saves nothing; loading works the same on any device.
    planned = dataclasses.replace(load_plan, settings=settings.model_copy(update={"model": offloading}))
    model = load_planned(planned, SilentReporter()).base.eval()
    assert embedding_of(model).weight.device.type == "cpu"
    assert not [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert len(embedding_of(model)._forward_hooks) == 1
    assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mamba2", "gpt_neox"])
def test_the_map_for_offloading_places_every_weight_once_and_only_the_embedding_on_the_host(family: str) -> None:
    model = build_on_meta(tiny_config(family), torch.float32)
    device_map = offload_device_map(model, torch.device("cuda"))
    embedding = embedding_of(model)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        (place,) = {device_map[part] for part in device_map if name == part or name.startswith(f"{part}.")}
        assert (place == "cpu") == (parameter is embedding.weight), name
    assert "" not in device_map


def test_both_kinds_of_offloading_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LoadSettings(
        model=ModelSettings(name=str(save_model(tmp_path / "model")), offload_embedding=True),
        quantization=QuantizationSettings(method="int8", int8_cpu_offload=True),
    )
    monkeypatch.setattr("qlora_cli.loading.load_plan.choose_device", lambda _: torch.device("cuda"))
    with pytest.raises(ModelError, match="can't be used with"):
        plan_load(resolved_in_code(settings), SilentReporter())


def test_extending_takes_no_more_than_a_second_embedding() -> None:
    model = tiny_model("llama", vocab_size=4096, tie_word_embeddings=True)
    embedding = embedding_of(model)
    mean = embedding.weight.detach().double().mean(0)
    extend_vocabulary(model, 4100)
    assert embedding_of(model).num_embeddings == 4100
    torch.testing.assert_close(embedding_of(model).weight[4096:].double(), mean.expand(4, -1))


def test_memory_for_an_extended_vocabulary_is_included() -> None:
    model = build_on_meta(tiny_config("llama", vocab_size=65_536), torch.bfloat16)
    layout = plan_layout(model, QuantizationSettings(), torch.bfloat16, device=torch.device("cpu"))
    assert needed_bytes(layout, grows=True) == layout.inventory.total_bytes + 65_536 * 64 * 2
    assert needed_bytes(layout) < needed_bytes(layout, grows=True)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_oss", "qwen3_moe", "glm4_moe", "gemma4_text"])
@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_model_that_overflows_fp16_is_never_computed_in_it(
    monkeypatch: pytest.MonkeyPatch, model_type: str, has_bf16: bool
) -> None:
    monkeypatch.setattr("qlora_cli.hardware.device._native_bf16", lambda _: (has_bf16, "so it is"))
    device = torch.device("cuda")
    with pytest.raises(HardwareError, match="overflows fp16"):
        choose_compute_dtype(Dtype.FP16, device, model_type)
    chosen = choose_compute_dtype(Dtype.AUTO, device, model_type)
    assert chosen.name == (Dtype.BF16 if has_bf16 else Dtype.FP32)
    assert choose_compute_dtype(Dtype.AUTO, device, "llama").name == (Dtype.BF16 if has_bf16 else Dtype.FP16)


def test_an_explicit_compute_dtype_obeys_the_same_rules(tmp_path: Path) -> None:
    settings = settings_of(save_model(tmp_path / "model"), "nf4")
    quantization = settings.quantization.model_copy(update={"compute_dtype": Dtype.FP16})
    with pytest.raises(HardwareError, match="fp16 is not trained on a CPU"):
        plan_load(resolved_in_code(settings.model_copy(update={"quantization": quantization})), SilentReporter())
