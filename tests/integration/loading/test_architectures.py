"""Every family of models is stored as planned, computes as plain transformers does, trains, saves and loads again.

Models are tiny and random, saved in bf16 as users' are, and computed in fp32, so that results compare to the bit.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.adapters.writer import save_adapter
from qlora_cli.errors import ModelError
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.settings.models import LoraSettings
from tests.integration.training.test_training import base_digest
from tests.support.models.adapters import lora_layers, put_back, settings_of, train_steps
from tests.support.models.loading import load, logits, refused, save_model
from tests.support.models.reference_models import IDS, ROWS, dequantize, load_plain
from tests.support.models.tiny_models import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

NAMED = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "gpt2"),
    *("gpt_neox", "falcon", "olmo2", "olmoe", "starcoder2", "stablelm", "cohere2", "granite", "granitemoe"),
    *("smollm3", "glm4", "deepseek_v3", "gpt_oss", "bamba", "falcon_h1", "mamba2", "nemotron_h", "jamba"),
}
# Linear layers without an adapter that are neither head nor router, each reported in a note: PEFT takes their
# names for those of the experts, or renames their weights; or a kernel reads the weight itself.
TAKEN = r"(mlp|shared_experts?|shared_mlp)\.(gate|up|down)_proj$"
READ_BY_KERNEL = r"(mamba|mixer)\.out_proj$"
WITHOUT_ADAPTER: Mapping[str, str] = {
    **dict.fromkeys(("glm4_moe", "deepseek_v3", "deepseek_v32", "ernie4_5_moe", "laguna", "qwen3_next"), TAKEN),
    **dict.fromkeys(("bamba", "falcon_h1", "mamba2", "mamba", "jamba", "granitemoehybrid"), READ_BY_KERNEL),
    **dict.fromkeys(("nemotron_h", "zamba2"), READ_BY_KERNEL),
}
WITH_EXPERTS = {
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "deepseek_v3", "deepseek_v32"),
    *("gpt_oss", "phimoe", "flex_olmo", "minimax_m2", "llama4_text", "jetmoe", "ernie4_5_moe", "laguna", "dbrx"),
    *("lfm2_moe", "qwen3_next", "jamba", "granitemoehybrid", "nemotron_h"),
}
ROUTER = re.compile(r"\.(router|gate|shared_expert_gate)$")


@pytest.fixture(scope="module", params=[family for family in FAMILIES if family != "falcon"])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp(family), family, vocab_size=ROWS)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    """The model in nf4 with double quantization, which only the last test of a family changes: it trains it."""
    return load(checkpoint)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def test_there_are_many_families_including_the_common_ones() -> None:
    assert len(FAMILIES) >= 60
    assert set(FAMILIES) >= NAMED
    assert set(FAMILIES) >= WITHOUT_ADAPTER.keys()


def test_every_weight_is_quantized_or_has_a_reason_not_to_be(loaded: LoadedModel) -> None:
    reasons = dict(loaded.layout.unquantized)
    num_quantized = 0
    for name, module in linears(loaded.base).items():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        if reason := reasons.pop(name, None):
            assert type(module) is not Linear4bit, name
            assert weight.dtype == torch.float32
            assert len(reason) > 5
        else:
            assert type(module) is Linear4bit, name
            assert weight.dtype == torch.uint8
            assert isinstance(weight, Params4bit)
            assert weight.quant_state.nested
            num_quantized += 1
    assert num_quantized > 0
    for name, reason in reasons.items():  # only fused experts are left
        assert loaded.base.get_parameter(name).dtype == torch.float32
        assert len(reason) > 5
    unquantized = {entry.name: entry.why_not for entry in loaded.inventory.entries if not entry.is_quantized}
    assert "not asked for" not in unquantized.values()
    assert not [
        name for name in unquantized if "expert" in name and not is_small(name, loaded) and name not in reasons
    ]


def is_small(name: str, loaded: LoadedModel) -> bool:
    """Return whether a parameter is a vector, a bias per expert, a router's weight or in an unquantized layer."""
    return (
        name.endswith("bias")
        or loaded.base.get_parameter(name).dim() < 2
        or name.rpartition(".")[0] in loaded.layout.unquantized
    )


