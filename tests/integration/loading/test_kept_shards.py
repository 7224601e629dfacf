"""A model that is loaded in shards is the one that is loaded whole: the parts of all processes are its weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_cli.errors import ModelError
from qlora_cli.events import SilentReporter
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.loading.loader import LoadedModel, load_model, load_planned
from qlora_cli.loading.save import save_quantized
from qlora_cli.quantization.kept_shards import KeptShards, layer_names
from tests.support.models.experts import save_moe
from tests.support.models.loading import asked_load, load, load_settings, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 3


def shard_of(model: Path, rank: int, **flags: object) -> tuple[LoadedModel, KeptShards]:
    plan = plan_load(asked_load(model, **flags), SilentReporter())
    layers = tuple(layer_names(plan.shapes, GradientCheckpointingLayer))
    shards = KeptShards(rank=rank, size=SIZE, device=torch.device("cpu"), layers=layers)
    return load_planned(plan, SilentReporter(), shards=shards), shards


def check_shards_of(model: Path, **flags: object) -> None:
    """Check that the shards of `SIZE` processes are the weights of the model that one loads."""
    whole = load(model, **flags)
    ranks = [shard_of(model, rank, **flags) for rank in range(SIZE)]
    named = dict(whole.base.named_parameters())
    assert sum(shards.num_bytes for _, shards in ranks) > 0
    for loaded, shards in ranks:
        assert loaded.report().total_bytes == whole.report().total_bytes
        assert shards.num_left > 5
    for name, parameter in named.items():
        others = [dict(loaded.base.named_parameters())[name] for loaded, _ in ranks]
        assert all(other.shape == parameter.shape and other.dtype == parameter.dtype for other in others)
        parts = [shards.take(other) for other, (_, shards) in zip(others, ranks, strict=True)]
        if parts[0] is None:
            assert all(torch.equal(other, parameter) for other in others)
            continue
        assert torch.equal(bytes_of(torch.cat([part for part in parts if part is not None])), bytes_of(parameter.data))
        assert all(other.untyped_storage().nbytes() <= parameter.element_size() for other in others)
    assert not any(shards.num_left for _, shards in ranks)
    constants = states(whole)
    for loaded, _ in ranks:
        own = states(loaded)
        assert own.keys() == constants.keys()
        assert all(torch.equal(own[name], constants[name]) for name in constants)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of codes, which are not numbers in the dtype that they are stored in."""
    return tensor.contiguous().view(torch.uint8)


def states(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Return the constants of each layer and of each fused weight, by name."""
    found = {name: getattr(module, "quant_state", None) for name, module in loaded.base.named_modules()}
    return {
        f"{name}.{key}": value
        for name, state in found.items()
        if state is not None
        for key, value in state.as_dict(packed=True).items()
    }


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"quantization__method": "fp4", "quantization__double_quant": False, "quantization__quant_storage": "bf16"},
        {"quantization__method": "none"},
        {"quantization__skip_modules": ["down_proj"]},
    ],
    ids=["NF4", "FP4 in bf16", "not quantized", "skipped layers"],
)
def test_the_shards_of_all_processes_are_the_weights(base_model: Path, flags: dict[str, object]) -> None:
    check_shards_of(base_model, **flags)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_so_are_those_of_experts(tmp_path: Path, family: str) -> None:
    check_shards_of(save_moe(tmp_path / "model", family))


def test_so_are_those_of_a_quantized_checkpoint(base_model: Path, tmp_path: Path) -> None:
    save_quantized(load_model(load_settings(base_model)), tmp_path / "stored", SilentReporter())
    check_shards_of(tmp_path / "stored")


def test_a_weight_that_is_not_finite_is_refused_whoever_keeps_it(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", "llama")
    spoil(path)
    for method in ("nf4", "none"):
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight.*not finite"):
            shard_of(path, 0, quantization__method=method)


def spoil(model: Path) -> None:
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
