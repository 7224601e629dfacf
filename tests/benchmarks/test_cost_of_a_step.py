"""The cost of a step that `benchmarks/cost_of_a_step.py` counts: FLOPs as by hand, and bytes by operator."""

from collections import defaultdict
from typing import Any

import pytest
import torch

from benchmarks.cost_of_a_step import RATES, Case, Rate, cost_of, find_model, seconds_of, traced_costs
from benchmarks.published_algorithm import StepShape, floor_flops, published_operations, shape_of
from benchmarks.published_speed import predicted, read_rows
from benchmarks.step_operations import Count, Kind, Operation, Owner, Pass, operations_of
from qlora_cli.errors import UsageError
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.settings.choices import Dtype
from qlora_cli.settings.models import EstimateSettings
from tests.support.models.tracing import deep_config

GPU = find_gpu("RTX 4090")
RANK, TOKENS = 8, 96
Sums = dict[tuple[Kind, Pass], tuple[int, int, int]]
ONE_LAYER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
LINEARS = ((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64))  # (in, out): q k v o gate up down
NUM_WEIGHTS = sum(wide * narrow for wide, narrow in LINEARS)
LORA_FLOPS = 2 * TOKENS * RANK * sum(wide + narrow for wide, narrow in LINEARS)
ATTENTION_FLOPS = 2 * TOKENS**2 * 64  # the causal half of two products of 4 heads, 16 wide
HEAD_FLOPS = 2 * (TOKENS - 1) * 512 * 64  # the first token is no target


def settings_of(checkpointing: str, *, fused: bool = True) -> EstimateSettings:
    return EstimateSettings.model_validate(
        {
            "model": {"name": "tiny"},
            "lora": {"rank": RANK},
            "data": {"max_length": TOKENS},
            "training": {
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": checkpointing,
                "fused_lora": fused,
            },
        }
    )


def counted(config: Any, checkpointing: str, *, whole: bool = False, fused: bool = True) -> Sums:
    """Return how many operations, FLOPs and bytes a step has, by kind and pass."""
    count, facts = Count(), ModelFacts(name="tiny", content=config.to_dict())
    Estimator(facts, evaluates=False, whole=whole, loop=count.loop).estimate(
        settings_of(checkpointing, fused=fused), GPU
    )
    sums: dict[tuple[Kind, Pass], list[int]] = defaultdict(lambda: [0, 0, 0])
    for times, operation in count.extended():
        for index, amount in enumerate((1, operation.flops, operation.num_bytes)):
            sums[operation.kind, operation.run_in][index] += times * amount
    return {key: (number, flops, num_bytes) for key, (number, flops, num_bytes) in sums.items()}


def flops_by_kind(sums: Sums) -> dict[tuple[Kind, Pass], int]:
    return {key: flops for key, (_, flops, _) in sums.items() if flops}


@pytest.mark.parametrize("checkpointing", ["on", "selective", "off"])
def test_the_flops_of_one_layer_are_those_counted_by_hand(checkpointing: str) -> None:
    flops = flops_by_kind(counted(deep_config("llama", 1, **ONE_LAYER), checkpointing))
    base = 2 * TOKENS * NUM_WEIGHTS
    # Without checkpointing nothing asks for the gradient of the embeddings: not q, k, v, but the others.
    first = 2 * TOKENS * sum(wide * narrow for wide, narrow in LINEARS[:3]) if checkpointing == "off" else 0
    assert flops.pop((Kind.BASE_GEMM, Pass.FORWARD)) == base
    assert flops.pop((Kind.BASE_GEMM, Pass.BACKWARD)) == base - first
    assert flops.pop((Kind.ATTENTION, Pass.FORWARD)) == ATTENTION_FLOPS
    assert flops.pop((Kind.ATTENTION, Pass.BACKWARD)) == 2.5 * ATTENTION_FLOPS
    if checkpointing == "on":
        last = 2 * TOKENS * LINEARS[-1][0] * LINEARS[-1][1]  # nothing needs its result again
        assert flops.pop((Kind.BASE_GEMM, Pass.RECOMPUTE)) == base - last
        assert flops.pop((Kind.ATTENTION, Pass.RECOMPUTE)) == ATTENTION_FLOPS
    assert flops.pop((Kind.LORA_GEMM, Pass.FORWARD)) == LORA_FLOPS
    assert flops.pop((Kind.LORA_GEMM, Pass.BACKWARD)) <= 2 * LORA_FLOPS
    if checkpointing != "off":
        assert flops.pop((Kind.LORA_GEMM, Pass.RECOMPUTE)) <= LORA_FLOPS
    loss = flops.pop((Kind.LOSS, Pass.FORWARD)) + flops.pop((Kind.LOSS, Pass.BACKWARD), 0)
    assert loss == 2 * HEAD_FLOPS  # logits, and the gradient of the hidden states
    assert flops == {}