def test_experts_are_found_in_families_that_have_them_and_in_no_other(family: str, loaded: LoadedModel) -> None:
    """Recurrent layers have weights of three dimensions too, which quantization would harm."""
    assert bool(loaded.layout.experts) == (family in WITH_EXPERTS)


def test_the_loaded_model_is_the_planned_one_to_the_byte(loaded: LoadedModel) -> None:
    planned, counted = loaded.layout.inventory, loaded.inventory
    assert {entry.name: entry for entry in planned.entries} == {entry.name: entry for entry in counted.entries}
    assert planned.buffer_bytes == counted.buffer_bytes
    assert planned.total_bytes == counted.total_bytes


def test_logits_are_those_of_plain_transformers_with_the_same_weights_dequantized(
    loaded: LoadedModel, checkpoint: Path
) -> None:
    unquantized = load_plain(checkpoint)
    assert loaded.inventory.num_parameters == unquantized.num_parameters()
    quantized, exact = logits(loaded.base, IDS), logits(unquantized, IDS)
    assert torch.equal(quantized, logits(dequantize(unquantized, loaded), IDS))
    assert quantized.isfinite().all()
    assert not torch.equal(quantized, exact)  # quantizing did change something
    assert (quantized - exact).std() < 0.5 * exact.std()


def test_an_adapter_on_all_linear_layers_trains_and_loads_again_and_leaves_the_base_unchanged(
    family: str, checkpoint: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    """By rsLoRA, with other ranks and scales in some layers."""
    base = loaded.base
    head = base.get_output_embeddings()
    wanted = [name for name, module in linears(base).items() if module is not head and not ROUTER.search(name)]
    left_out = {name for name in wanted if re.search(WITHOUT_ADAPTER.get(family, "$^"), name)}
    adapted = [name for name in wanted if name not in left_out]
    before = logits(base, IDS)
    leaf, full = adapted[-1].rpartition(".")[2], adapted[0]
    lora = settings_of(alpha=8, use_rslora=True, rank_pattern={leaf: 4, full: 2}, alpha_pattern={full: 6})
    model, notes = attach_adapter(base, lora)
    assert bool(left_out) == bool(notes) == (family in WITHOUT_ADAPTER)
    layers = lora_layers(model)
    assert sorted(layers) == sorted(adapted)
    for name, layer in layers.items():
        rank = 2 if name == full else 4 if f".{name}".endswith(f".{leaf}") else 8
        assert layer.lora_A["default"].weight.shape[0] == rank, name
        assert layer.scaling["default"] == pytest.approx((6 if name == full else 8) / math.sqrt(rank))
    assert torch.equal(logits(model, IDS), before)  # B is zero

    digest = base_digest(model)
    losses = train_steps(model)
    assert losses[0] > losses[1] > losses[2]
    assert base_digest(model) == digest
    trained = logits(model, IDS)
    assert not torch.equal(trained, before)

    save_adapter(model, tmp_path / "adapter")
    # Trainable, like the other model: torch folds a product with a batch differently if its weight has a gradient.
    again = put_back(load(checkpoint).base, tmp_path / "adapter")
    assert torch.equal(logits(again, IDS), trained)


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("falcon"), "falcon", vocab_size=ROWS)


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_quantized_falcon_is_refused_because_its_linear_layers_are_not_plain(falcon: Path, method: str) -> None:
    message = refused(falcon, ModelError, quantization__method=method)
    assert f"nothing of FalconForCausalLM can be stored in {method}" in message
    assert "a FalconLinear, not a plain linear layer" in message
    assert "--quant none" in message


def test_falcon_loads_unquantized(falcon: Path) -> None:
    loaded = load(falcon, quantization__method="none")
    assert torch.equal(logits(loaded.base, IDS), logits(load_plain(falcon), IDS))
    assert loaded.layout.inventory == loaded.inventory
    model, _ = attach_adapter(loaded.base, LoraSettings(rank=8))
    losses = train_steps(model)
    assert losses[0] > losses[1] > losses[2]
