"""The base of a merge: as it is stored, or its exact round trip through the quantized storage of training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import ModelError
from qlora_cli.events import SilentReporter
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.loading.save import save_quantized
from qlora_cli.merging.planning.base_weights import Base, parameter_groups
from qlora_cli.merging.planning.inputs import Inputs, read_inputs
from qlora_cli.merging.planning.merge_plan import plan_merge
from qlora_cli.merging.verifying.choose_base import base_choice_without_measuring, choose_base
from qlora_cli.merging.verifying.comparison import ModelComparer
from qlora_cli.settings.choices import BaseWeights, MergeDtype
from tests.support.models.loading import copy_tokenizer, load, save_model
from tests.support.models.reference_models import ROWS
from tests.support.runs.merging import (
    loaded_plain,
    merge,
    merge_again,
    plain_logits,
    random_run,
    request_of,
    streamed_logits,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ODD = {"intermediate_size": 96}  # so that rows of down_proj do not end with a block
STORED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # the family, its sizes, and how it is loaded
    "nf4": ("llama", {}, {}),
    "nf4 in bf16": ("llama", {}, {"model__dtype": "bf16"}),
    "fp4": ("llama", {}, {"quantization__method": "fp4"}),
    "constants in fp32": ("llama", {}, {"quantization__double_quant": False}),
    "codes in bf16": ("llama", {}, {"quantization__quant_storage": "bf16"}),
    "int8": ("llama", {}, {"quantization__method": "int8"}),
    "int8 in bf16": ("llama", {}, {"quantization__method": "int8", "model__dtype": "bf16"}),
    "some in 16 bit": ("llama", {}, {"quantization__skip_modules": "q_proj,down_proj"}),
    "rows of parts of a block": ("llama", ODD, {}),
    "Conv1D": ("gpt2", {}, {}),
    "Conv1D in int8": ("gpt2", {}, {"quantization__method": "int8"}),
    "experts stored one by one": ("qwen3_moe", {}, {}),
    "experts stored as one": ("gpt_oss", {}, {}),
    "experts stored as one, transposed": ("llama4_text", {}, {}),
    "experts in rows of parts of a block": ("jetmoe", {}, {}),
    "experts in a row": ("dbrx", {}, {}),
    "weights kept in fp32": ("deepseek_v32", {}, {"model__dtype": "bf16"}),
}


def loaded_weight(loaded: LoadedModel, name: str) -> torch.Tensor:
    """Return a weight of a loaded model as a forward pass uses it, oriented as in its checkpoint."""
    path, _, leaf = name.rpartition(".")
    module = loaded.base.get_submodule(path)
    weight: Any = getattr(module, leaf)
    if not isinstance(module, Linear4bit | Linear8bitLt) or leaf != "weight":
        value: torch.Tensor = weight.detach()  # experts are dequantized when they are read
        return value
    if isinstance(module, Linear4bit):
        value = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        value = functional.int8_vectorwise_dequant(weight.CB, weight.SCB).to(loaded.layout.dtype)
    return value.T if issubclass(module.source_cls, Conv1D) else value


@dataclass(frozen=True, kw_only=True)
class Case:
    """A base, how it is loaded, an adapter of random values on it, and a run of them."""

    base: Path
    how: dict[str, Any]
    model: PeftModel
    run: Path

    @property
    def rounds_products(self) -> bool:
        """Whether inputs of products are rounded, in bf16 or by LLM.int8(), so that training saw other values."""
        return self.how.get("model__dtype") == "bf16" or self.how.get("quantization__method") == "int8"

    def inputs(self, **values: Any) -> Inputs:
        """Return what a merge of the run reads."""
        return read_inputs(request_of(self.run, **values), SilentReporter())


def trained(base: Path, place: Path, **how: Any) -> Case:
    """Load a base and put an adapter of random values on it."""
    model, run = random_run(base, place, **how)
    return Case(base=base, how=how, model=model, run=run)


@pytest.fixture(scope="module", params=STORED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, sizes, how = STORED[request.param]
    place = tmp_path_factory.mktemp("case")
    return trained(save_model(place / "base", family, vocab_size=ROWS, **sizes), place, **how)


def assert_weights_are_those_of(loaded: LoadedModel, inputs: Inputs) -> None:
    """Check that the dequantized base is what was loaded, to the bit."""
    base = Base(inputs.base, BaseWeights.DEQUANTIZED)
    groups = parameter_groups(inputs.base.groups)
    assert inputs.base.quantized == {entry.name for entry in loaded.inventory.entries if entry.is_quantized} != set()
    for entry in loaded.inventory.entries:
        weight, expected = base.parameters(groups[entry.name])[entry.name], loaded_weight(loaded, entry.name)
        if entry.is_quantized:
            assert weight.dtype == expected.dtype == loaded.layout.dtype
        assert torch.equal(weight.to(expected.dtype), expected), entry.name


def test_the_dequantized_base_is_the_one_loaded_for_training_to_the_bit(case: Case) -> None:
    inputs = case.inputs()
    assert_weights_are_those_of(load(case.base, **case.how), inputs)
    original = Base(inputs.base, BaseWeights.ORIGINAL)
    dequantized = Base(inputs.base, BaseWeights.DEQUANTIZED)
    groups = parameter_groups(inputs.base.groups)
    for name in inputs.base.quantized:
        one, other = (base.parameters(groups[name])[name] for base in (original, dequantized))
        assert not torch.equal(one, other), name


def test_the_base_is_quantized_from_its_dtype_in_training_whatever_the_compute_dtype(
    tmp_path: Path,
) -> None:
    """fp16 would give other codes: the base is stored in fp16, and training held it in what the machine prefers."""
    base = save_model(tmp_path / "base", vocab_size=ROWS, dtype=torch.float16)
    how = {"model__dtype": None, "quantization__compute_dtype": "bf16"}
    case = trained(base, tmp_path, **how)
    loaded = load(base, **how)
    assert loaded.layout.dtype != torch.float16
    assert_weights_are_those_of(loaded, case.inputs())


def test_slices_of_stacked_experts_are_those_of_the_whole(case: Case) -> None:
    inputs = case.inputs()
    whole, sliced = (Base(inputs.base, BaseWeights.DEQUANTIZED) for _ in range(2))
    for group in inputs.base.groups:
        values = whole.parameters(group)
        for index in range(group.num_slices or 0):
            slices = sliced.parameters(group, index)
            assert all(torch.equal(slices[name], value[index : index + 1]) for name, value in values.items())


def test_merging_into_the_dequantized_base_gives_the_model_that_was_trained(case: Case, tmp_path: Path) -> None:
    adapted = plain_logits(case.model).float()
    merged = merge(case.run, output=tmp_path / "merged", base="dequantized", dtype="fp32")
    merged_logits = plain_logits(loaded_plain(merged.directory))
    original = merge_again(merged, tmp_path / "original", dtype=MergeDtype.FP32, kind=BaseWeights.ORIGINAL)
    original_logits = plain_logits(loaded_plain(original.directory))
    if not case.rounds_products:
        torch.testing.assert_close(merged_logits, adapted, rtol=1e-4, atol=1e-4)
    assert (merged_logits - adapted).norm() < (0.8 if case.rounds_products else 1e-3) * (
        original_logits - adapted
    ).norm()
    exact = streamed_logits(merged, with_adapters=True, kind=BaseWeights.DEQUANTIZED)
    torch.testing.assert_close(exact, merged_logits, rtol=1e-4, atol=1e-4)


# ---- prequantized bases


def by_transformers(base: Path, directory: Path, config: BitsAndBytesConfig) -> Path:
    """Write a base quantized by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(directory)
    return copy_tokenizer(directory)


