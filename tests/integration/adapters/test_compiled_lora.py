"""Layers with an adapter in compiled code: there, too, each is one step, with the results of uncompiled code."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from qlora_cli.adapters.fused_lora import fused_layers, switch_fused
from qlora_cli.training.compiled_layers import CompiledLayers
from tests.support.models.adapters import adapt, settings_of, train_steps
from tests.support.models.four_bit_lora import (
    FUSED,
    RANK,
    WIDTH_OUT,
    error,
    exact_passes,
    one_layer,
    passes,
    rows_of,
)
from tests.support.models.loading import save_model
from tests.support.models.reference_models import IDS, ROWS

GRADIENT = "qlora::four_bit_gradient"
PLAIN = "qlora::linear_product"
# Captures, differentiates and divides as inductor does, but generates no C++, which would take minutes.
BACKEND = "aot_eager_decomp_partition"

pytestmark = pytest.mark.filterwarnings("default")  # the compiler has warnings of its own


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    # Commands that compile nothing disable the compiler for their process, which may be that of the tests.
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr("qlora_cli.training.compiled_layers.BACKEND", BACKEND)
    torch.compiler.reset()
    counters.clear()
    clear_compilation_metrics()


def calls(function: Callable[[], Any]) -> Counter[str]:
    """Return how often each operator is called; a dispatch mode would keep compiled code from running."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        function()
    return Counter(event.name for event in profiled.events())


def compiled_layer(dtype: torch.dtype = torch.float32, **kind: Any) -> Any:
    layer = one_layer(dtype, **kind)
    layer.compile(backend=BACKEND, fullgraph=True, dynamic=True)
    return layer


@pytest.mark.parametrize("kind", [{}, {"nested": False, "has_bias": True, "lora_alpha": RANK}], ids=str)
def test_in_fp32_results_and_gradients_are_exact_but_for_rounding(kind: dict[str, Any]) -> None:
    layer = compiled_layer(**kind)
    rows = rows_of(3, 7)
    actual, expected = passes(layer, rows), exact_passes(layer, rows)
    expected.pop("bias", None)  # it is frozen
    assert actual.keys() == expected.keys()
    assert max(error(actual[name], expected[name]) for name in expected) < 1e-6
    counts = calls(lambda: passes(layer, rows))
    assert (counts[FUSED], counts[GRADIENT]) == (1, 1)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_in_bf16_nothing_is_farther_from_the_truth_than_by_peft(x_dtype: torch.dtype) -> None:
    layer = compiled_layer(torch.bfloat16)
    rows = rows_of(5, 32, dtype=x_dtype)
    expected = exact_passes(layer, rows)
    actual = passes(layer, rows, autocast=torch.bfloat16)
    assert actual["result"].dtype == actual["x"].dtype == x_dtype
    assert actual["A"].dtype == actual["B"].dtype == torch.float32
    uncompiled = one_layer(torch.bfloat16)
    switch_fused(uncompiled, enabled=False)
    by_peft = passes(uncompiled, rows, autocast=torch.bfloat16)
    for name, exact in expected.items():
        assert error(actual[name], exact) <= error(by_peft[name], exact) * 1.02, name


@pytest.mark.parametrize("trained", [{"A", "B"}, {"x"}], ids=["adapter", "input"])
def test_only_what_is_trained_gets_a_gradient(trained: set[str]) -> None:
    layer = compiled_layer(has_bias=True)
    rows = rows_of(3)
    expected = exact_passes(layer, rows)
    tensors = {"x": rows, "A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    weights = torch.randn(3, WIDTH_OUT, generator=torch.Generator().manual_seed(2))
    (layer(rows) * weights).sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == trained
    assert all(error(tensors[name].grad, expected[name]) < 1e-6 for name in trained)


def test_a_trained_bias_gets_its_gradient() -> None:
    layer = compiled_layer(has_bias=True)
    layer.base_layer.bias.requires_grad_(True)
    rows = rows_of(3, 5)
    actual, expected = passes(layer, rows), exact_passes(layer, rows)
    assert error(actual["bias"], expected["bias"]) < 1e-6


def test_layers_of_several_scales_compute_with_their_own() -> None:
    layers = [compiled_layer(lora_alpha=alpha) for alpha in (24, 4)]
    rows = rows_of(3)
    for layer in layers:
        actual, expected = passes(layer, rows), exact_passes(layer, rows)
        assert max(error(actual[name], expected[name]) for name in expected) < 1e-6
    assert 1 < counters["stats"]["unique_graphs"] <= len(layers)


@pytest.mark.parametrize("config", [{"lora_dropout": 0.5}, {"use_dora": True}], ids=str)
def test_what_it_does_not_compute_is_compiled_as_pefts(config: dict[str, Any]) -> None:
    layer = one_layer(**config)
    layer.compile(backend="eager", dynamic=True)  # draws the same random numbers
    rows = rows_of(3)
    torch.manual_seed(0)
    actual = passes(layer, rows)
    assert counters["stats"]["unique_graphs"] >= 1
    layer.compile(disable=True)
    torch.manual_seed(0)
    expected = passes(layer, rows)
    assert max(error(actual[name], expected[name].double()) for name in expected) < 1e-6
    counts = calls(lambda: passes(layer, rows))
    assert (counts[FUSED], counts[GRADIENT]) == (0, 0)


def adapted(directory: Path, quantization: str) -> PeftModel:
    """Return a tiny Llama with an adapter whose matrices are not zero: on all layers in NF4, and otherwise on two."""
    checkpoint = save_model(directory, "llama", vocab_size=ROWS)
    chosen = {} if quantization == "nf4" else {"target_modules": ("q_proj", "down_proj")}
    model = adapt(checkpoint, settings_of(**chosen), quantization__method=quantization, model__dtype="fp32")
    train_steps(model, 1)
    return model


@contextmanager
def compiled(model: PeftModel) -> Iterator[None]:
    layers = CompiledLayers(model, has_one_length=False)
    try:
        yield
    finally:
        layers.remove()


def saved_bytes(model: PeftModel) -> int:
    """Return the bytes that a forward pass in training keeps for the backward pass, without weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = 0 if storage.data_ptr() in weights else storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=IDS, use_cache=False)
    del output
    return sum(saved.values())


def model_passes(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the logits and the gradients of the adapter in training."""
    model.train()
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_all_layers_of_a_model_share_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    """Except in 8 bit each layer with an adapter is one step in it; it keeps no more than uncompiled code."""
    is_fused = quantization != "int8"
    monkeypatch.setattr("qlora_cli.training.compiled_layers.BACKEND", BACKEND if is_fused else "eager")
    model = adapted(tmp_path, quantization)
    expected, expected_bytes = model_passes(model), saved_bytes(model)
    with compiled(model):
        actual = model_passes(model)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        assert [len(capture.restart_reasons or ()) for capture in get_compilation_metrics()] == [0]
        assert actual.keys() == expected.keys()
        assert max(error(actual[name], expected[name].double()) for name in expected) < 3e-6
        counts = calls(lambda: model_passes(model))
        num_layers = sum(1 for _ in fused_layers(model))
        assert (num_layers > 0) == is_fused
        assert counts[FUSED] == counts[GRADIENT] == (num_layers if quantization == "nf4" else 0)
        assert counts[PLAIN] == (num_layers if quantization == "none" else 0)
        if is_fused:
            assert 0 < saved_bytes(model) <= expected_bytes
