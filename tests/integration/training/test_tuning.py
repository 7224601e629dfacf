"""A search for the learning rate trains what a run would, chooses by held-out rows, and goes on where it was ended."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import DataError, SettingsError
from qlora_cli.evaluating.paired_losses import LossesOfRows
from qlora_cli.events import Noted
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from qlora_cli.training.train_run import train
from qlora_cli.tuning import tuning_run
from qlora_cli.tuning.trial_bench import TrialBench
from qlora_cli.tuning.trial_steps import TuneRequest
from qlora_cli.tuning.tuning_checks import check_tune
from qlora_cli.tuning.tuning_record import KeptTrial
from qlora_cli.tuning.tuning_result import TuneResult
from tests.conftest import ASSETS, Recorder, short_settings, write_jsonl

IDLE, GOOD, FAR = 1e-9, 5e-3, 0.9
REQUEST = TuneRequest(learning_rates=(IDLE, GOOD, FAR))
STEPS = 16


def settings(base: Path, folder: Path, **changed: object) -> Resolved[TrainSettings]:
    flags = {
        "training__max_steps": STEPS,
        "data__eval_dataset": str(folder / "held-out.jsonl"),
        "lora__dropout": 0.1,
        **changed,
    }
    return short_settings(base, folder / "rows.jsonl", folder / "tune", **flags)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows to train on and to hold out."""
    folder = tmp_path_factory.mktemp("rows")
    for name, of, number in (("rows", "train", 40), ("held-out", "held_out", 10)):
        lines = (ASSETS / f"{of}.jsonl").read_text(encoding="utf-8").splitlines()[:number]
        write_jsonl(folder / f"{name}.jsonl", [json.loads(line) for line in lines])
    return folder


@pytest.fixture(scope="module")
def tuned(base_model: Path, rows: Path) -> TuneResult:
    """The result of a search that nothing interrupted."""
    return tuning_run.tune(settings(base_model, rows), REQUEST, Recorder())


def kept_in(folder: Path) -> dict[str, Any]:
    """Return the record without its times."""
    record: dict[str, Any] = json.loads((folder / "tune.json").read_text())
    return {**record, "trials": [{**one, "seconds": 0} for one in record["trials"]]}


