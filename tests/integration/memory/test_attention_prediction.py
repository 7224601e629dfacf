"""The attention that a run would choose on a GPU is the one that is predicted, with its memory by length."""

from typing import Any

import pytest
import torch

from qlora_cli.attention.choice import choose_attention
from qlora_cli.attention.expanded_heads import EXPANDED_SDPA, register_expanded_sdpa
from qlora_cli.attention.flex import FLEX, finished
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.tracing.extension import passes_of
from qlora_cli.memory.tracing.meta_model import MetaModel
from qlora_cli.memory.tracing.sdpa import flash
from qlora_cli.memory.tracing.training_step import TracedStep, trace_step
from qlora_cli.settings.models import EstimateSettings
from tests.support.models.tracing import deep_config, meta_model_of, peaks, step_settings

T4, AMPERE = (7, 5), (8, 0)
HALF, BF16 = torch.float16, torch.bfloat16
LENGTHS = (512, 1024, 2048)
# A batch of one row, of rows that differ in length, and of packed rows: without a mask, and with one for two reasons.
BATCHES: dict[str, dict[str, Any]] = {
    "one row": {},
    "padded": {"batch_size": 2},
    "packed": {"batch_size": 2, "is_packed": True},
}


@pytest.fixture(scope="module")
def model() -> MetaModel:
    """Return a model of two layers whose eight heads share keys and values in pairs."""
    register_expanded_sdpa()
    config = deep_config(
        "llama", 2, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=8192, hidden_size=128
    )
    return meta_model_of(config, whole=True)


def traced(model: MetaModel, attention: str, length: int, capability: tuple[int, int], batch: str) -> TracedStep:
    dtype = HALF if capability < AMPERE else BF16
    changes = {"attention": attention, "length": length, "capability": capability, "dtype": dtype}
    return trace_step(model, step_settings(**changes, **BATCHES[batch]))


def peak_bytes(step: TracedStep) -> int:
    return max(allocated for allocated, _ in peaks(passes_of(step.trace)).values())


def test_before_ampere_memory_grows_with_the_length_and_not_with_its_square(model: MetaModel) -> None:
    expanded = [traced(model, EXPANDED_SDPA, length, T4, "one row") for length in LENGTHS]
    shared = [traced(model, "sdpa", length, T4, "one row") for length in LENGTHS]
    assert {step.backends for step in expanded} == {("efficient",)}
    assert {step.backends for step in shared} == {("math",)}
    for length, ours, theirs in zip(LENGTHS, expanded, shared, strict=True):
        scores = 8 * length**2 * 2
        assert scores not in {storage.num_bytes for storage in ours.trace.storages}
        assert scores in {storage.num_bytes for storage in theirs.trace.storages}
    first, second, third = (peak_bytes(step) for step in expanded)
    assert third - second == pytest.approx(2 * (second - first), rel=0.01)
    first, second, third = (peak_bytes(step) for step in shared)
    assert third - second > 3 * (second - first)


@pytest.mark.parametrize("batch", ["padded", "packed"])
@pytest.mark.parametrize("capability", [T4, AMPERE])
def test_with_a_mask_nothing_changes(model: MetaModel, capability: tuple[int, int], batch: str) -> None:
    for length in LENGTHS[:2]:
        ours, theirs = (
            passes_of(traced(model, attention, length, capability, batch).trace)
            for attention in (EXPANDED_SDPA, "sdpa")
        )
        assert ours.events == theirs.events
        assert [one.num_bytes for one in ours.storages] == [one.num_bytes for one in theirs.storages]


@pytest.mark.parametrize(
    ("family", "changes", "gpu", "expected"),
    [
        ("llama", {}, "T4", ("efficient",)),
        ("llama", {}, "RTX 4090", ("flash",)),
        ("llama", {}, "H100 80GB", ("flash",)),
        ("llama", {"head_dim": 208}, "RTX 4090", ("efficient", "flash")),  # an evaluation needs no backward pass
        ("llama", {"head_dim": 208}, "A100 80GB", ("flash",)),
        ("gemma2", {}, "T4", ("blockwise",)),
        ("gemma2", {}, "RTX 4090", ("blockwise",)),
        ("gpt_oss", {}, "H100 80GB", ("blockwise",)),
    ],
)
def test_the_estimator_names_the_kernels_of_each_gpu(
    family: str, changes: dict[str, Any], gpu: str, expected: tuple[str, ...]
) -> None:
    settings = EstimateSettings.model_validate(
        {"model": {"name": family}, "data": {"max_length": 64}, "training": {"micro_batch_size": 1}}
    )
    facts = ModelFacts(name=family, content=deep_config(family, 2, **changes).to_dict())
    assert Estimator(facts, evaluates=True).traced(settings, find_gpu(gpu)).backends == expected


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama"])
def test_flex_attention_takes_memory_that_grows_with_the_length(family: str) -> None:
    model = meta_model_of(deep_config(family, 2, max_position_embeddings=8192), whole=True)
    growth = {}
    for name in (FLEX, "eager"):
        steps = [traced(model, name, length, AMPERE, "one row") for length in LENGTHS]
        assert {step.backends for step in steps} == {("flex_attention" if name == FLEX else name,)}
        first, second, third = map(peak_bytes, steps)
        growth[name] = (third - second) / (second - first)
    assert growth[FLEX] == pytest.approx(2, rel=0.02)
    assert growth["eager"] > 3


@pytest.mark.parametrize("batch", BATCHES)
def test_flex_attention_takes_what_flash_attention_does(model: MetaModel, batch: str) -> None:
    """Padded rows are not packed for it, so it makes no copies."""
    for length in LENGTHS:
        ours, theirs = (peak_bytes(traced(model, name, length, AMPERE, batch)) for name in (FLEX, "flash_attention_2"))
        assert ours < theirs if batch == "padded" else ours == theirs


def test_sinks_add_a_product_to_flex_attention_and_gradients_reach_them() -> None:
    sink = torch.zeros(4, device="meta", requires_grad=True)
    query = torch.empty(1, 4, 64, 16, device="meta", dtype=BF16, requires_grad=True)
    result, lse = flash(query, query, query)
    with_sink = finished(result, lse, sink)
    assert with_sink.shape == (1, 64, 4, 16)
    assert with_sink.dtype == BF16
    torch.autograd.backward(with_sink.float().sum())
    assert sink.grad is not None
    assert query.grad is not None


def test_what_is_chosen_for_a_run_is_what_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def record(*arguments: Any, **options: Any) -> Any:
        chosen = choose_attention(*arguments, **options)
        seen.append(chosen.implementation)
        return chosen

    monkeypatch.setattr("qlora_cli.memory.estimator.choose_attention", record)
    facts = ModelFacts(name="llama", content=deep_config("llama", 2).to_dict())
    settings = EstimateSettings.model_validate({"model": {"name": "llama"}, "data": {"max_length": 64}})
    for gpu in ("T4", "RTX 4090"):
        Estimator(facts).traced(settings, find_gpu(gpu))
    assert seen == [EXPANDED_SDPA, "sdpa"]
