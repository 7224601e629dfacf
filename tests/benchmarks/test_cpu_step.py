"""`benchmarks/cpu_step.py`: a plain loop, TRL's trainer and `qlora train` compute the same steps."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu_step
from benchmarks.cpu_step import VARIANTS, check_losses, measure, prepare, summary_of
from benchmarks.cpu_step_case import Paths, Step
from tests.support.processes.forks import FORKS, is_forkable, output_of

pytestmark = pytest.mark.slow


def write_forked(_python: str, size: str, output: Path, **_more: Any) -> None:
    """Make a model as `write_model_in_process` does, without importing everything again."""
    arguments = ["--size", size, "--output", str(output)]
    code, _, errors = output_of(arguments, os.environ, module="benchmarks.synthetic")
    assert code == 0, errors


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paths]:
    """A model, an adapter and rows; all processes fork from one that has imported everything, if they can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_step, "write_model_in_process", write_forked)
        if is_forkable(os.environ):
            patch.setattr(cpu_step, "get_context", lambda _: FORKS)
        yield prepare(tmp_path_factory.mktemp("prepared"), "tiny")


def test_all_programs_train_the_same_adapter_alike(prepared: Paths) -> None:
    chosen = [variant for variant in VARIANTS if variant.name in ("plain-fp32", "trl-fp32", "qlora-fp32")]
    steps = measure(chosen, prepared, warmup=1, rounds=2)
    check_losses(steps, chosen)
    losses = [step.loss for step in steps["plain-fp32"]]
    assert losses[0] > losses[1] > losses[2]  # it learns
    summary = summary_of(steps["qlora-fp32"], steps["plain-fp32"], warmup=1)
    assert summary["speed_ratio"] > 0
    assert summary["first_losses"] == [step.loss for step in steps["qlora-fp32"]]

    changed = dict(steps)
    changed["qlora-fp32"] = [replace(step, loss=step.loss * 1.001) for step in steps["qlora-fp32"]]
    with pytest.raises(RuntimeError, match="step 1: the loss of qlora-fp32"):
        check_losses(changed, chosen)


def test_a_ratio_is_to_the_step_of_the_same_turn() -> None:
    baseline = [Step(cpu_seconds=seconds, loss=1.0, peak_host_bytes=100) for seconds in (9.0, 2.0, 8.0, 4.0)]
    steps = [Step(cpu_seconds=seconds, loss=1.0, peak_host_bytes=50) for seconds in (1.0, 1.0, 4.0, 1.0)]
    summary = summary_of(steps, baseline, warmup=1)
    assert summary["speed_ratio"] == 2.0  # of 2, 2 and 4
    assert summary["memory_ratio"] == 0.5
    assert summary["tokens_per_cpu_second"] == 1024.0


def test_a_variant_that_fails_is_named_with_the_end_of_its_output(prepared: Paths, tmp_path: Path) -> None:
    broken = replace(VARIANTS[0], dtype="fp8")
    with pytest.raises(RuntimeError, match=r"plain-fp32 ended with 1:\n(.*\n)*KeyError: 'fp8'"):
        measure([broken], replace(prepared, output=tmp_path), warmup=0, rounds=1)
