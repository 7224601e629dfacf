"""Calls of the base alone: with an adapter of any kind switched off, logits are those before it was attached."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.adapters.calls import disable_dropout, without_adapter
from qlora_cli.settings.models import LoraSettings
from tests.support.models.loading import load, save_model


@pytest.mark.parametrize(
    ("family", "lora"),
    [("mixtral", {"target_parameters": "all-experts"}), ("llama", {"use_dora": True}), ("gpt2", {})],
)
def test_the_base_computes_alone_and_the_same_weights_are_trained_afterwards(
    tmp_path: Path, family: str, lora: dict[str, Any]
) -> None:
    base, ids = load(save_model(tmp_path / "base", family)).base.eval(), torch.arange(12)[None]
    with torch.no_grad():
        before = base(input_ids=ids, use_cache=False).logits
        model, _ = attach_adapter(base, LoraSettings(rank=4, **lora))
        trained = [name for name, weight in model.eval().named_parameters() if weight.requires_grad]
        for name, weight in model.named_parameters():
            if name in trained:
                weight.add_(0.05 * torch.randn_like(weight))
    with without_adapter(model):
        alone = base(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(alone, before, rtol=0, atol=0)
    assert not torch.allclose(base(input_ids=ids, use_cache=False).logits, before, atol=0.1)
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == trained


def test_dropout_is_switched_off_and_on_again() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2), torch.nn.Dropout(0.1)).train()
    undo = disable_dropout(model)
    ones = torch.ones(50, 2)
    torch.testing.assert_close(model[0](ones), ones)
    undo()
    assert [module.p for module in model if isinstance(module, torch.nn.Dropout)] == [0.5, 0.1]
