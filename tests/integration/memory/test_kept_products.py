"""Which products a plan keeps: those that a traced step computes twice, by model; and that keeping them is enough."""

from typing import Any

import pytest

from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.prediction import Product
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.timing.operation import OperationKind, Pass
from tests.support.models.tracing import deep_config

GPU = find_gpu("RTX 4090")
TOKENS, WIDTH, MIDDLE, LAYERS = 256, 256, 512, 3
SIZES = {"hidden_size": WIDTH, "intermediate_size": MIDDLE, "num_attention_heads": 4, "num_key_value_heads": 2}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def settings(**training: Any) -> EstimateSettings:
    return EstimateSettings.model_validate(
        {"model": {"name": "tiny"}, "lora": {"rank": 8}, "data": {"max_length": TOKENS}, "training": training}
    )


def estimator_of(family: str) -> Estimator:
    config = deep_config(family, LAYERS, **SIZES, head_dim=64, max_position_embeddings=TOKENS)
    return Estimator(ModelFacts(name="tiny", content=config.to_dict()), evaluates=False)


def recomputed(estimator: Estimator, **training: Any) -> dict[str, Product]:
    products = estimator.recomputed_products(settings(gradient_checkpointing="on", **training), GPU)
    return {product.name: product for product in products}


@pytest.mark.parametrize(
    ("family", "fused", "last"),
    [
        ("llama", True, set()),  # nothing needs the last product of a layer again
        ("llama", False, {"down_proj"}),  # PEFT's layers save something after it
        ("gemma2", True, {"down_proj"}),  # a norm follows it
    ],
)
def test_what_is_computed_twice_is_found_by_the_trace(family: str, fused: bool, last: set[str]) -> None:
    products = recomputed(estimator_of(family), fused_lora=fused)
    assert products.keys() == {*ATTENTION, "gate_proj", "up_proj", *last}
    gate = products["gate_proj"]
    assert gate.kept_bytes == LAYERS * TOKENS * MIDDLE * 2
    assert gate.flops == LAYERS * 2 * TOKENS * WIDTH * MIDDLE


def test_the_tokens_of_a_filled_micro_batch_count() -> None:
    products = recomputed(estimator_of("llama"), micro_batch_tokens=2 * TOKENS)
    assert products["gate_proj"].kept_bytes == LAYERS * 2 * TOKENS * MIDDLE * 2


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_keeping_them_leaves_no_product_to_recompute(family: str) -> None:
    estimator = estimator_of(family)
    products = recomputed(estimator)

    def times(*kept: str) -> int:
        run = settings(gradient_checkpointing="selective", kept_products=list(kept) or None)
        gemms = [
            number
            for number, operation in estimator.traced(run, GPU).micro_batch
            if operation.kind == OperationKind.BASE_GEMM and operation.run_in == Pass.RECOMPUTE
        ]
        return sum(gemms)

    assert times(*products) == 0
    without_one = [name for name in products if name != "gate_proj"]
    assert times(*without_one) == LAYERS
    everything, kept = (
        estimator.estimate(settings(gradient_checkpointing="selective", kept_products=names), GPU)
        for names in (None, list(products))
    )
    saved = everything.predicted.allocated_bytes - kept.predicted.allocated_bytes
    unneeded = 0 if family == "gemma2" else LAYERS * TOKENS * WIDTH * 2
    assert saved == pytest.approx(unneeded, abs=unneeded / LAYERS)
