"""Run directories: records and events, read by everything that reads them, and resumed from."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.runs.detail import detail_of
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.find_runs import read_run
from qlora_cli.runs.record import load_record
from qlora_cli.runs.report.run_page import report_page
from qlora_cli.runs.run_result import TrainResult
from qlora_cli.runs.run_weights import weights_of
from qlora_cli.settings.models import OutputSettings
from qlora_cli.training.resuming.resume import find_resume, output_problem
from tests.fuzzing.frame import Generator, Target, damage
from tests.fuzzing.json_values import as_bytes
from tests.support.runs.run_directories import a_record, eval_done, lines_of, sample_done, step_done

EVENTS = [
    {"event": "training_started", "time": "2024-05-01T10:00:00+00:00", "num_steps": 100, "output": "run"},
    *map(
        json.loads, lines_of([*map(step_done, range(1, 30)), eval_done(20, 1.5), sample_done(20), eval_done(25, 1.0)])
    ),
    {"event": "step_skipped", "time": "2024-05-01T10:00:00+00:00", "step": 22, "reason": "x", "rows": ["a"]},
    {"event": "training_resumed", "time": "2024-05-01T10:00:00+00:00", "step": 22, "num_steps": 9, "checkpoint": "x"},
]
RESULT = {"steps": 5, "num_steps": 5, "best_step": 5, "peak_memory": {"host_bytes": 5}, "seconds": 1.5}
MORE = {
    "schema_version": 1,
    "resumed": [{"step": 5, "checkpoint": "checkpoints/step-5", "from_run": "../x"}],
    "named_from": {"directory": "/x", "from_run": ".."},
    "base_model": {"base_model": "x", "adapter": "y", "dtype_bytes": {"bf16": 5}},
    "base_model_path": "/x",
    "pid": 1,
    "host": "x",
    "result": RESULT,
}


def _records(directory: Path) -> Callable[[Generator], None]:
    run = RunDirectory(directory / "run")
    run.create()
    (run.checkpoints / "step-²").mkdir()
    run.metrics_file.write_text("".join(f"{line}\n" for line in lines_of([step_done(1)])))

    def play_round(chance: Generator) -> None:
        run.run_file.write_bytes(as_bytes(a_record(chance.choice(["done", "interrupted"]), **MORE), chance))
        recorded_run = read_run(run.path)
        detail_of(recorded_run).as_json()
        if chance.random() < 0.03:  # its charts take as long as thirty rounds without
            report_page(recorded_run.summary, recorded_run.history, recorded_run.record)
        output_problem(OutputSettings(directory=run.path))
        record = load_record(run.path)
        assert [*record.settings_used] == [*record.updated(status="failed").settings_used]
        TrainResult.of_run(run, record)
        for entry in record.resumed:
            record.checkpoint_candidates(entry)
        for read in (record.base, lambda: record.settings_of("model", "x"), lambda: weights_of(run, record)):
            with suppress(ModelError):
                read()
        find_resume(OutputSettings(directory=run.path))

    return play_round


def _metrics(directory: Path) -> Callable[[Generator], None]:
    run = RunDirectory(directory / "run")
    run.create()
    run.run_file.write_text(json.dumps(a_record()))

    def play_round(chance: Generator) -> None:
        lines = [as_bytes(line, chance) if chance.random() < 0.3 else json.dumps(line).encode() for line in EVENTS]
        content = b"\n".join(lines)
        run.metrics_file.write_bytes(damage(content, chance) if chance.random() < 0.2 else content)
        recorded_run = read_run(run.path)
        detail_of(recorded_run).as_json()
        if chance.random() < 0.03:  # its charts take as long as thirty rounds without
            report_page(recorded_run.summary, recorded_run.history, recorded_run.record)

    return play_round


RECORD = Target(name="record", prepare=_records, num_rounds=125)
METRICS = Target(name="metrics", prepare=_metrics, num_rounds=125)
