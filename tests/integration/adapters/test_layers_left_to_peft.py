"""Which layers with an adapter are left to PEFT's code, and that a run says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from torch import nn

from qlora_cli.adapters.fused_lora import switch_fused, unfused
from qlora_cli.events import Noted
from qlora_cli.training.run_plan import prepare_run
from tests.conftest import Recorder, train_settings
from tests.support.models.four_bit_lora import FUSED, RANK, WIDTH_IN, WIDTH_OUT, counted, one_layer, passes, rows_of


def test_a_bias_of_the_adapter_is_left_to_peft() -> None:
    layer = one_layer(has_bias=True, lora_bias=True)
    assert unfused(layer, torch.float32) == {"the adapter has a bias": 1}
    assert counted(lambda: layer(rows_of(3)))[FUSED] == 0


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        ({"lora_dropout": 0.1}, None, "dropout"),
        ({"use_dora": True}, None, "DoRA"),
        ({}, "switch", "fused_lora is off"),
        ({}, "disable", "active adapter"),
        ({}, "bf16", "bfloat16, the adapter's in torch.float32"),
    ],
)
def test_what_it_does_not_compute_is_computed_by_peft(config: dict[str, Any], change: str | None, reason: str) -> None:
    layer = one_layer(torch.bfloat16 if change == "bf16" else torch.float32, **config)
    if change == "switch":
        switch_fused(layer, enabled=False)
    if change == "disable":
        layer.enable_adapters(False)
    (message,) = unfused(layer, torch.float32)
    assert reason in message
    rows = rows_of(3)
    torch.manual_seed(0)
    actual = layer(rows)
    plain: Any = type(layer).__bases__[1]
    torch.manual_seed(0)
    assert torch.equal(actual, plain.forward(layer, rows))
    assert counted(lambda: layer(rows))[FUSED] == 0


def stored_as_in_out(layer: Any) -> None:
    """Store the weight `(in, out)`, as early versions of bitsandbytes."""
    base = layer.base_layer
    weight = torch.randn(WIDTH_IN, WIDTH_OUT, generator=torch.Generator().manual_seed(3))
    base.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=base).to("cpu")


def replaced_by_a_plain_layer(layer: Any) -> None:
    """Put a plain layer in, as for a weight that an adapter's file holds."""
    layer.base_layer = nn.Linear(WIDTH_IN, WIDTH_OUT).requires_grad_(False)


@pytest.mark.filterwarnings("ignore:matmul_4bit:DeprecationWarning")
@pytest.mark.parametrize("change", [stored_as_in_out, replaced_by_a_plain_layer])
def test_a_weight_that_is_stored_in_another_way_is_left_to_peft(change: Callable[[Any], None]) -> None:
    layer = one_layer()
    change(layer)
    (message,) = unfused(layer, torch.float32)
    assert "stored" in message
    actual = passes(layer, rows_of(3))
    switch_fused(layer, enabled=False)
    expected = passes(layer, rows_of(3))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_weight_that_was_repacked_for_a_cpu_is_left_to_peft() -> None:
    layer = one_layer()
    base = layer.base_layer
    base.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(base.weight.data, base.weight.quant_state)
    (message,) = unfused(layer, torch.float32)
    assert "stored" in message


def test_a_weight_that_is_trained_itself_is_left_to_peft() -> None:
    layer = one_layer(quant_type="none")
    layer.base_layer.weight.requires_grad_(True)
    assert unfused(layer, torch.float32) == {"the weight is trained itself": 1}
    layer(rows_of(3)).sum().backward()
    assert layer.base_layer.weight.grad is not None


def test_the_dtype_of_the_adapter_is_that_of_the_active_one() -> None:
    layer = one_layer(torch.bfloat16)
    layer.update_layer("other", RANK, lora_alpha=24, config=LoraConfig(r=RANK))
    for parts in (layer.lora_A, layer.lora_B):
        parts["default"].to(torch.bfloat16)
        parts["other"].to(torch.float32)
    rows = rows_of(3, dtype=torch.bfloat16)
    counts = {}
    for name in ("default", "other"):
        layer.set_adapter(name)
        counts[name] = counted(lambda: layer(rows))[FUSED]
    assert counts == {"default": 1, "other": 0}


def test_no_rows_are_left_to_peft() -> None:
    layer = one_layer()
    assert layer(rows_of(0)).shape == (0, WIDTH_OUT)


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ({}, None),
        ({"training__fused_lora": False, "lora__dropout": 0.1}, None),
        ({"lora__dropout": 0.1}, "28 layers computed as by PEFT, which is slower: dropout"),
        (
            {"quantization__compute_dtype": "bf16"},
            "28 layers computed as by PEFT, which is slower: the weight's",
        ),
        ({"training__torch_compile": True}, None),
        (
            {"training__torch_compile": True, "lora__dropout": 0.1},
            "28 layers computed as by PEFT, which is slower: dropout",
        ),
    ],
    ids=str,
)
def test_a_run_says_once_which_layers_are_left_to_peft(
    base_model: Path, rows: Path, tmp_path: Path, flags: dict[str, Any], note: str | None
) -> None:
    recorder = Recorder()
    prepare_run(train_settings(base_model, rows, tmp_path / "run", **flags), recorder)
    notes = [event.message for event in recorder.events if isinstance(event, Noted) and "by PEFT" in event.message]
    assert len(notes) == (note is not None)
    assert note is None or notes[0].startswith(note)
