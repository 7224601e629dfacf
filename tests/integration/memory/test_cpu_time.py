"""The time of a step on a CPU: predicted within a quarter by rates measured right before, and compared by a run."""

import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
import torch

from benchmarks.synthetic import SHAPES, config_of, write_model
from qlora_cli.events import Event, Noted, StepDone, TrainingStarted
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import this_cpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.runs.find_runs import read_run
from qlora_cli.runs.run_result import PredictedTime, TrainResult
from qlora_cli.settings.models import EstimateSettings, TrainSettings
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from qlora_cli.timing.measuring import measure_rates
from qlora_cli.timing.rates_file import store_rates
from qlora_cli.training.callbacks import step_timer
from qlora_cli.training.callbacks.step_timer import NUM_LEARNT
from qlora_cli.training.checks.predicted_time import cpu_step_time
from qlora_cli.training.train_run import plan, train
from tests.conftest import Recorder, train_settings

CPU = torch.device("cpu")
# The model of 107M parameters of `benchmarks/cpu_step.py`, two of its twelve layers, and the rows of that benchmark.
# Of shorter rows, what the loop does besides computing is a twentieth of a step on a fast CPU, and not predicted.
SHAPE = replace(SHAPES["107m"], num_layers=2)
ROWS, LENGTH = 2, 512
NUM_ROUNDS = 3
WITHIN = 1.25


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # The time of one thread is that of its process, whatever else runs on the machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))


def estimator() -> Estimator:
    return Estimator(ModelFacts(name="107m", content=config_of(SHAPE)))


def predicted_seconds(dtype: str = "fp32") -> float | None:
    settings = EstimateSettings.model_validate(
        {
            "model": {"name": "107m", "dtype": dtype},
            "data": {"max_length": LENGTH},
            "training": {"micro_batch_size": ROWS, "gradient_accumulation_steps": 1},
        }
    )
    predicted = cpu_step_time(estimator(), settings)
    return None if predicted is None else predicted.step_seconds


@dataclass
class Measured:
    """Takes the CPU time of each step, and measures the rates before it."""

    ratios: list[float] = field(default_factory=list)
    start: float = 0.0

    def report(self, event: Event) -> None:
        if isinstance(event, StepDone):
            seconds, predicted = time.process_time() - self.start, predicted_seconds()
            assert predicted is not None
            self.ratios.append(predicted / seconds)
        if isinstance(event, StepDone | TrainingStarted):
            rates = measure_rates(CPU, torch.float32, seconds=0.5)
            store_rates(this_cpu().measured_as, "fp32", rates)
            self.start = time.process_time()


def run_settings(directory: Path) -> Resolved[TrainSettings]:
    write_model(directory / "model", SHAPE)
    generator = random.Random(0)  # noqa: S311 - reproducible rows, no secret
    rows = [[generator.randrange(2, 4096) for _ in range(LENGTH)] for _ in range(ROWS)]
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
    values = {
        "model.name": str(directory / "model"),
        "model.dtype": "fp32",
        "model.device": "cpu",
        "data.dataset": str(file),
        "training.max_steps": NUM_ROUNDS + 1,
        "training.micro_batch_size": ROWS,
        "training.gradient_accumulation_steps": 1,
        "output.directory": str(directory / "run"),
    }
    return resolve(Sources(flags={path: (path, value) for path, value in values.items()}), TrainSettings)


@pytest.mark.slow
def test_a_step_takes_within_a_quarter_of_the_time_that_is_predicted_by_measured_rates(tmp_path: Path) -> None:
    measured = Measured()
    train(run_settings(tmp_path), measured)
    of_steps = measured.ratios[1:]  # the first one also allocates
    assert len(of_steps) == NUM_ROUNDS
    assert 1 / WITHIN < statistics.median(of_steps) < WITHIN, of_steps