def by_us(base: Path, directory: Path, **how: Any) -> Path:
    """Write a base quantized by `qlora load --save`."""
    save_quantized(load(base, **how), directory, SilentReporter())
    return directory


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
FP4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
PREQUANTIZED: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "nf4 by transformers": ("llama", lambda base, to: by_transformers(base, to, NF4)),
    "fp4 by transformers": ("llama", lambda base, to: by_transformers(base, to, FP4)),
    "int8 by transformers": ("llama", lambda base, to: by_transformers(base, to, INT8)),
    "Conv1D by transformers": ("gpt2", lambda base, to: by_transformers(base, to, NF4)),
    "nf4 by us": ("llama", by_us),
    "int8 by us": ("llama", lambda base, to: by_us(base, to, quantization__method="int8")),
    "experts by us": ("qwen3_moe", by_us),
    "transposed experts by us": ("gpt_oss", by_us),
}


@pytest.fixture(scope="module", params=PREQUANTIZED)
def prequantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, make = PREQUANTIZED[request.param]
    place = tmp_path_factory.mktemp("case")
    how = {"quantization__method": "int8"} if "int8" in request.param else {}
    return trained(make(save_model(place / "base", family, vocab_size=ROWS), place / "quantized"), place, **how)


def test_a_prequantized_base_is_dequantized_to_the_bit(prequantized: Case) -> None:
    assert_weights_are_those_of(load(prequantized.base), prequantized.inputs())


