"""Attention on a GPU: PyTorch chooses the kernels that our rules say, and our own attention is right and small."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its conventional name
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_cli.attention import blockwise, flex
from qlora_cli.attention.expanded_heads import expanded_sdpa
from qlora_cli.attention.sdpa_rules import choose_backend
from qlora_cli.hardware.cudnn import without_cudnn_attention
from qlora_cli.settings.choices import SdpaBackend
from qlora_cli.settings.models import TrainingSettings
from qlora_cli.training.determinism import determinism
from tests.support.models.tiny_models import tiny_model
from tests.unit.attention.test_blockwise import KINDS, batch, distance, flat, model_of, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

CUDA = torch.device("cuda")
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
WIDTHS = (16, 18, 20, 64, 128, 192, 200, 224, 232, 256, 264)


def tensors(dtype: torch.dtype, kv_heads: int, width: int, *, length: int = 32, trains: bool = True) -> list[Any]:
    return [
        torch.randn(2, heads, length, width, dtype=dtype, device=CUDA, requires_grad=trains)
        for heads in (4, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("dtype", [HALF, BF16, FP32])
def test_pytorch_chooses_the_kernel_that_the_rules_say(dtype: torch.dtype) -> None:
    capability = torch.cuda.get_device_capability()
    for width, kv_heads, has_mask, trains, dropout in product(
        WIDTHS, (4, 2), (False, True), (False, True), (0.0, 0.1)
    ):
        query, key, value = tensors(dtype, kv_heads, width, trains=trains)
        mask = torch.ones(2, 1, 32, 32, dtype=torch.bool, device=CUDA).tril() if has_mask else None
        asked = torch.backends.cuda.SDPAParams(query, key, value, mask, dropout, not has_mask, kv_heads != 4)
        expected = SdpaBackend.MATH
        if torch.backends.cuda.can_use_flash_attention(asked):
            expected = SdpaBackend.FLASH
        elif torch.backends.cuda.can_use_efficient_attention(asked):
            expected = SdpaBackend.EFFICIENT
        chosen = choose_backend(
            query,
            key,
            value,
            has_mask=has_mask,
            enable_gqa=kv_heads != 4,
            capability=capability,
            dropout=dropout,
        )
        assert chosen == expected, (width, kv_heads, has_mask, trains, dropout)


@pytest.mark.parametrize("width", [64, 128, 200, 208, 224, 256])
def test_every_kernel_that_is_chosen_has_a_backward_pass(width: int) -> None:
    with without_cudnn_attention():
        query, key, value = tensors(HALF, 4, width)
        result = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.backward(result.sum())
    assert all(torch.isfinite(tensor.grad).all() for tensor in (query, key, value))


class Layer(torch.nn.Module):
    num_key_value_groups, is_causal = 2, True


@pytest.mark.parametrize("length", [7, 64, 333])
@pytest.mark.parametrize("dtype", [HALF, FP32])
def test_expanded_heads_give_what_shared_ones_do(dtype: torch.dtype, length: int) -> None:
    torch.manual_seed(0)
    inputs = tensors(dtype, 2, 64, length=length)
    query, key, value = inputs
    functions: list[Any] = [expanded_sdpa, sdpa_attention_forward]
    results = [function(Layer(), query, key, value, None, scaling=0.125)[0] for function in functions]
    gradients = [torch.autograd.grad(result.float().square().sum(), inputs) for result in results]
    tolerance = {HALF: 1e-2, FP32: 1e-4}[dtype]
    for ours, theirs in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("attention", ["blockwise", flex.FLEX])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("autocasts", [False, True])
def test_attention_without_scores_gives_what_the_models_own_does_in_less_memory(
    family: str, autocasts: bool, attention: str
) -> None:
    blockwise.register_blockwise()
    flex.register_flex()
    model: Any = tiny_model(family, num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=8192)
    model.to(CUDA, FP32 if autocasts else BF16)
    ids = torch.randint(3, 128, (1, 4096), device=CUDA)
    peaks, results = [], []
    for name in ("eager", attention):
        model.set_attn_implementation(name)
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", BF16, enabled=autocasts):
            logits = model(input_ids=ids, use_cache=False).logits
        torch.autograd.backward(logits.float().square().mean())
        peaks.append(torch.cuda.max_memory_allocated())
        results.append((logits.detach().float(), {name: p.grad.float() for name, p in model.named_parameters()}))
    (expected, expected_gradients), (logits, gradients) = results
    assert float((logits - expected).norm() / expected.norm()) < 0.02
    for name in (name for name in gradients if "_proj" in name and "self_attn" in name):
        distance = (gradients[name] - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert float(distance) < 0.05, name
    assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama"])
def test_flex_attention_gives_what_the_models_own_does(family: str, kind: str, checkpoints: bool) -> None:
    flex.register_flex()
    model: Any = tiny_model(family, max_position_embeddings=512) if family == "llama" else model_of(family)
    model.to(CUDA)
    model.train()
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs, counts = batch(kind)
    inputs = {name: tensor.to(CUDA) for name, tensor in inputs.items()}
    expected, expected_gradients = run(model, "eager", inputs, counts.to(CUDA))
    logits, gradients = run(model, flex.FLEX, inputs, counts.to(CUDA))
    model.gradient_checkpointing_disable()
    assert distance(logits, expected) < 1e-3  # its products may round to TF32
    assert distance(flat(gradients), flat(expected_gradients)) < 5e-3


def test_flex_attention_has_few_kernels_for_rows_of_all_lengths() -> None:
    flex.register_flex()
    torch.compiler.reset()
    counts = CompileCounterWithBackend("inductor")
    model: Any = tiny_model("gemma2", num_attention_heads=4, max_position_embeddings=4096)
    model.to(CUDA, BF16)
    model.set_attn_implementation(flex.FLEX)
    with pytest.MonkeyPatch.context() as patch:
        limit: Any = {"recompile_limit": flex.MAX_KERNELS}
        compiled: Any = torch.compile(flex_attention, fullgraph=True, backend=counts, **limit)
        patch.setattr(flex, "kernel", lambda: compiled)
        for length in range(100, 2000, 90):
            for num_rows in (1, 2):
                ids = torch.randint(3, 128, (num_rows, length), device=CUDA)
                torch.autograd.backward(model(input_ids=ids, use_cache=False).logits.float().square().mean())
                with torch.no_grad():
                    model(input_ids=ids, use_cache=False)
    assert counts.frame_count <= 32


def test_after_a_deterministic_run_cublas_has_workspaces_of_the_usual_size_again() -> None:
    matrix = torch.randn(256, 256, device=CUDA)

    def bytes_held() -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.mm(matrix, matrix)
        return torch.cuda.memory_allocated() - before

    bytes_held()
    assert bytes_held() == 0  # the workspace is there
    with determinism(TrainingSettings(full_determinism=True)):
        assert bytes_held() == 16 * 8 * 1024
        assert bytes_held() == 0
    assert bytes_held() >= 8 * 1024**2