@pytest.mark.parametrize("checkpointing", ["on", "selective", "off"])
def test_counting_does_not_change_the_memory_of_a_step(checkpointing: str) -> None:
    facts, settings = ModelFacts(name="tiny", content=deep_config("llama").to_dict()), settings_of(checkpointing)
    counted_too = Estimator(facts, loop=Count().loop)
    assert counted_too.traced(settings, GPU) == Estimator(facts).traced(settings, GPU)


@pytest.mark.parametrize(("family", "checkpointing"), [("llama", "on"), ("qwen3", "off"), ("gemma3_text", "on")])
def test_few_layers_extend_to_the_operations_of_all(family: str, checkpointing: str) -> None:
    config = deep_config(family, 6)
    of_few, of_all = counted(config, checkpointing), counted(config, checkpointing, whole=True)
    assert of_few == of_all
    assert {Kind.BASE_GEMM, Kind.NORM, Kind.ROPE, Kind.MLP, Kind.LOSS} <= {kind for kind, _ in of_all}


def test_products_of_the_published_algorithm_are_those_of_a_step_that_recomputes_layers() -> None:
    config = deep_config("llama", 3, **ONE_LAYER)
    traced = flops_by_kind(counted(config, "on", fused=False))
    model = Estimator(ModelFacts(name="tiny", content=config.to_dict())).shapes(settings_of("on"), Dtype.BF16)
    shape = shape_of(model, rank=RANK, rows=1, length=TOKENS)
    published: dict[tuple[Kind, Pass], int] = defaultdict(int)
    for operation in published_operations(shape):
        published[operation.kind, operation.run_in] += operation.flops
    assert shape.num_weights == 3 * NUM_WEIGHTS
    for key in [
        (kind, run_in) for kind in (Kind.BASE_GEMM, Kind.ATTENTION) for run_in in Pass if run_in != Pass.UPDATE
    ]:
        assert published[key] == traced[key]
    assert published[Kind.LORA_GEMM, Pass.FORWARD] == traced[Kind.LORA_GEMM, Pass.FORWARD]
    needed = published[Kind.BASE_GEMM, Pass.FORWARD] + published[Kind.BASE_GEMM, Pass.BACKWARD]
    assert floor_flops(shape) == needed + published[Kind.LOSS, Pass.FORWARD] + published[Kind.LOSS, Pass.BACKWARD]


