"""A layer, in 4 bit or not, and its adapter in one step: the results and gradients of PEFT's own layers, for less."""

import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear8bitLt
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from qlora_cli.adapters.adapter import attach_from_config
from qlora_cli.adapters.checkpointing import enable_checkpointing
from qlora_cli.adapters.fused_lora import FusedLoraLayer, fused_layers, fused_types, switch_fused
from qlora_cli.adapters.writer import save_adapter
from qlora_cli.settings.choices import Checkpointing
from tests.support.models.adapters import adapt, settings_of, train_steps
from tests.support.models.four_bit_lora import (
    DEQUANTIZE,
    FUSED,
    GEMM,
    RANK,
    UNQUANTIZED,
    WIDTH_IN,
    WIDTH_OUT,
    CountOperations,
    NewStorages,
    counted,
    error,
    exact_passes,
    one_layer,
    passes,
    rows_of,
)
from tests.support.models.loading import load, save_model
from tests.support.models.reference_models import IDS, ROWS

FAMILIES = ("llama", "gpt2", "qwen2", "gemma2", "qwen3_moe")


KINDS: list[dict[str, Any]] = [
    {},
    {"quant_type": "fp4"},
    {"nested": False},
    {"has_bias": True},
    {"use_rslora": True},
    {"lora_alpha": RANK},  # a scale of 1
    {"storage": torch.bfloat16},
    {"quant_type": "none"},
    {"quant_type": "none", "has_bias": True},
    {"quant_type": "none", "lora_alpha": RANK},
    {"quant_type": "conv1d"},
    {"quant_type": "conv1d", "lora_alpha": RANK},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_in_fp32_results_and_gradients_are_exact_but_for_rounding(kind: dict[str, Any]) -> None:
    layer = one_layer(**kind)
    rows = rows_of(3, 7)
    actual, expected = passes(layer, rows), exact_passes(layer, rows)
    assert counted(lambda: layer(rows))[layer.fused_product.operator] == 1
    expected.pop("bias", None)  # it is frozen
    assert actual.keys() == expected.keys()
    assert all(actual[name].shape == expected[name].shape for name in expected)
    assert max(error(actual[name], expected[name]) for name in expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_in_bf16_nothing_is_farther_from_the_truth_than_by_peft(kind: dict[str, Any], x_dtype: torch.dtype) -> None:
    layer = one_layer(torch.bfloat16, **kind)
    rows = rows_of(5, 32, dtype=x_dtype)
    expected = exact_passes(layer, rows)
    expected.pop("bias", None)
    errors = {}
    for is_fused in (True, False):
        switch_fused(layer, enabled=is_fused)
        actual = passes(layer, rows, autocast=torch.bfloat16)
        assert actual["x"].dtype == x_dtype
        # Autocast leaves the result of a plain layer in bf16; a 4-bit one returns the dtype that it is given.
        assert actual["result"].dtype == (torch.bfloat16 if kind.get("quant_type") in UNQUANTIZED else x_dtype)
        assert actual["A"].dtype == actual["B"].dtype == torch.float32
        errors[is_fused] = {name: error(actual[name], expected[name]) for name in expected}
    for name, by_peft in errors[False].items():
        assert errors[True][name] <= by_peft * 1.02, name  # the roundings are others, by chance a little larger
    assert errors[True] != errors[False]


@given(st.lists(st.integers(1, 4), max_size=3), st.booleans(), st.sampled_from(("nf4", "none", "conv1d")))
def test_rows_of_any_shape(shape: list[int], is_transposed: bool, quant_type: str) -> None:
    layer = one_layer(quant_type=quant_type)
    rows = rows_of(*shape)
    if is_transposed and len(shape) > 1:
        rows = rows.detach().transpose(0, 1).requires_grad_()
    actual, expected = passes(layer, rows), exact_passes(layer, rows)
    expected.pop("bias", None)
    assert {name: value.shape for name, value in actual.items()} == {n: v.shape for n, v in expected.items()}
    assert max(error(actual[name], expected[name]) for name in expected) < 1e-6


@pytest.mark.parametrize("trained", [{"x", "A", "B"}, {"A", "B"}, {"x", "A"}, {"x", "B"}, {"A"}, {"B"}, {"x"}])
@pytest.mark.parametrize("quant_type", ["nf4", "none", "conv1d"])
def test_only_what_is_trained_gets_a_gradient(trained: set[str], quant_type: str) -> None:
    layer = one_layer(quant_type=quant_type)
    rows = rows_of(3)
    tensors = {"x": rows, "A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    expected = passes(layer, rows)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
        tensor.grad = None
    weights = torch.randn(3, WIDTH_OUT, generator=torch.Generator().manual_seed(2))
    (layer(rows) * weights).sum().backward()
    for name, tensor in tensors.items():
        if name not in trained:
            assert tensor.grad is None
        else:
            assert tensor.grad is not None
            assert error(tensor.grad, expected[name].double()) < 1e-6


@pytest.mark.parametrize("quant_type", ["nf4", "none", "conv1d"])
def test_a_trained_bias_gets_its_gradient(quant_type: str) -> None:
    layer = one_layer(has_bias=True, quant_type=quant_type)
    layer.base_layer.bias.requires_grad_(True)
    rows = rows_of(3, 5)
    actual, expected = passes(layer, rows), exact_passes(layer, rows)
    assert error(actual["bias"], expected["bias"]) < 1e-6


def test_a_trained_bias_gets_its_gradient_from_one_row_without_a_batch() -> None:
    layer = one_layer(has_bias=True)
    layer.base_layer.bias.requires_grad_(True)
    rows = rows_of()
    actual, expected = passes(layer, rows), exact_passes(layer, rows)
    assert max(error(actual[name], expected[name]) for name in expected) < 1e-6


@pytest.mark.parametrize("wanted", ["A", "B", "x", "A B", "A B x"])
def test_a_backward_pass_leaves_nothing_in_its_graph(wanted: str) -> None:
    """Also where only some gradients are asked for, and the node of A does not run."""
    layer = one_layer(torch.bfloat16)
    rows = rows_of(3)
    tensors = {"x": rows, "A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(rows).sum()
    with NewStorages() as storages:
        torch.autograd.grad(result, [tensors[name] for name in wanted.split()], retain_graph=True)
    assert storages.num_seen > 3
    assert storages.num_alive == 0


def test_a_layer_that_is_called_twice_sums_its_gradients() -> None:
    layer = one_layer()
    gradients = []
    for is_fused in (True, False):
        switch_fused(layer, enabled=is_fused)
        layer.zero_grad()
        rows = rows_of(3)
        (layer(rows) + 2 * layer(rows * 3)).sum().backward()
        gradients.append([rows.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad])
    assert all(error(fused, by_peft.double()) < 1e-6 for fused, by_peft in zip(*gradients, strict=True))


def test_a_second_backward_pass_is_refused_unless_the_graph_is_retained() -> None:
    layer = one_layer()
    result = layer(rows_of(3)).sum()
    result.backward(retain_graph=True)
    once = layer.lora_A["default"].weight.grad.clone()
    result.backward()
    assert torch.equal(layer.lora_A["default"].weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()


def test_one_pass_dequantizes_once_forward_and_once_backward() -> None:
    layer = one_layer()
    rows = rows_of(3)
    counts = counted(lambda: layer(rows).sum().backward())
    assert (counts[FUSED], counts[GEMM], counts[DEQUANTIZE]) == (1, 0, 1)  # the first two dequantize inside
    # No result is copied, scaled or added apart, unlike by PEFT.
    assert not {"aten::clone", "aten::add.Tensor", "aten::mul.Tensor"} & counts.keys()
    switch_fused(layer, enabled=False)
    counts = counted(lambda: layer(rows).sum().backward())
    assert (counts[FUSED], counts[GEMM], counts[DEQUANTIZE]) == (0, 1, 1)
    assert {"aten::clone", "aten::add.Tensor", "aten::mul.Tensor"} <= counts.keys()


@pytest.mark.parametrize("quant_type", UNQUANTIZED)
def test_a_plain_layer_multiplies_once_and_copies_scales_and_adds_nothing_apart(quant_type: str) -> None:
    layer = one_layer(torch.bfloat16, quant_type=quant_type)
    rows = rows_of(3, dtype=torch.bfloat16)
    apart = {"aten::add.Tensor", "aten::mul.Tensor"}

    def count() -> Counter[str]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return counted(lambda: layer(rows).sum().backward())

    counts = count()
    assert counts[layer.fused_product.operator] == 1
    assert not apart & counts.keys()
    switch_fused(layer, enabled=False)
    counts = count()
    assert counts[layer.fused_product.operator] == 0
    assert apart <= counts.keys()


def test_the_last_layer_of_a_recomputed_block_is_not_multiplied_again() -> None:
    first, last = one_layer(), one_layer()

    def block(rows: torch.Tensor) -> torch.Tensor:
        return last(torch.relu(first(rows)[..., :WIDTH_IN]))  # type: ignore[no-any-return]

    counts = counted(lambda: checkpoint(block, rows_of(3), use_reentrant=False).sum().backward())
    assert counts[FUSED] == 3  # both forward, and the first again


@pytest.mark.parametrize("quant_type", ["nf4", "none", "conv1d"])
def test_saved_tensors_are_those_of_peft_at_most(quant_type: str) -> None:
    sizes = []
    for is_fused in (True, False):
        layer = one_layer(torch.bfloat16, quant_type=quant_type)
        switch_fused(layer, enabled=is_fused)
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", dtype=torch.bfloat16):
            result = layer(rows_of(4, 64, dtype=torch.bfloat16))
        sizes.append(sum(saved.values()))
        del result
    assert 0 < sizes[0] <= sizes[1]


def pickled(layer: Any) -> Any:
    """Return the layer by way of a pickle."""
    return pickle.loads(pickle.dumps(layer))  # noqa: S301 - a pickle of our own


@pytest.mark.parametrize("quant_type", ["nf4", "none", "conv1d"])
@pytest.mark.parametrize("copy", [deepcopy, pickled])
def test_a_copy_computes_the_same(copy: Callable[[Any], Any], quant_type: str) -> None:
    layer = one_layer(quant_type=quant_type)
    rows = rows_of(3)
    copied = copy(layer)
    assert type(copied) is type(layer)
    assert copied.lora_A["default"].weight is not layer.lora_A["default"].weight
    assert counted(lambda: copied(rows))[layer.fused_product.operator] == 1
    assert torch.equal(copied(rows), layer(rows))


def test_dropout_stops_nothing_in_an_evaluation() -> None:
    layer = one_layer(lora_dropout=0.1).eval()
    with torch.no_grad():
        assert counted(lambda: layer(rows_of(3)))[FUSED] == 1


def test_an_evaluation_computes_as_training() -> None:
    layer = one_layer()
    rows = rows_of(3)
    in_training = layer(rows).detach()
    with torch.no_grad():
        assert torch.equal(layer.eval()(rows), in_training)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PeftModel]:
    """Return a model with an adapter whose matrices are not zero, made once."""

    @cache
    def make(family: str, method: str = "nf4", **lora: Any) -> PeftModel:
        directory = save_model(tmp_path_factory.mktemp("model"), family, vocab_size=ROWS)
        model = adapt(directory, settings_of(**lora), quantization__method=method, model__dtype="fp32")
        switch_fused(model, enabled=False)
        train_steps(model, 1)
        model.checkpoint = directory
        return model

    return make


@contextmanager
def computing(model: PeftModel, *, fused: bool) -> Iterator[None]:
    switch_fused(model, enabled=fused)
    model.train()
    model.zero_grad()
    yield
    switch_fused(model, enabled=False)


def model_passes(model: PeftModel, *, fused: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits and the gradients of the adapter."""
    with computing(model, fused=fused):
        torch.manual_seed(0)
        output = model(input_ids=IDS, labels=IDS, use_cache=False)
        output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "nf4") for family in FAMILIES), ("llama", "none"), ("qwen2", "none"), ("gpt2", "none")],
)
def test_a_model_is_the_same_as_with_pefts_layers(adapted: Callable[..., PeftModel], family: str, method: str) -> None:
    model = adapted(family, method)
    assert any(True for _ in fused_layers(model))
    fused, plain = model_passes(model, fused=True), model_passes(model, fused=False)
    assert error(fused[0], plain[0].double()) < 1e-6
    assert fused[1].keys() == plain[1].keys()
    # Each layer rounds by 1e-7, and the gradient of the first has passed through all.
    assert max(error(fused[1][name], plain[1][name].double()) for name in plain[1]) < 3e-6


def test_ranks_and_scales_by_layer(adapted: Callable[..., PeftModel]) -> None:
    model = adapted("llama", rank_pattern="q_proj=4", alpha_pattern="q_proj=64")
    fused, plain = model_passes(model, fused=True), model_passes(model, fused=False)
    assert max(error(fused[1][name], plain[1][name].double()) for name in plain[1]) < 3e-6


@pytest.mark.parametrize(
    ("family", "method", "checkpointing"),
    [
        (*model, checkpointing)
        for model in (("llama", "nf4"), ("gpt2", "nf4"), ("llama", "none"), ("gpt2", "none"))
        for checkpointing in (Checkpointing.ON, Checkpointing.SELECTIVE)
    ],
)
def test_checkpointing_changes_no_bit(
    adapted: Callable[..., PeftModel], family: str, method: str, checkpointing: Checkpointing
) -> None:
    model = adapted(family, method)
    expected = model_passes(model, fused=True)[1]
    handle = enable_checkpointing(model, checkpointing)
    assert handle is not None
    try:
        with CountOperations() as operations:
            actual = model_passes(model, fused=True)[1]
    finally:
        handle.remove()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    (operator,) = {layer.fused_product.operator for layer in fused_layers(model)}
    num_layers = sum(1 for _ in fused_layers(model))
    # GPT-2 has dropout after the last layer of each block, which saves a mask.
    num_last = 0 if family == "gpt2" else model.config.num_hidden_layers
    again = 0 if checkpointing == Checkpointing.SELECTIVE else num_layers - num_last
    assert operations.counts[operator] == num_layers + again


def test_an_adapter_is_saved_as_pefts(adapted: Callable[..., PeftModel], tmp_path: Path) -> None:
    model = adapted("llama")
    save_adapter(model, tmp_path / "adapter")
    assert "usedLinear" not in (tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
    base = load(model.checkpoint, quantization__method="nf4", model__dtype="fp32").base
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not any(isinstance(module, FusedLoraLayer) for module in plain.modules())
    switch_fused(model, enabled=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
        assert error(plain(input_ids=IDS).logits, logits.double()) < 1e-6
    switch_fused(model, enabled=False)


class Clipped(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-1, 1)


class ClippedConv1D(Conv1D):
    """A layer of GPT-2 that computes something else."""

    def forward(self, x: Any) -> Any:
        return super().forward(x).clamp(-1, 1)  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # PEFT's, of the other kind of layer
def test_only_layers_themselves_and_4_bit_ones_are_replaced() -> None:
    layers = {
        "of_gpt2": Conv1D(8, 8),
        "plain": nn.Linear(8, 8),
        "quantized": one_layer().base_layer,
        "clipped": Clipped(8, 8),
        "clipped_of_gpt2": ClippedConv1D(8, 8),  # type: ignore[no-untyped-call]
        "int8": bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False),
    }
    model: Any = nn.ModuleDict(layers)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True
    config = LoraConfig(r=2, target_modules=list(layers), fan_in_fan_out=True)
    config._register_custom_module(fused_types())
    inject_adapter_in_model(config, model)
    assert {name for name in layers if isinstance(model[name], FusedLoraLayer)} == {"of_gpt2", "plain", "quantized"}
    assert all(isinstance(model[name], LoraLayer) for name in layers)
    assert type(model["int8"]) is Linear8bitLt
    assert not model["plain"].fan_in_fan_out
    assert model["of_gpt2"].fan_in_fan_out
    rows = torch.ones(1, 8)
    for name in ("plain", "of_gpt2"):  # B is zero
        torch.testing.assert_close(model[name](rows), layers[name](rows), rtol=1e-6, atol=1e-7)


def test_a_weight_that_an_adapter_targets_by_its_name_is_left_to_peft(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "llama", vocab_size=ROWS)
    base = load(directory, quantization__method="none", model__dtype="fp32").base
    config = LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"], task_type="CAUSAL_LM")
    get_peft_model(deepcopy(base), config).save_pretrained(tmp_path / "adapter")
    model = attach_from_config(base, LoraConfig.from_pretrained(tmp_path / "adapter"), tmp_path / "adapter")
    assert not list(fused_layers(model))
    assert any(isinstance(module, ParamWrapper) for module in model.modules())
