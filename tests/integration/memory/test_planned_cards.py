"""Plans of real shapes for pretended cards: they fit where anything does, and more memory never makes one slower."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from qlora_cli.memory.catalogue import find_in_catalogue
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.fitting.plan import PlannedRun, plan_run
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.training.batches import average_step
from qlora_cli.units import GIB

SIZES = (8, 12, 16, 24, 48, 80, 141)  # GiB


def card(gib: int) -> Gpu:
    """Return an RTX 4090 with another memory: its kernels and its speed."""
    return replace(find_gpu("RTX 4090"), total_bytes=gib * GIB)


# Models, and the tokens of the rows of which several may fill a micro-batch.
@pytest.fixture(scope="module", params=[("qwen2.5-0.5b", 128), ("llama-3.1-8b", 128), ("llama-3.1-70b", None)])
def plan_for(request: pytest.FixtureRequest) -> Callable[[int], PlannedRun]:
    """Return a function that plans a run of a model for a card of a size; each kind is traced once."""
    name, mean = request.param
    model = find_in_catalogue(name)
    assert model is not None
    estimator = Estimator(ModelFacts(name=model.name, content=dict(model.config)), evaluates=False)
    settings = EstimateSettings.model_validate({"model": {"name": model.name}, "data": {"max_length": 1024}})
    rows = None if mean is None else average_step(np.array([1024, *[mean] * 63]), settings.training)
    return lambda gib: plan_run(settings, card(gib), estimator.estimate, estimator.recomputed_products, rows)


def test_a_plan_fits_and_more_memory_never_makes_it_slower(plan_for: Callable[[int], PlannedRun]) -> None:
    before = float("inf")
    kinds = set()
    for gib in SIZES:
        planned = plan_for(gib)
        chosen = planned.chosen
        assert gib != SIZES[3] or planned.plan == plan_for(gib).plan  # deterministic
        if chosen.fits != "yes":
            assert all(other.fits != "yes" for other in planned.leaner)
            assert before == float("inf"), "it fitted with less memory"
            continue
        assert chosen.high_bytes <= card(gib).usable_bytes
        seconds = chosen.step_seconds
        assert seconds is not None
        assert seconds <= before
        assert all(other.high_bytes < chosen.high_bytes for other in planned.leaner)
        before = seconds
        kinds.add(chosen.estimate.gradient_checkpointing)
    assert "off" in kinds
