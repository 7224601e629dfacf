"""Attention by blocks gives what the model's own attention gives, and no tensor has all scores."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from qlora_cli.attention import blockwise
from qlora_cli.attention.blockwise import blockwise_attention, mask_by_block, register_blockwise
from tests.support.models.tiny_models import COMMON, EXPERTS, VOCABULARY_SIZE

# The causal language models of transformers that know flex attention, whose mask is no tensor either, and not SDPA.
FAMILIES = ("flint", "gemma2", "gpt_oss", "granite_swa", "granitemoe_swa", "vaultgemma")
LENGTH, WINDOW = 200, 40
KINDS = ("plain", "padded on the right", "padded on the left", "packed")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide even the attention of tiny models."""
    register_blockwise()
    monkeypatch.setattr(blockwise, "MAX_SCORES", 2**12)
    monkeypatch.setattr(blockwise, "MIN_ROWS", 16)
    monkeypatch.setattr(blockwise, "WINDOW_ROWS", 16)


@cache
def model_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model with a layer that sees everything and one with a sliding window, where the family has them."""
    torch.manual_seed(0)
    values = {
        **COMMON,
        **EXPERTS,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": 512,
    }
    config = AutoConfig.for_model(family, **{**values, "intermediate_size": 64})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(parameter)
    return model


def batch(kind: str, num_rows: int = 2, length: int = LENGTH) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the arguments of a forward pass, and which of their tokens count."""
    torch.manual_seed(1)
    if kind == "packed":
        ends = (length // 4, length // 3)
        positions = torch.cat([torch.arange(one) for one in (*ends, length - sum(ends))])[None]
        ids = torch.randint(3, VOCABULARY_SIZE, positions.shape)
        return {"input_ids": ids, "position_ids": positions}, torch.ones_like(ids, dtype=torch.bool)
    ids = torch.randint(3, VOCABULARY_SIZE, (num_rows, length))
    if kind == "plain":
        return {"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool)
    mask = torch.ones_like(ids)
    if kind == "padded on the right":
        mask[1, length - length // 3 :] = 0
    else:
        mask[1, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask}, mask.bool()


def run(
    model: PreTrainedModel, attention: str, inputs: dict[str, torch.Tensor], counts: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits of the tokens that count, and the gradient of each weight."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits[counts]
    logits.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the root mean square of the difference, relative to that of `theirs`."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_models_own_attention(family: str, kind: str) -> None:
    model, (inputs, counts) = model_of(family), batch(kind)
    expected, expected_gradients = run(model, "eager", inputs, counts)
    logits, gradients = run(model, "blockwise", inputs, counts)
    assert distance(logits, expected) < 1e-6
    assert gradients.keys() == expected_gradients.keys()
    assert family.startswith(("gemma", "vault")) or any(name.endswith("sinks") for name in gradients)
    assert distance(flat(gradients), flat(expected_gradients)) < 1e-6
    for name, gradient in gradients.items():  # the terms of some sums, such as those of sinks, nearly cancel
        assert distance(gradient, expected_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 129])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_any_length_can_be_divided(family: str, length: int) -> None:
    model, (inputs, counts) = model_of(family), batch("plain", length=length)
    expected, expected_gradients = run(model, "eager", inputs, counts)
    logits, gradients = run(model, "blockwise", inputs, counts)
    assert distance(logits, expected) < 1e-6
    assert distance(flat(gradients), flat(expected_gradients)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_gradients_are_no_further_from_the_exact_ones_than_those_of_the_models_own_attention(
    family: str,
) -> None:
    """Keys and values collect gradients from every block, which may not add up rounding."""
    model, (inputs, counts) = model_of(family, torch.bfloat16), batch("plain")
    exact = model_of(family)
    exact.load_state_dict(model.state_dict())
    _, reference = run(exact, "eager", inputs, counts)
    model_of.cache_clear()
    _, expected = run(model, "eager", inputs, counts)
    _, gradients = run(model, "blockwise", inputs, counts)
    for name in (name for name in gradients if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))):
        ours, theirs = distance(gradients[name], reference[name]), distance(expected[name], reference[name])
        assert ours < 1.1 * theirs + 1e-3, name


def test_dropped_weights_are_dropped_in_the_backward_pass_too() -> None:
    """Numerically: the gradient belongs to the function with the random numbers of its forward pass."""
    layer: Any = model_of("gpt_oss").get_submodule("model.layers.1.self_attn").double().train()
    sizes = [(1, heads, 48, 4) for heads in (4, 2, 2)]
    torch.manual_seed(0)
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    mask = mask_by_block(
        q_length=48, kv_length=48, batch_size=1, mask_function=causal_mask_function, dtype=torch.float64
    )

    def attend(*tensors: torch.Tensor, dropout: float = 0.3) -> torch.Tensor:
        torch.manual_seed(2)
        query, key, value = tensors
        return blockwise_attention(layer, query, key, value, mask, scaling=0.5, dropout=dropout)[0]

    try:
        assert not torch.allclose(attend(*inputs), attend(*inputs, dropout=0.0))
        assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)
        result = attend(*inputs)
        drawn = torch.get_rng_state()
        torch.autograd.grad(result.sum(), inputs)
        assert torch.equal(torch.get_rng_state(), drawn)  # what comes next is not drawn again
    finally:
        layer.float().eval()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of PyTorch's compiler
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_compiled_model_computes_the_same(family: str) -> None:
    """Its graphs are made, and run by PyTorch as they are: with `training.torch_compile` they become kernels."""
    model, (inputs, counts) = model_of(family), batch("padded on the right", length=70)
    expected, expected_gradients = run(model, "blockwise", inputs, counts)
    model.zero_grad()
    logits = torch.compile(model, backend="eager")(**inputs, use_cache=False).logits[counts]
    torch.autograd.backward(logits.square().mean())
    assert distance(logits.detach(), expected) < 1e-6
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or name not in expected_gradients
        if parameter.grad is not None:
            assert distance(parameter.grad, expected_gradients[name]) < 1e-5, name


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the number of elements of the largest result of an operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_iter(result) if isinstance(tensor, torch.Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


@pytest.mark.parametrize("kind", ["plain", "padded on the right", "packed"])
def test_no_tensor_grows_with_the_square_of_the_length(kind: str) -> None:
    model = model_of("gpt_oss")
    largest: dict[str, list[int]] = {"eager": [], "blockwise": []}
    for length in (256, 512):
        for attention, sizes in largest.items():
            inputs, counts = batch(kind, length=length)
            with LargestTensor() as recorded:
                run(model, attention, inputs, counts)
            sizes.append(recorded.num_elements)
    assert largest["eager"][1] > 3.9 * largest["eager"][0]
    assert largest["blockwise"][1] <= 2 * largest["blockwise"][0]


def test_keys_before_a_window_and_after_the_block_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt_oss")
    modeling = sys.modules[type(model).__module__]
    own = modeling.eager_attention_forward
    seen: dict[str, list[tuple[int, int]]] = {"sliding_attention": [], "full_attention": []}

    def record(layer: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen[model.config.layer_types[layer.layer_idx]].append((query.shape[2], key.shape[2]))
        return own(layer, query, key, *args, **options)

    monkeypatch.setattr(modeling, "eager_attention_forward", record)
    model.set_attn_implementation("blockwise")
    with torch.no_grad():
        model(input_ids=batch("plain", num_rows=1)[0]["input_ids"], use_cache=False)
    for blocks in seen.values():
        assert sum(rows for rows, _ in blocks) == LENGTH
        assert len(blocks) > 3
    assert all(keys <= rows + WINDOW - 1 for rows, keys in seen["sliding_attention"])
    num_before = 0
    for rows, keys in seen["full_attention"]:
        assert keys == num_before + rows
        num_before += rows


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_answers_with_a_cache_are_the_same(family: str) -> None:
    """A query then follows keys that were computed before, and a window has dropped the first of them."""
    model: Any = model_of(family)
    inputs, _ = batch("padded on the left", length=90)
    answers = []
    for attention in ("eager", "blockwise"):
        model.set_attn_implementation(attention)
        answers.append(model.generate(**inputs, max_new_tokens=8, do_sample=False))
    assert torch.equal(*answers)


def test_every_causal_model_that_computes_by_blocks_is_compared() -> None:
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    texts = {file.parent.name: file.read_text(encoding="utf-8") for file in files}
    found = {
        name
        for name, text in texts.items()
        if "_supports_flex_attn = True" in text and "_supports_sdpa = True" not in text and "ForCausalLM(" in text
    }
    assert found == set(FAMILIES)
    # No mask lets a token see later ones, so that keys after a block may be left out.
    for name in found:
        assert "block_sequence_ids" not in texts[name]
        assert "or_mask_function" not in texts[name]
