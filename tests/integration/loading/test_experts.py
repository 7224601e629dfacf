"""Experts that transformers 5 stacks into one parameter are quantized one at a time, as bitsandbytes would, and train.

Hidden and expert widths are 256, so that code tables of a kilobyte a weight do not dominate the count of bytes.
"""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.events import SilentReporter
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.loading.save import save_quantized
from qlora_cli.quantization.methods import four_bit_quantizer
from qlora_cli.units import format_bytes
from tests.support.models.experts import MOE, parametrized, save_moe
from tests.support.models.loading import copy_tokenizer, load, logits, refused
from tests.support.models.reference_models import IDS, dequantized, load_plain, quantized_whole
from tests.support.models.tiny_models import tiny_model
from tests.support.processes.plain_python import PlainPython

pytestmark = pytest.mark.usefixtures("one_thread")

# Saved by transformers as one tensor an expert and matrix, as their checkpoints have been from the beginning.
ONE_TENSOR_AN_EXPERT = ("mixtral", "qwen3_moe", "glm4_moe")
STORED = [("nf4", False), ("fp4", True), ("fp4", False)]  # besides the default, which is shared


@pytest.fixture(scope="module", params=MOE)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_moe(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    """The model in nf4 with double quantization, which no test changes."""
    return load(checkpoint)


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_moe(tmp_path_factory.mktemp("qwen3_moe"), "qwen3_moe")


def same_states(actual: QuantState, expected: QuantState) -> bool:
    """Return whether two states are the same to the bit, including their second states."""
    tensors = torch.equal(actual.absmax, expected.absmax) and torch.equal(actual.code, expected.code)
    if not tensors or (actual.state2 is None) != (expected.state2 is None) or actual.shape != expected.shape:
        return False
    return actual.state2 is None or (
        torch.equal(actual.offset, expected.offset) and same_states_of_constants(actual.state2, expected.state2)
    )


def same_states_of_constants(actual: QuantState, expected: QuantState) -> bool:
    return torch.equal(actual.absmax, expected.absmax) and torch.equal(actual.code, expected.code)


def assert_experts_are_those_of_bitsandbytes(loaded: LoadedModel, plain: PreTrainedModel) -> None:
    """Compare each expert with the whole fused weight of a plain model, quantized at once."""
    settings = loaded.settings.quantization
    weights = dict(plain.named_parameters())
    chains = parametrized(loaded.base)
    assert chains.keys() == set(loaded.layout.experts)
    assert chains
    for name, chain in chains.items():
        packed, state = quantized_whole(weights[name], settings.method.value, double=settings.double_quant)
        assert torch.equal(chain.original, packed), name
        assert same_states(chain[0].quant_state, state), name


# ---- what is stored


def test_experts_take_about_4_bits_a_parameter(loaded: LoadedModel) -> None:
    experts = [entry for entry in loaded.inventory.entries if entry.kind == "experts"]
    assert {entry.name for entry in experts} == set(loaded.layout.experts)
    num_parameters = sum(entry.num_parameters for entry in experts)
    assert num_parameters >= 4 * 2 * 256 * 256  # 4 experts in at least one layer
    num_bytes = sum(entry.weight_bytes + entry.constant_bytes for entry in experts)
    assert 8 * num_bytes / num_parameters <= 4.6
    held = sum(chain.original.nbytes for chain in parametrized(loaded.base).values())
    assert held == num_parameters / 2


def test_transformers_alone_leaves_experts_in_16_bit_silently(
    checkpoint: Path, loaded: LoadedModel, recwarn: pytest.WarningsRecorder
) -> None:
    """The reason for our quantizer: once this fails, transformers quantizes experts itself."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, dtype=torch.bfloat16)
    assert {model.get_parameter(name).dtype for name in loaded.layout.experts} == {torch.bfloat16}
    assert not recwarn.list


def test_routers_norms_biases_and_heads_stay_in_16_bit(checkpoint: Path) -> None:
    loaded = load(checkpoint, model__dtype="bf16")
    rest = [entry for entry in loaded.inventory.entries if not entry.is_quantized]
    in_fp32 = set(loaded.base._keep_in_fp32_modules_strict or ())
    for entry in rest:
        expected = "float32" if in_fp32 & set(entry.name.split(".")) else "bfloat16"
        assert entry.dtype == expected, entry.name
    reasons = {entry.why_not for entry in rest}
    assert reasons >= {"router", "output head", "small"}
    routers = [entry for entry in rest if entry.why_not == "router"]
    assert {entry.num_parameters for entry in routers} <= {4 * 256, 256}  # the latter is the gate of a shared expert


# ---- to the bit


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> PreTrainedModel:
    """The model as plain transformers loads it, which no test changes."""
    return load_plain(checkpoint)


@pytest.mark.parametrize(("method", "double"), STORED)
def test_experts_are_those_of_bitsandbytes_on_the_whole_weight_to_the_bit(
    checkpoint: Path, plain: PreTrainedModel, method: str, double: bool
) -> None:
    loaded = load(checkpoint, quantization__method=method, quantization__double_quant=double)
    assert_experts_are_those_of_bitsandbytes(loaded, plain)


def test_experts_are_those_of_bitsandbytes_by_default(loaded: LoadedModel, plain: PreTrainedModel) -> None:
    assert_experts_are_those_of_bitsandbytes(loaded, plain)


@pytest.mark.parametrize("name", ONE_TENSOR_AN_EXPERT)
def test_experts_are_the_same_from_one_tensor_each_in_many_shards(name: str, tmp_path: Path) -> None:
    whole = save_moe(tmp_path / "whole", name)
    sharded = copy_tokenizer(save_sharded(whole, tmp_path / "sharded"))
    layers_of_files = []
    for file in sharded.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            layers_of_files.append({key.split(".experts.")[0] for key in tensors.keys() if ".experts.0." in key})  # noqa: SIM118 - not iterable
            assert not [key for key in tensors.keys() if key.endswith("gate_up_proj")]  # noqa: SIM118
    assert len(layers_of_files) > 8
    assert any(sum(layer in layers for layers in layers_of_files) > 1 for layer in set().union(*layers_of_files))
    assert_experts_are_those_of_bitsandbytes(load(sharded), load_plain(whole))


def save_sharded(checkpoint: Path, directory: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(directory, max_shard_size="300KB")
    return directory


@pytest.mark.parametrize("name", ONE_TENSOR_AN_EXPERT)
def test_experts_are_the_same_from_stacked_tensors(name: str, tmp_path: Path) -> None:
    apart = save_moe(tmp_path / "apart", name)
    stacked = copy_tokenizer(save_stacked(apart, tmp_path / "stacked"))
    with safe_open(stacked / "model.safetensors", "pt") as tensors:
        assert [key for key in tensors.keys() if key.endswith("experts.gate_up_proj")]  # noqa: SIM118
    assert_experts_are_those_of_bitsandbytes(load(stacked), load_plain(apart))


def save_stacked(checkpoint: Path, directory: Path) -> Path:
    model = load_plain(checkpoint, torch.bfloat16)
    model.config.save_pretrained(directory)
    weights = {name: parameter.data.contiguous() for name, parameter in model.named_parameters()}
    weights |= {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_experts_of_which_one_is_missing_are_refused_by_name(qwen3_moe: Path, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(qwen3_moe / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not iterable
            tensors[key] = file.get_tensor(key)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    directory = tmp_path / "damaged"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text((qwen3_moe / "config.json").read_text())
    message = refused(copy_tokenizer(directory), ModelError)
    assert "model.layers.1.mlp.experts" in message


# ---- in bounded memory


class Owned(bytearray):
    """Memory of one tensor; weak references to it end with the last tensor that uses it."""

    __slots__ = ("__weakref__",)


class Watch:
    """Wraps readers so that each tensor has memory of its own, and counts how many are alive at once."""

    def __init__(self) -> None:
        self.num_reads = 0
        self.most_alive = 0
        self._memory: list[weakref.ref[Owned]] = []

    def watched(self, read: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def reading() -> torch.Tensor:
            tensor = read()
            memory = Owned(tensor.contiguous().view(torch.uint8).numpy().tobytes())
            self._memory.append(weakref.ref(memory))
            self.num_reads += 1
            self.most_alive = max(self.most_alive, sum(reference() is not None for reference in self._memory))
            return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)

        return reading


@pytest.mark.parametrize("name", ONE_TENSOR_AN_EXPERT)
def test_no_more_than_one_expert_is_held_while_they_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watches: list[Watch] = []
    convert = four_bit_quantizer._QuantizeExperts.convert

    def watching(self: Any, input_dict: dict[str, list[Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        watches.append(watch := Watch())
        watched = {source: [watch.watched(read) for read in readers] for source, readers in input_dict.items()}
        return convert(self, watched, *args, **kwargs)

    monkeypatch.setattr(four_bit_quantizer._QuantizeExperts, "convert", watching)
    checkpoint = save_moe(tmp_path, name)
    loaded = load(checkpoint)
    assert len(watches) == len(loaded.layout.experts)
    # A weight of gate and up is read from two tensors an expert, one of down from one.
    assert sorted({(watch.num_reads, watch.most_alive) for watch in watches}) == [(4, 1), (8, 2)]
    assert_experts_are_those_of_bitsandbytes(loaded, load_plain(checkpoint))


# ---- computed with


def test_products_and_input_gradients_are_those_of_the_dequantized_weights(
    loaded: LoadedModel, checkpoint: Path
) -> None:
    quantized = outputs_and_input_gradient(loaded.base)
    expected = outputs_and_input_gradient(dequantized(checkpoint, loaded))
    assert torch.equal(quantized[0], expected[0])
    assert torch.equal(quantized[1], expected[1])
    assert quantized[1].abs().max() > 0
    assert all(len(chain) == 1 for chain in parametrized(loaded.base).values())


def outputs_and_input_gradient(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model.eval()
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    outputs = model(inputs_embeds=embedded, use_cache=False).logits
    outputs.square().sum().backward()
    assert embedded.grad is not None
    return outputs.detach(), embedded.grad


# ---- how it is stored


def test_int8_of_experts_is_refused_with_the_bytes_it_would_leave_unquantized(
    checkpoint: Path, loaded: LoadedModel
) -> None:
    message = refused(checkpoint, ModelError, quantization__method="int8")
    num_bytes = 2 * sum(e.num_parameters for e in loaded.inventory.entries if e.name in loaded.layout.experts)
    assert f"can't store fused experts: {format_bytes(num_bytes)} of " in message
    assert "quantization.skip_modules=experts" in message
    assert "--quant nf4" in message


def test_int8_with_experts_skipped_on_purpose(qwen3_moe: Path) -> None:
    loaded = load(qwen3_moe, quantization__method="int8", quantization__skip_modules="experts")
    experts = {entry for entry in loaded.inventory.entries if entry.kind == "experts"}
    assert {(entry.why_not, entry.dtype) for entry in experts} == {("as asked", "float32")}
    quantized = [entry for entry in loaded.inventory.entries if entry.is_quantized]
    assert {entry.dtype for entry in quantized} == {"int8"}
    assert len(quantized) == 2 * 4  # q, k, v and o of two layers
    assert {entry.name: entry for entry in loaded.layout.inventory.entries} == {
        entry.name: entry for entry in loaded.inventory.entries
    }


def test_experts_can_be_skipped_in_4_bit_too(qwen3_moe: Path) -> None:
    loaded = load(qwen3_moe, quantization__skip_modules="experts")
    assert not parametrized(loaded.base)
    assert {e.why_not for e in loaded.inventory.entries if e.kind == "experts"} == {"as asked"}
    assert loaded.inventory.num_quantized_parameters > 0
    assert torch.equal(logits(loaded.base, IDS), logits(dequantized(qwen3_moe, loaded), IDS))


# ---- saved


def test_a_saved_model_loads_again_to_the_same_logits_and_bytes(loaded: LoadedModel, tmp_path: Path) -> None:
    written = save_quantized(loaded, tmp_path / "saved", SilentReporter())
    assert loaded.inventory.total_bytes < written < loaded.inventory.float32_bytes
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again.base, IDS), logits(loaded.base, IDS))
    counted = {entry.name: entry for entry in again.inventory.entries}
    assert {name: (e.num_parameters, e.weight_bytes, e.dtype) for name, e in counted.items()} == {
        entry.name: (entry.num_parameters, entry.weight_bytes, entry.dtype) for entry in loaded.inventory.entries
    }
    assert again.inventory.total_bytes == loaded.inventory.total_bytes
    assert counted == {entry.name: entry for entry in again.layout.inventory.entries}


LOAD_BY_TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:  # the last of them ends it with the error
    print("loaded", type(AutoModelForCausalLM.from_pretrained(path)).__name__, flush=True)
"""


def test_plain_transformers_refuses_a_saved_model_rather_than_load_half_of_it(
    plain_python: PlainPython, qwen3_moe: Path, tmp_path: Path
) -> None:
    save_quantized(load(qwen3_moe), tmp_path / "saved", SilentReporter())
    outcome = plain_python(LOAD_BY_TRANSFORMERS, qwen3_moe, tmp_path / "saved")
    assert outcome.stdout == "loaded Qwen3MoeForCausalLM\n"
    assert outcome.returncode != 0
    assert "got qlora" in outcome.stderr


def test_every_family_here_has_its_experts_stacked() -> None:
    """Otherwise these tests would prove nothing: each expert would be modules of its own."""
    for name in MOE:
        model = tiny_model(name)
        stacked = [n for n, p in model.named_parameters() if ".experts." in n and p.dim() >= 2 and "bias" not in n]
        assert stacked, name  # shared experts differ: every token passes through them, and they are linear layers
        assert not any(isinstance(model.get_submodule(n.rpartition(".")[0]), torch.nn.Linear) for n in stacked)
