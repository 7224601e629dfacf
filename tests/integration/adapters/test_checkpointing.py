"""Checkpointing changes what is kept for the backward pass and what is computed twice, and no gradient by a bit."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.adapters.checkpointing import enable_checkpointing
from qlora_cli.adapters.fused_lora import switch_fused
from qlora_cli.errors import ModelError
from qlora_cli.settings.choices import Checkpointing
from tests.support.models.adapters import load_for, settings_of, train_steps
from tests.support.models.four_bit_lora import CountOperations
from tests.support.models.loading import save_model
from tests.support.models.reference_models import IDS, ROWS

Gradients = dict[str, torch.Tensor]
PRODUCT, PLAIN_PRODUCT = "qlora::four_bit_product", "qlora::linear_product"  # of a layer and its adapter
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
# Families with grouped keys and values, Conv1D, biases, soft caps, experts, and attention of another kind.
FAMILIES = ("llama", "gpt2", "qwen2", "gemma2", "qwen3_moe", "qwen3_next")
CHECKPOINTED = (Checkpointing.ON, Checkpointing.SELECTIVE)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], PeftModel]:
    """Return a model with an adapter whose matrices are not zero, made once."""

    @cache
    def make(family: str, method: str) -> PeftModel:
        directory = save_model(tmp_path_factory.mktemp("model"), family, vocab_size=ROWS)
        lora = settings_of()
        flags = {"quantization__method": method, "model__dtype": "fp32"}
        model = attach_adapter(load_for(directory, lora, **flags).base, lora)[0]
        train_steps(model, 1)
        return model

    return make


@contextmanager
def computed_by_peft(model: PeftModel) -> Iterator[None]:
    """Have layers and adapters computed apart."""
    switch_fused(model, enabled=False)
    try:
        yield
    finally:
        switch_fused(model, enabled=True)


def run_backward(
    model: PeftModel, checkpointing: Checkpointing, kept: Sequence[str] | None = None
) -> tuple[Gradients, Counter[str]]:
    """Return the gradients of the adapter and the operations of a forward and backward pass."""
    model.train()
    model.zero_grad()
    handle = enable_checkpointing(model, checkpointing, kept)
    try:
        torch.manual_seed(0)
        with CountOperations() as operations:
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    finally:
        if handle is not None:
            handle.remove()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, operations.counts


@pytest.mark.parametrize(
    ("family", "method"), [*product(FAMILIES, ("nf4", "none")), ("llama", "int8"), ("gpt2", "int8")]
)
def test_gradients_are_those_without_checkpointing(
    adapted: Callable[[str, str], PeftModel], family: str, method: str
) -> None:
    model = adapted(family, method)
    expected, _ = run_backward(model, Checkpointing.OFF)
    assert expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for checkpointing in CHECKPOINTED:
        gradients, _ = run_backward(model, checkpointing)
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], expected[name]) for name in expected), checkpointing


def test_selective_checkpointing_recomputes_neither_products_of_the_base_nor_attention(
    adapted: Callable[[str, str], PeftModel],
) -> None:
    model = adapted("llama", "nf4")
    counts = {each: run_backward(model, each)[1] for each in (Checkpointing.OFF, *CHECKPOINTED)}
    off, on, selective = (counts[each] for each in (Checkpointing.OFF, *CHECKPOINTED))
    num_blocks = model.config.num_hidden_layers
    for name, num_left_out in ((PRODUCT, num_blocks), (ATTENTION, 0)):  # nothing needs the last product of a block
        assert on[name] == 2 * off[name] - num_left_out > off[name]
        assert selective[name] == off[name]
    # What is cheap for its size is computed again: norms, activation functions, and the adapter.
    for name in ("aten::silu", "aten::rsqrt", "aten::mm"):
        assert on[name] >= selective[name] > off[name]


def test_of_a_base_in_16_bit_only_the_products_of_the_adapter_are_recomputed(
    adapted: Callable[[str, str], PeftModel],
) -> None:
    model = adapted("llama", "none")
    num_layers = sum(1 for name, _ in model.named_modules() if name.endswith(".base_layer"))
    num_last = model.config.num_hidden_layers  # which nothing in the block needs
    on, selective = (run_backward(model, each)[1][PLAIN_PRODUCT] for each in CHECKPOINTED)
    assert (on, selective) == (2 * num_layers - num_last, num_layers)
    with computed_by_peft(model):
        on, selective = (run_backward(model, each)[1]["aten::mm"] for each in CHECKPOINTED)
    assert on - selective == num_layers


@pytest.mark.parametrize(("family", "method"), [("llama", "nf4"), ("llama", "none"), ("gpt2", "nf4")])
def test_only_the_named_products_are_kept(adapted: Callable[[str, str], PeftModel], family: str, method: str) -> None:
    model = adapted(family, method)
    name = {"llama": "gate_proj", "gpt2": "c_attn"}[family]
    product = {"nf4": PRODUCT, "none": PLAIN_PRODUCT}[method]
    expected, _ = run_backward(model, Checkpointing.OFF)
    counts = {}
    for kept in ([], [name], None):
        gradients, operations = run_backward(model, Checkpointing.SELECTIVE, kept)
        assert all(torch.equal(gradients[key], expected[key]) for key in expected), kept
        counts[len(kept) if kept is not None else None] = operations[product]
    num_named = sum(1 for module, _ in model.named_modules() if module.endswith(f".{name}"))
    assert num_named == model.config.num_hidden_layers
    assert counts[0] - counts[1] == num_named
    assert counts[1] > counts[None]


def test_a_name_of_no_layer_is_refused_with_those_that_there_are(adapted: Callable[[str, str], PeftModel]) -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM has no linear layer W_pack, up") as caught:
        enable_checkpointing(adapted("llama", "nf4"), Checkpointing.SELECTIVE, ["q_proj", "up", "W_pack"])
    assert caught.value.setting == "training.kept_products"
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(caught.value.hint)


def test_a_handle_removes_all_traces(adapted: Callable[[str, str], PeftModel]) -> None:
    model = adapted("llama", "nf4")
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    _, before = run_backward(model, Checkpointing.OFF)
    run_backward(model, Checkpointing.SELECTIVE)
    _, after = run_backward(model, Checkpointing.OFF)
    assert before == after
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_an_error_in_a_layer_leaves_the_policy_as_it_was(adapted: Callable[[str, str], PeftModel]) -> None:
    model = adapted("llama", "none")
    with computed_by_peft(model):  # so that the layer inside, which fails, is called
        expected = run_backward(model, Checkpointing.SELECTIVE)[1]
        operations = fail_and_run_backward(model)
    assert operations == expected


def fail_and_run_backward(model: PeftModel) -> Counter[str]:
    """Fail in the first layer of a pass; return the operations of the next pass."""
    handle = enable_checkpointing(model, Checkpointing.SELECTIVE)
    assert handle is not None
    layer = next(module for name, module in model.named_modules() if name.endswith(".base_layer"))

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of a layer")

    failing = layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(input_ids=IDS, labels=IDS, use_cache=False)
    failing.remove()
    model.zero_grad()
    torch.manual_seed(0)
    with CountOperations() as operations:
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    handle.remove()
    counts: Counter[str] = operations.counts
    return counts


def test_selective_checkpointing_keeps_dropout_as_it_was_drawn(tmp_path: Path) -> None:
    lora = settings_of(dropout=0.5)
    base = load_for(save_model(tmp_path / "model", "llama", vocab_size=ROWS), lora, model__dtype="fp32").base
    model = attach_adapter(base, lora)[0]
    train_steps(model, 1)
    expected, _ = run_backward(model, Checkpointing.OFF)
    gradients, _ = run_backward(model, Checkpointing.SELECTIVE)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
