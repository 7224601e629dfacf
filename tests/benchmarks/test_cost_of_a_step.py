"""What `benchmarks/cost_of_a_step.py` compares a step with: the published algorithm, a floor, published throughput."""

from collections import defaultdict

import pytest

from benchmarks.cost_of_a_step import Case, find_model, traced_costs
from benchmarks.published_algorithm import StepShape, floor_flops, published_operations, shape_of
from qlora_cli.errors import UsageError
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.settings.choices import Dtype
from qlora_cli.timing.operation import OperationKind, Pass
from tests.support.models.counted_steps import (
    GPU,
    NUM_WEIGHTS,
    ONE_LAYER,
    RANK,
    TOKENS,
    counted,
    flops_by_kind,
    settings_of,
)
from tests.support.models.tracing import deep_config


def test_products_of_the_published_algorithm_are_those_of_a_step_that_recomputes_layers() -> None:
    config = deep_config("llama", 3, **ONE_LAYER)
    traced = flops_by_kind(counted(config, "on", fused=False))
    model = Estimator(ModelFacts(name="tiny", content=config.to_dict())).shapes(settings_of("on"), Dtype.BF16)
    shape = shape_of(model, rank=RANK, rows=1, length=TOKENS)
    published: dict[tuple[OperationKind, Pass], int] = defaultdict(int)
    for operation in published_operations(shape):
        published[operation.kind, operation.run_in] += operation.flops
    assert shape.num_weights == 3 * NUM_WEIGHTS
    for key in [
        (kind, run_in)
        for kind in (OperationKind.BASE_GEMM, OperationKind.ATTENTION)
        for run_in in Pass
        if run_in != Pass.UPDATE
    ]:
        assert published[key] == traced[key]
    assert published[OperationKind.LORA_GEMM, Pass.FORWARD] == traced[OperationKind.LORA_GEMM, Pass.FORWARD]
    needed = published[OperationKind.BASE_GEMM, Pass.FORWARD] + published[OperationKind.BASE_GEMM, Pass.BACKWARD]
    assert (
        floor_flops(shape)
        == needed + published[OperationKind.LOSS, Pass.FORWARD] + published[OperationKind.LOSS, Pass.BACKWARD]
    )


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


@pytest.mark.parametrize("name", ["gpt2", "qwen3-30b-a3b", "gemma-3-4b-no-such"])
def test_a_model_that_the_comparison_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is no dense decoder|no model '{name}'"):
        traced_costs(Case(model=find_model(name), gpu=GPU, length=64, rows=1, rank=RANK))