def test_merging_gives_a_16_bit_model_that_plain_transformers_loads(prequantized: Case, tmp_path: Path) -> None:
    adapted = plain_logits(prequantized.model)
    exact = merge(prequantized.run, output=tmp_path / "exact", dtype="fp32")
    merged_logits = plain_logits(loaded_plain(exact.directory))
    if prequantized.rounds_products:
        assert (merged_logits - adapted).norm() < 0.1 * adapted.norm()
    else:
        torch.testing.assert_close(merged_logits, adapted, rtol=1e-4, atol=1e-4)
    streamed = streamed_logits(exact, with_adapters=True, kind=BaseWeights.DEQUANTIZED)
    torch.testing.assert_close(streamed, merged_logits, rtol=1e-4, atol=1e-4)
    merged = merge_again(exact, tmp_path / "merged", dtype=MergeDtype.BF16)
    assert {value.dtype for value in merged.tensors.values()} == {torch.bfloat16}
    loaded = loaded_plain(merged.directory, "auto")
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.dtype == torch.bfloat16


def test_a_base_available_only_quantized_is_refused_as_original(prequantized: Case) -> None:
    with pytest.raises(ModelError, match="is only available quantized") as caught:
        base_choice_without_measuring(prequantized.inputs(base=BaseWeights.ORIGINAL))
    assert "--base-model" in str(caught.value.hint)


# ---- the choice


def test_auto_measures_both_and_takes_the_nearer(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", vocab_size=ROWS)
    case = trained(base, tmp_path)
    inputs = case.inputs(base=BaseWeights.AUTO)
    assert base_choice_without_measuring(inputs) is None
    comparer = ModelComparer(inputs, SilentReporter())
    for dtype in (MergeDtype.KEEP, MergeDtype.FP32):
        kinds = (BaseWeights.DEQUANTIZED, BaseWeights.ORIGINAL)
        plans = [plan_merge(inputs.base, inputs.config, inputs.changes, kind, dtype) for kind in kinds]
        choice = choose_base(comparer, plans, SilentReporter())
        assert choice.base == BaseWeights.DEQUANTIZED.value
        assert choice.original is not None
        assert choice.dequantized is not None
        assert choice.dequantized.mean_kl < choice.original.mean_kl
        assert choice.original.max_logit_difference > 1e-3
        nearest = choice.dequantized.max_logit_difference
    assert nearest < 1e-4  # in fp32 it is the model that was trained