def test_without_measured_rates_and_in_another_dtype_no_time_is_predicted() -> None:
    assert predicted_seconds() is None
    store_rates(this_cpu().measured_as, "fp32", measure_rates(CPU, torch.float32, seconds=0.0))
    assert predicted_seconds() is not None
    assert predicted_seconds("bf16") is None


def test_a_run_compares_the_time_of_a_step_with_the_prediction(base_model: Path, rows: Path, tmp_path: Path) -> None:
    def run(name: str) -> tuple[TrainResult, Recorder]:
        recorder = Recorder()
        return train(train_settings(base_model, rows, tmp_path / name, training__max_steps=12), recorder), recorder

    unmeasured, _ = run("unmeasured")
    assert unmeasured.predicted_time is None
    assert unmeasured.step_seconds is not None
    store_rates(this_cpu().measured_as, "fp32", measure_rates(CPU, torch.float32, seconds=0.0))
    result, recorder = run("measured")
    predicted = result.predicted_time
    assert predicted is not None
    assert 0 < predicted.step_seconds_low < predicted.step_seconds < predicted.step_seconds_high
    (started,) = [event for event in recorder.events if isinstance(event, TrainingStarted)]
    assert started.predicted_step_seconds == predicted.step_seconds
    (said,) = [
        event.message for event in recorder.events if isinstance(event, Noted) and "a step takes" in event.message
    ]
    assert "predicted" in said
    assert "measured on this machine on" in said
    record = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    assert record["plan"]["predicted_time"] == record["result"]["predicted_time"] == asdict(predicted)
    assert record["result"]["step_seconds"] == result.step_seconds
    summary = read_run(result.output).summary
    assert (summary.step_seconds, summary.predicted_step_seconds) == (result.step_seconds, predicted.step_seconds)


def test_what_rates_miss_is_learnt_from_runs_and_corrects_the_next(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Steps of a tiny model take milliseconds, next to other tests.
    monkeypatch.setattr(step_timer, "MOST_SCATTER", 100.0)
    monkeypatch.setattr(step_timer, "LEAST_CORE_SHARE", 0.0)
    rates = measure_rates(CPU, torch.float32, seconds=0.0)
    store_rates(this_cpu().measured_as, "fp32", replace(rates, dispatch_seconds=4 * rates.dispatch_seconds))

    def run(name: str, steps: int = 12) -> TrainResult:
        return train(train_settings(base_model, rows, tmp_path / name, training__max_steps=steps), Recorder())

    short = run("short", NUM_LEARNT)  # without the first one, too few
    first, second = run("first"), run("second")
    assert short.predicted_time is not None
    assert first.predicted_time is not None
    assert second.predicted_time is not None
    assert first.step_seconds is not None
    assert first.predicted_time.learnt_runs == short.predicted_time.learnt_runs == 0
    assert second.predicted_time.learnt_runs == 1
    assert second.predicted_time.step_seconds == pytest.approx(first.step_seconds)
    planned = plan(train_settings(base_model, rows, tmp_path / "third"), Recorder()).predicted_time
    assert planned is not None
    assert planned.learnt_runs == 2
    (file,) = (tmp_path / "cache" / "rates").glob("*.jsonl")
    assert len(file.read_text(encoding="utf-8").splitlines()) == 2


def test_more_rows_are_predicted_to_take_longer_and_a_stream_is_not_predicted(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    store_rates(this_cpu().measured_as, "fp32", measure_rates(CPU, torch.float32, seconds=0.0))

    def predicted(name: str, **settings: object) -> PredictedTime | None:
        return plan(train_settings(base_model, rows, tmp_path / name, **settings), Recorder()).predicted_time

    whole, half = predicted("whole"), predicted("half", training__micro_batch_size=1)
    twice = predicted("twice", training__gradient_accumulation_steps=2)
    assert whole is not None
    assert half is not None
    assert twice is not None
    assert half.step_seconds < whole.step_seconds
    assert 1.5 * whole.step_seconds < twice.step_seconds < 2.5 * whole.step_seconds
    assert predicted("stream", data__streaming=True) is None