@torch.library.custom_op("qlora_tests::unknown", mutates_args=())
def unknown(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first + second


def cost(func: Any, *args: Any, owner: Owner | None = None, **kwargs: Any) -> Operation:
    """Return what a call costs."""
    owner = owner or Owner(Kind.RESIDUAL)
    (operation,) = operations_of(func, args, kwargs, func(*args, **kwargs), owner, Pass.FORWARD, TOKENS)
    return operation


def test_an_operator_moves_its_inputs_and_outputs() -> None:
    aten, values = torch.ops.aten, torch.ones(3, 4)
    assert cost(aten.add.Tensor, values, values).num_bytes == 3 * 48
    assert cost(aten.add_.Tensor, values, values.half()).num_bytes == 2 * 48 + 24
    assert cost(aten.add.Tensor, values, torch.ones(3, 1).expand(3, 4)).num_bytes == 2 * 48 + 12
    assert cost(aten.copy_.default, values, values.half()).num_bytes == 48 + 24
    assert cost(aten.zero_.default, values).num_bytes == 48
    assert cost(aten.zeros_like.default, values).num_bytes == 48
    assert cost(aten.embedding.default, torch.ones(1000, 4), torch.zeros(3, dtype=torch.long)).num_bytes == 2 * 48 + 24
    rows, ids = torch.ones(1000, 4), torch.tensor([1, 5, 7])
    assert cost(aten.index_select.default, rows, 0, ids).num_bytes == 2 * 48 + 24
    assert cost(aten.index_copy_.default, rows, 0, ids, values).num_bytes == 2 * 48 + 24
    assert cost(aten.add.Tensor, values, values).kernels == 1


@pytest.mark.parametrize("name", ["t", "detach", "_unsafe_view", "empty_like"])
def test_what_moves_no_bytes_takes_time_of_the_host_alone(name: str) -> None:
    arguments = ([4, 3],) if name == "_unsafe_view" else ()
    operation = cost(getattr(torch.ops.aten, name).default, torch.ones(3, 4), *arguments)
    assert (operation.flops, operation.num_bytes, operation.kernels) == (0, 0, 0)


def test_an_operator_that_no_rule_knows_is_counted_by_its_bytes_and_named() -> None:
    operation = cost(torch.ops.qlora_tests.unknown.default, torch.ones(3, 4), torch.ones(3, 4))
    assert (operation.operator, operation.is_known) == ("qlora_tests::unknown", False)
    assert (operation.flops, operation.num_bytes, operation.kernels) == (0, 3 * 48, 1)


def test_a_product_of_an_adapted_layer_is_the_adapters_if_it_is_narrow() -> None:
    mm, owner = torch.ops.aten.mm.default, Owner(Kind.LORA, width=64)
    base = cost(mm, torch.ones(TOKENS, 64), torch.ones(64, 128), owner=owner)
    assert (base.kind, base.flops) == (Kind.BASE_GEMM, 2 * TOKENS * 64 * 128)
    for first, second in (((TOKENS, 64), (64, RANK)), ((TOKENS, RANK), (RANK, 128)), ((RANK, TOKENS), (TOKENS, 64))):
        assert cost(mm, torch.ones(first), torch.ones(second), owner=owner).kind == Kind.LORA_GEMM
    added = cost(torch.ops.aten.addmm.default, torch.ones(128), torch.ones(TOKENS, 64), torch.ones(64, 128))
    assert (added.flops, added.num_bytes) == (base.flops, base.num_bytes + 4 * 128)


def test_an_operation_takes_the_longest_of_arithmetic_traffic_and_launch() -> None:
    rate = Rate(flops=1e12, bytes_=1e9, dequantization_share=0.5)

    def operation(kind: Kind, *, flops: int = 0, num_bytes: int = 0) -> Operation:
        return Operation(Pass.FORWARD, kind, "any", flops, num_bytes, 1)

    assert seconds_of(operation(Kind.BASE_GEMM, flops=10**12, num_bytes=10**8), rate) == 1
    assert seconds_of(operation(Kind.NORM, flops=10**9, num_bytes=10**9), rate) == 1
    assert seconds_of(operation(Kind.DEQUANTIZATION, num_bytes=10**9), rate) == 2
    assert seconds_of(operation(Kind.NORM, num_bytes=1), rate) == 2e-6
    whole = cost_of([(3, operation(Kind.NORM, num_bytes=10**9))], rate)
    assert whole.device_seconds == sum(row.seconds for row in whole.rows) == 3
    assert whole.host_seconds == pytest.approx(3 * 11e-6)
    assert whole.seconds == 3


def test_the_shape_of_a_step_counts_rows_times_tokens() -> None:
    shape = StepShape(
        linears=((2, 3),),
        num_layers=1,
        hidden_size=2,
        intermediate_size=3,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        vocab_size=5,
        rank=1,
        rows=4,
        length=8,
    )
    assert floor_flops(shape) == 4 * 32 * (2 * 3 + 5 * 2)


def test_the_model_is_within_a_factor_of_two_of_published_throughput() -> None:
    rows = read_rows()
    assert {row["algorithm"] for row in rows} == {"traced", "published"}
    for row in rows:
        assert row["gpu"] in RATES
        assert find_model(row["model"]).name == row["model"]
        assert row["source"]
    ratios = [predicted(row) / float(row["tokens_per_second"]) for row in (rows[0], rows[-1])]
    assert all(1 / 2 < ratio < 2 for ratio in ratios)


@pytest.mark.parametrize("name", ["gpt2", "qwen3-30b-a3b", "gemma-3-4b-no-such"])
def test_a_model_that_the_comparison_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is no dense decoder|no model '{name}'"):
        traced_costs(Case(model=find_model(name), gpu=GPU, rate=RATES[GPU.name], length=64, rows=1, rank=RANK))
