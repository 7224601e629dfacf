"""A run resumes in another directory, from a named checkpoint or run, exactly as it would in its own."""

import json
import shutil
from pathlib import Path

import pytest

from qlora_cli.errors import OutputDirectoryError, SettingsError
from qlora_cli.events import TrainingResumed
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, train_settings
from tests.integration.training.conftest import KillAt
from tests.support.processes.killed_runs import (
    EXACT,
    Copier,
    Killed,
    adapter_of,
    assert_same,
    place_killed,
    result_of,
    stopped_at,
)


def test_a_named_checkpoint_resumes_in_another_directory(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path
) -> None:
    stopped_at(train_settings(base_model, rows, tmp_path / "run", **EXACT, output__max_checkpoints=9), 6)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-3"
    settings = train_settings(base_model, rows, tmp_path / "other", **EXACT, output__resume=str(checkpoint))
    assert train(settings, Recorder()).resumed_from_step == 3
    assert_same(tmp_path / "other", whole)
    same = train_settings(base_model, rows, tmp_path / "run", **EXACT, output__resume=str(checkpoint))
    with pytest.raises(SettingsError, match="has checkpoints after step-3"):
        train(same, Recorder())
    with pytest.raises(SettingsError, match="there is no checkpoint of a run"):
        train(train_settings(base_model, rows, tmp_path / "new", **EXACT, output__resume=str(tmp_path)), Recorder())


def test_a_named_checkpoint_resumes_in_another_directory_even_after_a_kill(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path
) -> None:
    stopped_at(train_settings(base_model, rows, tmp_path / "run", **EXACT, output__max_checkpoints=9), 6)
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-5")
    settings = train_settings(base_model, rows, tmp_path / "other", **EXACT, output__resume=checkpoint)

    with pytest.raises(Killed):
        train(settings, KilledEarly())  # before the new run has a checkpoint of its own
    shutil.rmtree(tmp_path / "run")
    assert train(settings, Recorder()).resumed_from_step == 5  # the same command resumes from the copy
    assert_same(tmp_path / "other", whole)


class KilledEarly(Recorder):
    """Leaves as a killed process would, before the first step of a resumed run."""

    def report(self, event: object) -> None:
        if isinstance(event, TrainingResumed):
            raise Killed


def test_a_named_run_resumes_in_another_directory_by_the_same_command_and_in_a_third_one(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path, kill_at: KillAt
) -> None:
    run, other, third = (tmp_path / name for name in ("run", "other", "third"))
    kill_at(3)
    stopped_at(train_settings(base_model, rows, run, **EXACT), 5)
    settings = train_settings(base_model, rows, other, **EXACT, output__resume=str(run))
    with pytest.raises(Killed):
        train(settings, KilledEarly())
    stopped_at(settings, 7)
    shutil.rmtree(run)
    onward = train_settings(base_model, rows, third, **EXACT, output__resume=str(other))
    assert train(onward, Recorder()).resumed_from_step == 7
    assert_same(third, whole)
    resumed = json.loads((third / "run.json").read_text(encoding="utf-8"))["resumed"]
    assert [(entry["step"], entry["checkpoint"], entry["from_run"]) for entry in resumed] == [
        (3, str(run / "checkpoints" / "step-3"), "../run/checkpoints/step-3"),
        (5, str(run / "checkpoints" / "step-5"), "../run/checkpoints/step-5"),
        (5, str(other / "checkpoints" / "step-5"), "../other/checkpoints/step-5"),
        (7, str(other / "checkpoints" / "step-7"), "../other/checkpoints/step-7"),
    ]


def test_a_run_without_a_checkpoint_is_not_resumed_in_another_directory(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    settings = train_settings(base_model, rows, tmp_path / "other", **EXACT, output__resume=str(tmp_path / "run"))
    with pytest.raises(OutputDirectoryError, match=r"the run of .* has no checkpoint to resume from"):
        train(settings, Recorder())


def test_the_best_checkpoint_is_copied(base_model: Path, rows: Path, tmp_path: Path) -> None:
    best = {**EXACT, "training__load_best_model_at_end": True, "training__learning_rate": 0.02}
    train(train_settings(base_model, rows, tmp_path / "whole", **best), Copier(tmp_path / "whole", 7))
    place_killed(tmp_path / "whole", 7, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "step-4" in names  # the checkpoint of the first evaluation is kept in addition to the newest two
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-7")
    settings = train_settings(base_model, rows, tmp_path / "other", **best, output__resume=checkpoint)
    train(settings, Recorder())
    assert adapter_of(tmp_path / "other") == adapter_of(tmp_path / "whole")
    assert result_of(tmp_path / "other") == result_of(tmp_path / "whole")