@pytest.mark.fast
def test_the_chosen_rate_is_best_and_a_trial_learns_what_a_run_learns(
    tuned: TuneResult, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    verdicts = {(one.learning_rate, one.num_steps): one.verdict for one in tuned.trials}
    assert verdicts == {(IDLE, 8): "worse", (GOOD, 8): "best", (FAR, 8): "diverged", (GOOD, 16): "best"}
    assert tuned.learning_rate == GOOD
    assert not tuned.is_at_edge
    written = resolve(
        Sources(config=tuned.settings_file, flags={"output.directory": ("--output", str(tmp_path / "run"))}),
        TrainSettings,
    )
    assert replace(written, origins={}).settings.training.learning_rate == GOOD
    asked = settings(base_model, rows, training__learning_rate=GOOD, output__directory=str(tmp_path / "run"))
    assert written.settings == asked.settings
    run = train(written, Recorder())
    assert tuned.trials[-1].loss == pytest.approx(run.eval_loss, abs=1e-6)


# What an adapter may hold besides two matrices that begin at zero, and how rows may be fed.
KINDS: dict[str, dict[str, object]] = {
    "DoRA, packed rows": {"lora__use_dora": True, "data__packing": True, "data__max_length": 256},
    "PiSSA": {"lora__init_lora_weights": "pissa"},
    "a module in full": {"lora__modules_to_save": ["lm_head"]},
    "filled micro-batches": {"training__micro_batch_tokens": 300, "training__gradient_accumulation_steps": 2},
    "noise": {"training__neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_trial_begins_where_a_run_begins(kind: str, base_model: Path, rows: Path, tmp_path: Path) -> None:
    changed = {"training__max_steps": 3, "lora__dropout": 0.0, "quantization__method": "none", **KINDS[kind]}
    asked = settings(base_model, rows, output__directory=str(tmp_path / "tune"), **changed)
    found = tuning_run.tune(asked, TuneRequest(learning_rates=(1e-3, GOOD), trial_steps=3), Recorder())
    run = train(
        settings(base_model, rows, output__directory=str(tmp_path / "run"), training__learning_rate=GOOD, **changed),
        Recorder(),
    )
    (last,) = (trial for trial in found.trials if trial.learning_rate == GOOD)
    assert last.loss == pytest.approx(run.eval_loss, abs=1e-6)


def test_a_search_that_ends_early_goes_on_to_the_same_record_and_trains_nothing_twice(
    tuned: TuneResult, base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, directory = settings(base_model, rows, output__directory=str(tmp_path / "tune")), tmp_path / "tune"
    run_trial, ran = TrialBench.run, list[tuple[float, int]]()

    def run(bench: TrialBench, rate: float, steps: int, start: LossesOfRows) -> KeptTrial:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append((rate, steps))
        return run_trial(bench, rate, steps, start)

    with monkeypatch.context() as patched:
        patched.setattr(TrialBench, "run", run)
        reporter = Recorder()
        with pytest.raises(KeyboardInterrupt):
            tuning_run.tune(asked, REQUEST, reporter)
    assert "2 trials in" in str([event for event in reporter.events if isinstance(event, Noted)][-1])
    assert {path.name for path in directory.iterdir()} == {"run.lock", "tune.json"}
    killed = directory / ".trial.99999999-0123456789abcdef.saving"  # as a process that was killed leaves it
    (killed / "whole").mkdir(parents=True)
    (killed / "written-by-qlora").touch()
    (directory / ".tune.json.0123456789abcdef.saving").write_text('{"tri')
    resumed = tuning_run.tune(asked, REQUEST, Recorder())
    assert {path.name for path in directory.iterdir() if path.name.startswith(".")} == set()
    assert kept_in(directory) == kept_in(tuned.output)
    assert resumed.learning_rate == tuned.learning_rate
    with monkeypatch.context() as patched:
        patched.setattr(TrialBench, "run", None)
        again = tuning_run.tune(asked, REQUEST, Recorder())
    assert again == resumed
    with pytest.raises(Exception, match=r"measured with other lora\.dropout \(0\.1, now 0\.0\)"):
        tuning_run.tune(
            settings(base_model, rows, output__directory=str(directory), lora__dropout=0.0), REQUEST, reporter
        )


def test_a_full_disk_leaves_nothing_and_says_so(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(base_model, rows, output__directory=str(tmp_path / "new" / "tune"))

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qlora_cli.tuning.tuning_record.write_file", fail)
    with pytest.raises(OSError, match="No space left"):
        tuning_run.tune(asked, REQUEST, Recorder())
    assert list(tmp_path.iterdir()) == []


def test_without_held_out_rows_some_are_held_out_and_stand_in_the_settings(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    asked = settings(base_model, rows, data__eval_dataset=None, output__directory=str(tmp_path / "tune"))
    plan = tuning_run.plan(asked, TuneRequest(), Recorder())
    assert (plan.num_eval_rows, plan.trial_steps, plan.run_steps) == (4, (8, 16), STEPS)
    assert not (tmp_path / "tune").exists()
    request = TuneRequest(learning_rates=(IDLE, GOOD), trial_steps=2)
    result = tuning_run.tune(asked, request, Recorder())
    assert "eval_split: 10%  # held out by qlora tune" in result.settings_file.read_text()
    assert "is at the edge" in result.notes[0]
    one = write_jsonl(tmp_path / "one.jsonl", [json.loads((rows / "rows.jsonl").read_text().splitlines()[0])])
    alone = settings(base_model, rows, data__eval_dataset=None, data__dataset=str(one))
    with pytest.raises(DataError, match="can't be held out"):
        tuning_run.plan(alone, REQUEST, Recorder())


def test_a_directory_of_other_files_or_of_a_run_is_refused(base_model: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tune.json").write_text("{")
    for name, says in (("run", "holds a run"), ("other", "contains other files"), ("broken", "can't be read")):
        with pytest.raises(SettingsError, match=says):
            check_tune(settings(base_model, rows, output__directory=str(tmp_path / name)))
