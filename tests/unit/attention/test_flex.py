"""Flex attention, by its own definition on a CPU, gives what the models' own attention gives.

PyTorch has no kernel with a backward pass for a CPU. Results are those of PyTorch's own flex attention; gradients are
those of its definition, written with PyTorch's operations, which is proven equal to it.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import AuxOutput, BlockMask, create_block_mask, flex_attention
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function

from qlora_cli.attention import flex
from qlora_cli.attention.flex import FLEX, attend, block_mask, register_flex, with_sinks
from qlora_cli.errors import ModelError
from tests.support.models.tiny_models import tiny_model
from tests.unit.attention.test_blockwise import FAMILIES, KINDS, batch, distance, flat, model_of, run

OTHERS = ("llama", "mistral", "qwen3", "gemma3_text", "qwen3_moe", "gpt_neox", "llama4_text")


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    score_mod: Any,
    block_mask: BlockMask,
    scale: float | None,
    enable_gqa: bool,
    return_aux: Any,
) -> tuple[torch.Tensor, AuxOutput]:
    """Return flex attention by its definition, with all scores, and the logarithms of their sums of exponentials."""
    assert return_aux.lse
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    at = torch.meshgrid(*(torch.arange(size) for size in scores.shape), indexing="ij")
    if score_mod is not None:
        scores = score_mod(scores, *at)
    scores = scores.float().masked_fill(~block_mask.mask_mod(*at), -torch.inf)
    is_empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    weights = torch.where(is_empty, 0.0, torch.softmax(scores.masked_fill(is_empty, 0.0), dim=-1))
    return weights.to(value.dtype) @ value, AuxOutput(lse=torch.logsumexp(scores, dim=-1))


def uncompiled(*args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that scores are stored without a compiler
        return flex_attention(*args, **kwargs)


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    register_flex()
    monkeypatch.setattr(flex, "kernel", lambda: dense)
    monkeypatch.setattr(flex, "blocks_of", lambda: create_block_mask)


def tiny(family: str) -> PreTrainedModel:
    return model_of(family) if family in FAMILIES else tiny_model(family, max_position_embeddings=512)


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    yield
    model.set_attn_implementation(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_logits_and_gradients_are_those_of_the_models_own_attention(family: str, kind: str) -> None:
    model, (inputs, counts) = tiny(family), batch(kind)
    expected, expected_gradients = run(model, "eager", inputs, counts)
    logits, gradients = run(model, FLEX, inputs, counts)
    assert distance(logits, expected) < 1e-6
    assert gradients.keys() == expected_gradients.keys()
    assert distance(flat(gradients), flat(expected_gradients)) < 1e-6
    for name, gradient in gradients.items():  # the terms of some sums, such as those of sinks, nearly cancel
        assert distance(gradient, expected_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama"])
def test_logits_are_those_of_pytorchs_own_flex_attention(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (inputs, counts) = tiny(family), batch(kind)
    with attention(model, FLEX), torch.no_grad():
        expected = model(**inputs, use_cache=False).logits[counts]
        monkeypatch.setattr(flex, "kernel", lambda: uncompiled)
        logits = model(**inputs, use_cache=False).logits[counts]
    assert distance(logits, expected) < 1e-6


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
def test_any_length_is_divided_into_blocks(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "kernel", lambda: uncompiled)
    model, (inputs, counts) = tiny("gpt_oss"), batch("plain", length=length)
    with torch.no_grad():
        logits = {}
        for name in ("eager", FLEX):
            with attention(model, name):
                logits[name] = model(**inputs, use_cache=False).logits[counts]
    assert distance(logits[FLEX], logits["eager"]) < 1e-6


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_a_text_is_generated_as_by_the_models_own_attention(family: str) -> None:
    model: Any = tiny(family)
    prompt = torch.randint(3, 100, (1, 50), generator=torch.Generator().manual_seed(0))
    texts = []
    for name in ("eager", FLEX):
        with attention(model, name):
            texts.append(model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False))
    assert torch.equal(*texts)


def test_sinks_are_added_in_fp32() -> None:
    """Rounded to bf16, sums of exponentials of long rows would be off by percents."""
    torch.manual_seed(0)
    lse, sinks = torch.randn(2, 4, 50) + 7, torch.randn(4).to(torch.bfloat16)
    result = torch.ones(2, 4, 50, 8, dtype=torch.bfloat16)
    sums = lse.double().exp()
    exact = sums / (sums + sinks.double().exp()[None, :, None])
    ours = with_sinks(result, lse, sinks)
    assert torch.equal(ours, exact[..., None].expand_as(result).to(torch.bfloat16))
    assert float(with_sinks(result, torch.full_like(lse, -torch.inf), sinks).abs().max()) == 0


class Layer(nn.Module):
    """Stands for a layer of attention."""


def inputs() -> tuple[Any, BlockMask]:
    mask = block_mask(batch_size=1, q_length=20, kv_length=20, mask_function=causal_mask_function)
    return [torch.randn(1, heads, 20, 16) for heads in (4, 2, 2)], mask


def test_under_autocast_all_are_computed_in_its_dtype() -> None:
    (query, key, value), mask = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = attend(Layer(), query, key.to(torch.bfloat16), value, mask)
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"position_bias": torch.zeros(1)}, "the options position_bias"),
        ({"temperature": 0.5}, "the options temperature"),
    ],
)
def test_what_is_not_computed_is_an_error(options: dict[str, Any], fault: str) -> None:
    (query, key, value), mask = inputs()
    with pytest.raises(ModelError, match=f"Layer computes attention with {fault}, which flex_attention does not"):
        attend(Layer(), query, key, value, mask, **options)


def test_a_mask_that_is_a_tensor_is_an_error() -> None:
    (query, key, value), _ = inputs()
    for mask in (None, torch.zeros(1, 1, 20, 20)):
        with pytest.raises(ModelError, match="a mask of its own"):
            attend(Layer(), query, key, value, mask)


def test_what_says_how_to_return_the_result_is_no_error() -> None:
    (query, key, value), mask = inputs()
    expected, _ = attend(Layer(), query, key, value, mask)
    options: dict[str, Any] = {"output_attentions": False, "sliding_window": 4, "position_ids": torch.arange(20)}
    result, _ = attend(Layer().eval(), query, key, value, mask, dropout=0.1, **options)
    assert torch.equal(result, expected)
