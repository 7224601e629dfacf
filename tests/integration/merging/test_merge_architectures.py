"""Every family of models, merged: to the bit what plain arithmetic and PEFT give, under the names of the base.

Models are tiny and random, saved in bf16 as users' are. Adapters are on every linear layer and on fused experts.
"""

import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.merging.merge_result import Action
from qlora_cli.quantization.methods.skip_modules import fused_experts
from qlora_cli.settings.choices import MergeDtype
from tests.support.models.loading import save_model
from tests.support.models.reference_models import ROWS, load_plain
from tests.support.models.tiny_models import FAMILIES
from tests.support.runs.merging import (
    Merged,
    adapted,
    assert_same,
    loaded_plain,
    merge,
    merge_again,
    merged_by_hand,
    merged_by_peft,
    plain_logits,
    save,
    stored,
    streamed_logits,
    verified,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Routers are no linear layers to PEFT, and Mamba reads the weights of these past an adapter.
NOT_ADAPTED = re.compile(r"(router|gate|(mixer|mamba)\.(out|dt)_proj)$")
# PEFT puts an adapter on the experts of these, and the model does not run with it.
WITHOUT_EXPERTS = {"dbrx"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family: its base, what a merge wrote, and what it should have written."""

    base: Path
    merged: Merged
    by_hand: dict[str, torch.Tensor]
    by_peft: dict[str, torch.Tensor]
    base_logits: torch.Tensor
    adapted_logits: torch.Tensor


def every_target(model: PreTrainedModel, family: str) -> LoraConfig:
    """Return the config of an adapter on every module of the base that can have one, by full names."""
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not NOT_ADAPTED.search(name)
    ]
    experts = [] if family in WITHOUT_EXPERTS else [name for name, _ in fused_experts(model)]
    return LoraConfig(
        r=4, lora_alpha=8, target_modules=names, target_parameters=experts or None, task_type="CAUSAL_LM"
    )


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family: str = request.param
    place = tmp_path_factory.mktemp(family)
    base = save_model(place / "base", family, vocab_size=ROWS)
    plain = load_plain(base)
    base_logits = plain_logits(plain)
    model = adapted(deepcopy(plain), every_target(plain, family))
    adapter = save(model, place / "adapter")
    adapted_logits = plain_logits(model)
    return Case(
        base=base,
        merged=merge(adapter, output=place / "merged"),
        by_hand=merged_by_hand(model, plain, torch.bfloat16, place / "by-hand"),
        by_peft=merged_by_peft(model, torch.bfloat16, place / "by-peft"),
        base_logits=base_logits,
        adapted_logits=adapted_logits,
    )


@pytest.mark.fast
def test_it_is_the_base_plus_the_product_in_fp32_cast_once_to_the_bit(case: Case) -> None:
    assert_same(case.merged.tensors, case.by_hand)
    base = stored(case.base)
    changed = {name for name, value in case.merged.tensors.items() if not torch.equal(value, base[name])}
    planned = {tensor.name for tensor in case.merged.plan.tensors if tensor.action == Action.MERGE}
    assert changed == planned


def test_it_is_what_peft_merges_in_memory_to_the_bit(case: Case) -> None:
    """Before it is saved and loaded again, where PEFT loses adapters of laguna."""
    assert_same(case.merged.tensors, case.by_peft)


@pytest.mark.fast
def test_plain_transformers_finds_every_weight_and_computes_what_was_trained(case: Case, tmp_path: Path) -> None:
    exact = merge_again(case.merged, tmp_path / "exact", dtype=MergeDtype.FP32)
    tensors = exact.tensors
    assert {value.dtype for value in tensors.values() if value.is_floating_point()} == {torch.float32}
    assert {name: value.shape for name, value in tensors.items()} == {
        name: value.shape for name, value in case.merged.tensors.items()
    }
    merged_logits = plain_logits(loaded_plain(exact.directory, "auto"))
    assert (case.adapted_logits - case.base_logits).abs().max() > 1e-3
    torch.testing.assert_close(merged_logits, case.adapted_logits, rtol=1e-4, atol=1e-4)


def test_streaming_gives_the_logits_of_plain_transformers_and_peft_to_the_bit(case: Case) -> None:
    """The reference of a merge must be right even where PEFT, loading the adapter from its file, is not."""
    assert torch.equal(streamed_logits(case.merged, with_adapters=False), case.base_logits)
    assert torch.equal(streamed_logits(case.merged, with_adapters=True), case.adapted_logits)


def test_each_adapted_module_is_verified_to_compute_the_same(case: Case) -> None:
    verification = verified(case.merged)
    assert verification.is_exact, verification
    assert verification.modules is not None
    changed = {name.rpartition(".")[0] for name in case.merged.inputs.changes}
    assert verification.modules.num_modules == len(changed)
    assert verification.modules.difference < verification.modules.max_difference / 10


def test_an_adapter_of_weight_zero_gives_the_weight_files_of_the_base(case: Case, tmp_path: Path) -> None:
    merged = merge_again(case.merged, tmp_path / "merged", weight=0).directory
    assert (merged / "model.safetensors").read_bytes() == (case.base / "model.safetensors").read_bytes()
