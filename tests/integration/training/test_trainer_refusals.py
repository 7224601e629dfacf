"""A refusal of TRL to create its trainer is one message; a fault of our own code there stays a bug."""

from pathlib import Path

import pytest
import trl

from qlora_cli.errors import ModelError
from qlora_cli.events import StepDone
from qlora_cli.training import session
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, RunQlora, short_settings
from tests.support.processes.training_process import SignalAt


def refuse(*_: object, **__: object) -> None:
    raise ValueError("the pad token is none of the vocabulary")


def test_a_refusal_of_trl_is_reported_in_one_message(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl.SFTTrainer, "__init__", refuse)
    with pytest.raises(
        ModelError, match=r"TRL can't create a trainer for .*: the pad token is none of the vocab"
    ) as caught:
        train(short_settings(base_model, rows, tmp_path / "run"), Recorder())
    assert "qlora config show" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()  # so that no files are left


def test_a_run_to_resume_is_unchanged_when_trl_refuses(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(short_settings(base_model, rows, run), SignalAt(StepDone, 1))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(trl.SFTTrainer, "__init__", refuse)
        for settings in (
            short_settings(base_model, rows, run),
            short_settings(base_model, rows, tmp_path / "a" / "other", output__resume=str(run)),
        ):
            with pytest.raises(ModelError, match="TRL can't create a trainer"):
                train(settings, Recorder())
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "a").exists()
    assert train(short_settings(base_model, rows, run), Recorder()).resumed_from_step == 2


def test_a_fault_of_our_own_is_not_mistaken_for_one_of_the_settings(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("ours")

    fails.__code__ = fails.__code__.replace(co_filename=str(Path(session.__file__)))
    monkeypatch.setattr(session, "RowOrder", fails)
    with pytest.raises(ValueError, match="ours") as caught:
        train(short_settings(base_model, rows, tmp_path / "run"), Recorder())
    assert not isinstance(caught.value, ModelError)


def test_variables_of_a_launcher_that_were_left_over_do_not_stop_a_run(
    run_qlora: RunQlora, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    arguments = ("train", "--model", base_model, "--dataset", rows, "--output", tmp_path / "run", "--max-steps", "1")
    left = {"RANK": "0", "LOCAL_RANK": "0"}
    refused = run_qlora(*arguments, env={**left, "WORLD_SIZE": "2"})
    assert (refused.code, "this is one of 2 processes" in refused.stderr) == (2, True), refused.stderr
    assert not (tmp_path / "run").exists()
    trained = run_qlora(*arguments, "--json", env={**left, "WORLD_SIZE": "1"})
    assert trained.code == 0, trained.stderr
    assert trained.json["num_steps"] == 1
