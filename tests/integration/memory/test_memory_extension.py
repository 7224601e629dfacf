"""A step through few layers, extended to all layers of a model, is the step through all to the byte, pass by pass.

Both are replayed in the allocator; memory allocated and reserved at the peak of each pass is compared exactly.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

from qlora_cli.errors import ModelError
from qlora_cli.memory import estimator
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.replaying.replay import Peaks
from qlora_cli.memory.tracing.extension import UnevenError, extend, passes_of
from qlora_cli.memory.tracing.functions import GpuFunctions
from qlora_cli.memory.tracing.layers import LayerStack, find_stack
from qlora_cli.memory.tracing.meta_model import MetaModel
from qlora_cli.memory.tracing.passes import MISMATCHED, REFERENCE, Passes
from qlora_cli.memory.tracing.trace import MemoryTrace
from qlora_cli.memory.tracing.training_step import trace_step
from qlora_cli.quantization.storage_plan import build_on_meta
from qlora_cli.settings.models import EstimateSettings, QuantizationSettings
from tests.support.models.tiny_models import FAMILIES
from tests.support.models.tracing import (
    UncountedStep,
    deep_config,
    meta_model_of,
    peaks,
    step_settings,
    uncounted,
)

pytestmark = pytest.mark.usefixtures("one_thread")

A100, T4 = find_gpu("A100 40GB"), find_gpu("T4")
# Families traced whole, and why.
WHOLE = {"zamba2": "its hybrid layers share the weights of one block, so no layer can be traced without the others"}
# Families without gradient checkpointing, which transformers does not implement for them.
WITHOUT_CHECKPOINTING = {"ctrl", "jetmoe"}
# Families that are not predicted, and why, as the error says.
REFUSED = {
    "dbrx": "what DbrxForCausalLM computes depends on values",  # its experts take the rows that `nonzero` returns
    "jetmoe": "what JetMoeForCausalLM computes depends on values",  # the numbers of rows of its experts, as a list
    "llama4_text": "the layers of Llama4ForCausalLM can't be told from its output head",
}
UNQUANTIZED = {"falcon"}  # the loader refuses it in 4 bit
WITH_STATES = {"recurrent_gemma"}  # its layers keep a state from one pass to the next
DENSE_FIRST = ("glm4_moe", "deepseek_v3", "deepseek_v32", "ernie4_5_moe", "laguna")
HYBRID = [family for family, values in FAMILIES.items() if "layer_types" in values or "block_types" in values]
# Kinds of layers that alternate or follow a pattern: more of them are needed to represent all.
DEPTHS = {"gemma3_text": 8, "nemotron_h": 9, **dict.fromkeys((*HYBRID, *DENSE_FIRST), 6)}
EVERY = [family for family in FAMILIES if family not in REFUSED]
# Plain, with sliding windows, and with experts.
THREE: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "mixtral": {},
}


@dataclass
class Spy:
    """Records what the estimator traced and extended."""

    extended: list[Passes] = field(default_factory=list)
    whole: list[Passes] = field(default_factory=list)

    def extend(self, trace: MemoryTrace, stack: LayerStack, chosen: Any) -> Passes:
        self.extended.append(extend(trace, stack, chosen))
        return self.extended[-1]

    def passes_of(self, trace: MemoryTrace) -> Passes:
        self.whole.append(passes_of(trace))
        return self.whole[-1]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    monkeypatch.setattr(estimator, "extend", spy.extend)
    monkeypatch.setattr(estimator, "passes_of", spy.passes_of)
    return spy


def estimate(family: str, *, whole: bool, gpu: Gpu = A100, **training: Any) -> Peaks:
    """Return the peaks of a family as `inspect-memory` predicts them."""
    facts = ModelFacts(name=family, content=deep_config(family, DEPTHS.get(family, 5)).to_dict())
    values = {
        "model": {"name": family},
        "quantization": {"method": "none" if family in UNQUANTIZED else "nf4"},
        "lora": {"rank": 8},
        "data": {"max_length": 16},
        "training": {
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 4 if family in WITH_STATES else 1,
            "gradient_checkpointing": "off" if family in WITHOUT_CHECKPOINTING else "on",
            **training,
        },
    }
    settings = EstimateSettings.model_validate(values)
    loop = uncounted(settings.training.objective)
    estimator = Estimator(facts, evaluates=family in WITH_STATES, whole=whole, loop=loop)
    return estimator.peaks(settings, gpu)


@pytest.mark.parametrize("family", EVERY)
def test_few_layers_of_every_family_extend_to_the_memory_of_all(family: str, spy: Spy) -> None:
    few = estimate(family, whole=False)
    if family in WHOLE:
        assert spy.extended == []
        return
    assert len(spy.extended) == 1
    assert spy.whole == []
    all_of_them = estimate(family, whole=True)
    assert peaks(spy.extended[0]) == peaks(spy.whole[0])
    assert few == all_of_them


@pytest.mark.parametrize("family", THREE)
def test_few_layers_extend_to_the_memory_of_all_for_pairs(family: str, spy: Spy) -> None:
    few = estimate(family, whole=False, objective="dpo")
    assert few == estimate(family, whole=True, objective="dpo")
    assert peaks(spy.extended[0]) == peaks(spy.whole[0])
    assert any(name.endswith(REFERENCE) for name in spy.extended[0].events)


def test_few_layers_extend_to_the_memory_of_all_for_labels(spy: Spy) -> None:
    few = estimate("llama", whole=False, objective="kto")
    assert few == estimate("llama", whole=True, objective="kto")
    assert any(name.endswith(MISMATCHED) for name in spy.extended[0].events)


def test_pairs_without_a_reference_take_no_more_memory_than_with_one(spy: Spy) -> None:
    with_reference, without = (estimate("llama", whole=False, objective=name) for name in ("dpo", "orpo"))
    assert 0 < without.allocated_bytes <= with_reference.allocated_bytes
    assert not any(name.endswith(REFERENCE) for name in spy.extended[1].events)


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_the_host_holds_the_inputs_of_all_layers_of_one_micro_batch(num_micro_batches: int) -> None:
    settings = EstimateSettings.model_validate(
        {
            "model": {"name": "llama"},
            "data": {"max_length": 1024},
            "training": {
                "micro_batch_size": 4,
                "gradient_accumulation_steps": num_micro_batches,
                "gradient_checkpointing": "offload",
            },
        }
    )
    config = deep_config("llama", 7, max_position_embeddings=1024)
    traced = Estimator(ModelFacts(name="llama", content=config.to_dict())).traced(settings, A100)
    assert traced.pinned_host_bytes == 7 * 4 * 1024 * config.hidden_size * 2


def test_all_families_are_extended_but_the_one_that_shares_weights_between_layers() -> None:
    assert set(WHOLE) == {family for family in FAMILIES if find_stack(shapes_of(family)) is None}
    assert len(FAMILIES) - len(WHOLE) >= 60


def shapes_of(family: str) -> Any:
    return build_on_meta(deep_config(family), torch.bfloat16)


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_be_traced_is_refused_with_the_reason(family: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[family]) as caught:
        estimate(family, whole=False)
    assert caught.value.hint


@pytest.mark.parametrize("family", sorted(WITHOUT_CHECKPOINTING))
def test_checkpointing_is_refused_if_transformers_lacks_it(family: str) -> None:
    with pytest.raises(ModelError, match="does not support gradient checkpointing"):
        estimate(family, whole=False, gradient_checkpointing="on")


# Changes to a step of one row of 64 tokens with checkpointing, and to the settings of the adapter.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "checkpointing off": ({"checkpointing": "off"}, {}),
    "checkpointing on the host": ({"checkpointing": "offload"}, {}),
    "selective checkpointing": ({"checkpointing": "selective"}, {}),
    "selective checkpointing of padded rows": ({"checkpointing": "selective", "batch_size": 2}, {}),
    "one micro-batch": ({"gradient_accumulation_steps": 1}, {}),
    "several micro-batches": ({"gradient_accumulation_steps": 4}, {}),
    "evaluation": ({"evaluates": True}, {}),
    "packing": ({"is_packed": True, "batch_size": 2}, {}),
    "padded rows": ({"batch_size": 2}, {}),
    "padded rows without checkpointing": ({"batch_size": 2, "checkpointing": "off"}, {}),
    "eager": ({"attention": "eager"}, {}),
    "flash attention": ({"attention": "flash_attention_2", "batch_size": 2}, {}),
    "a GPU without bf16": ({"capability": (7, 5), "dtype": torch.float16}, {}),
    "sharded": ({"num_shards": 2}, {}),
    "sharded without checkpointing": ({"num_shards": 2, "checkpointing": "off"}, {}),
    "shards on the host": ({"num_shards": 2, "shards_on_host": True}, {}),
    "shards on the host without checkpointing": (
        {"num_shards": 2, "shards_on_host": True, "checkpointing": "off"},
        {},
    ),
    "shards on the host with selective checkpointing": (
        {"num_shards": 4, "shards_on_host": True, "checkpointing": "selective"},
        {},
    ),
    "some targets": ({}, {"target_modules": ("q_proj", "v_proj")}),
    "dropout": ({}, {"dropout": 0.1}),
}


@cache
def few_and_whole(family: str, step_with_adapter: str | None) -> tuple[MetaModel, MetaModel]:
    """Return a model of six layers, reduced and whole, for all steps that do not change its adapter."""
    adapter = {} if step_with_adapter is None else STEPS[step_with_adapter][1]
    config = deep_config(family, 6, **THREE[family])
    few, whole = (meta_model_of(config, whole=is_whole, **adapter) for is_whole in (False, True))
    return few, whole


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", THREE)
def test_few_layers_extend_in_every_kind_of_step(family: str, step: str) -> None:
    changes, adapter = STEPS[step]
    settings = step_settings(**{"gradient_accumulation_steps": 1, "evaluates": False, **changes})
    few, whole = few_and_whole(family, step if adapter else None)
    assert few.stack is not None
    assert len(few.chosen) < len(few.stack.kinds) == 6
    extended = extend(trace_step(few, settings, UncountedStep).trace, few.stack, few.chosen)
    assert peaks(extended) == peaks(passes_of(trace_step(whole, settings, UncountedStep).trace))


def test_adapters_on_experts_extend_too() -> None:
    config = deep_config("qwen3_moe", 6)
    few, whole = (meta_model_of(config, whole=is_whole, target_parameters="all-experts") for is_whole in (False, True))
    assert few.stack is not None
    extended = extend(trace_step(few, step_settings(), UncountedStep).trace, few.stack, few.chosen)
    assert peaks(extended) == peaks(passes_of(trace_step(whole, step_settings(), UncountedStep).trace))


def test_experts_are_predicted_in_fp16_on_a_gpu_that_has_no_grouped_products() -> None:
    few, whole = (estimate("mixtral", whole=is_whole, gpu=T4) for is_whole in (False, True))
    assert few == whole
    assert few != estimate("mixtral", whole=False, gpu=A100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_experts_are_predicted_in_every_dtype(dtype: torch.dtype) -> None:
    functions = GpuFunctions((8, 0))
    rows = torch.empty((48, 64), dtype=dtype, device="meta", requires_grad=True)
    weights = torch.empty((4, 64, 128), dtype=dtype, device="meta")
    offs = torch.empty(4, dtype=torch.int32, device="meta")
    with functions:
        products = torch.nn.functional.grouped_mm(rows, weights, offs=offs)
    assert (products.shape, products.dtype) == ((48, 128), dtype)
    torch.autograd.backward(products.sum())
    assert rows.grad is not None
    assert rows.grad.shape == rows.shape


def test_targets_named_by_the_number_of_their_layer_are_traced_whole() -> None:
    meta_model = meta_model_of(deep_config("llama"), whole=False, target_modules=("model.layers.3.self_attn.q_proj",))
    assert meta_model.stack is None
    assert len(meta_model.model.get_base_model().model.layers) == 7


def test_a_layer_in_16_bit_is_a_kind_of_its_own() -> None:
    config = deep_config("llama")
    skip = QuantizationSettings(skip_modules=("model.layers.2.mlp.down_proj",))
    few, whole = (meta_model_of(config, whole=is_whole, quantization=skip) for is_whole in (False, True))
    assert few.stack is not None
    assert few.stack.kinds == (0, 0, 1, 0, 0, 0, 0)
    extended = extend(trace_step(few, step_settings(), UncountedStep).trace, few.stack, few.chosen)
    assert peaks(extended) == peaks(passes_of(trace_step(whole, step_settings(), UncountedStep).trace))


def test_allocations_and_releases_that_do_not_match_are_an_error_not_a_guess() -> None:
    meta_model = meta_model_of(deep_config("llama"), whole=False)
    assert meta_model.stack is not None
    trace = trace_step(meta_model, step_settings()).trace
    segment = next(segment for segment in trace.segments if segment.mark == ("first backward", 1))
    segment.events.append(next(event for event in segment.events if event < 0))  # one release too many
    with pytest.raises(UnevenError, match="is released, but not allocated"):
        extend(trace, meta_model.stack, meta_model.chosen)


def test_the_estimator_traces_the_whole_model_if_extension_fails(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    def uneven(*_: Any) -> Passes:
        raise UnevenError

    monkeypatch.setattr(estimator, "extend", uneven)
    traced_whole = estimate("llama", whole=False)
    assert len(spy.whole) == 1
    assert traced_whole == estimate("llama", whole=True)
