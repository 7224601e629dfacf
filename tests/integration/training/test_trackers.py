"""Trackers with their real packages, if installed: they write only into the run directory and block nothing."""

import importlib.util
import json
import os
import socket
import sqlite3
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from qlora_cli.errors import SettingsError
from qlora_cli.events import Noted
from qlora_cli.settings.choices import ReportTo
from qlora_cli.settings.models import OutputSettings
from qlora_cli.training.callbacks import trackers
from qlora_cli.training.callbacks.tracker_services import SERVICES
from qlora_cli.training.callbacks.trackers import Tracker, tracking
from qlora_cli.training.checks.input_checks import check_train_inputs
from tests.conftest import Recorder, RunQlora, train_settings

TRAIN = (
    *("--dtype", "fp32", "--device", "cpu", "--max-length", "128", "--max-steps", "3"),
    *("--gradient-accumulation-steps", "1", "--eval-split", "4", "--eval-steps", "2", "--json"),
)
PACKAGES = {
    ReportTo.TENSORBOARD: ("tensorboard",),
    ReportTo.WANDB: ("wandb",),
    ReportTo.TRACKIO: ("trackio",),
    ReportTo.MLFLOW: ("mlflow", "sqlalchemy", "alembic"),
    ReportTo.COMET: ("comet_ml",),
    ReportTo.SWANLAB: ("swanlab",),
}


def need(name: ReportTo) -> None:
    for package in PACKAGES[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (pip install 'qlora-cli[{name.value}]')")


def tensorboard_losses(run: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {name: [event.step for event in events.Scalars(name)] for name in ("train/loss", "eval/loss")}


def mlflow_losses(run: Path) -> dict[str, list[int]]:
    with sqlite3.connect(run / "mlflow.db") as database:
        assert database.execute("SELECT name, status FROM runs").fetchall() == [(run.name, "FINISHED")]
        rows = database.execute(
            "SELECT key, step FROM metrics WHERE key IN ('loss', 'eval_loss') ORDER BY step"
        ).fetchall()
    return {
        name: [step for key, step in rows if key == column]
        for name, column in (("train/loss", "loss"), ("eval/loss", "eval_loss"))
    }


def comet_losses(run: Path) -> dict[str, list[int]]:
    (file,) = (run / "comet_ml").glob("*.zip")
    with zipfile.ZipFile(file) as archive:
        lines = [json.loads(line) for line in archive.read("messages.json").splitlines()]
    metrics = [line["payload"]["metric"] for line in lines if line["type"] == "metric_msg"]
    return {
        name: [one["step"] for one in metrics if one["metricName"] == name] for name in ("train/loss", "eval/loss")
    }


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_writes_only_into_the_run_directory_and_not_to_stdout(
    run_qlora: RunQlora, base_model: Path, rows: Path, tmp_path: Path, name: ReportTo
) -> None:
    need(name)
    home, here, run = tmp_path / "home", tmp_path / "here", tmp_path / "run"
    home.mkdir()
    here.mkdir()
    cleared = {
        key: ""
        for key in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "COMET_API_KEY", "SWANLAB_API_KEY")
        if key in os.environ
    }
    done = run_qlora(
        *("train", "--model", base_model, "--dataset", rows, "--output", run, *TRAIN, "--report-to", name.value),
        env={"HOME": str(home), **cleared},
        cwd=here,
    )
    assert done.code == 0, done.stderr
    assert done.json["steps"] == 3  # stdout holds one object and nothing else
    assert list(here.iterdir()) == []
    # Except for matplotlib's list of fonts, which is created when the report is first drawn.
    assert [path for path in home.rglob("*") if path.is_file() and path.parent.name != "matplotlib"] == []
    if name == ReportTo.TENSORBOARD:
        # The trainer is done before the last evaluation, which is still reported.
        assert tensorboard_losses(run) == {"train/loss": [1, 2, 3], "eval/loss": [2, 3]}
    elif name == ReportTo.MLFLOW:
        assert mlflow_losses(run) == {"train/loss": [1, 2, 3], "eval/loss": [2, 3]}
    elif name == ReportTo.WANDB:
        (folder,) = (run / "wandb").glob("offline-run-*")
        (file,) = folder.glob("*.wandb")
        assert file.stat().st_size > 0
        assert f"wandb sync {run / 'wandb'}/offline-run-*" in done.stderr
        assert "no login for api.wandb.ai" in done.stderr
    elif name == ReportTo.COMET:
        assert comet_losses(run) == {"train/loss": [1, 2, 3], "eval/loss": [2, 3]}
        assert f"comet upload {run / 'comet_ml'}/*.zip" in done.stderr
    elif name == ReportTo.SWANLAB:
        (file,) = (run / "swanlab").glob("run-*/backup.swanlab")
        assert b"train/loss" in file.read_bytes()
        assert b"eval/loss" in file.read_bytes()
        assert f"swanlab sync {run / 'swanlab'}/run-*" in done.stderr
    else:
        with sqlite3.connect(run / "trackio" / "qlora.db") as database:
            runs = database.execute("SELECT DISTINCT run_name FROM metrics").fetchall()
        assert runs == [("run",)]


def test_every_tracker_is_in_the_test_above() -> None:
    assert {*PACKAGES, ReportTo.NONE} == set(ReportTo)


@pytest.fixture
def _no_wandb_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in [
        key
        for key in os.environ
        if key.startswith(("WANDB_", "TENSORBOARD_", "MLFLOW_", "TRACKIO_", "COMET_", "SWANLAB_"))
    ]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)


@pytest.fixture
def answering() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.usefixtures("_no_wandb_settings")
def test_wandb_is_offline_exactly_without_a_login_or_a_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answering: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", answering)
    assert "no login" in str(SERVICES[ReportTo.WANDB].offline_reason())
    (tmp_path / "netrc").write_text(f"machine {answering.removeprefix('http://')} login user password {'a' * 40}\n")
    assert SERVICES[ReportTo.WANDB].offline_reason() is None
    (tmp_path / "netrc").write_text(f"machine other.example login user password {'a' * 40}\n")
    assert "no login" in str(SERVICES[ReportTo.WANDB].offline_reason())
    (tmp_path / "netrc").write_text("no netrc at all")
    assert "no login" in str(SERVICES[ReportTo.WANDB].offline_reason())
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert SERVICES[ReportTo.WANDB].offline_reason() is None
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert SERVICES[ReportTo.WANDB].offline_reason() == "127.0.0.1:9 can't be reached"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert SERVICES[ReportTo.WANDB].offline_reason() is None  # behind a proxy this is unknown
    monkeypatch.delenv("WANDB_API_KEY")
    for mode in ("offline", "disabled", "shared"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert SERVICES[ReportTo.WANDB].offline_reason() is None  # the user's choice
    monkeypatch.setenv("WANDB_MODE", "online")
    assert "no login" in str(SERVICES[ReportTo.WANDB].offline_reason())  # it would ask for one


@pytest.mark.usefixtures("_no_wandb_settings")
@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_used_exactly_with_a_login_and_a_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answering: str, name: ReportTo
) -> None:
    service = SERVICES[name]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(service.address_variable, answering)
    host = answering.removeprefix("http://")
    assert service.offline_reason() == f"there is no login for {host} ({service.login}, or {service.keys[0]})"
    recorder = Recorder()
    variables = trackers._variables(name, tmp_path, recorder)
    assert variables[service.mode[0]] == service.mode[1]
    (note,) = (event.message for event in recorder.events if isinstance(event, Noted))
    assert service.upload.format(folder=variables[service.folder]) in note
    stored = {
        ReportTo.WANDB: ("netrc", f"machine {host} login user password {'a' * 40}\n"),
        ReportTo.COMET: (".comet.config", "[comet]\napi_key = abc\n"),
        ReportTo.SWANLAB: (".swanlab/.netrc", f"machine {host} login user password {'a' * 40}\n"),
    }
    file, content = stored[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    assert service.offline_reason() is None
    (tmp_path / file).write_text("neither\x00 one nor the other")
    assert service.offline_reason() is not None
    monkeypatch.setenv(service.keys[0], "k" * 40)
    assert service.offline_reason() is None
    monkeypatch.setenv(service.address_variable, "http://127.0.0.1:9")
    assert service.offline_reason() == "127.0.0.1:9 can't be reached"
    assert trackers._variables(name, tmp_path, Recorder())[service.mode[0]] == service.mode[1]
    monkeypatch.setenv(service.mode[0], "disabled")
    assert service.offline_reason() is None  # the user's choice


@pytest.mark.usefixtures("_no_wandb_settings")
@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (ReportTo.TENSORBOARD, "TENSORBOARD_LOGGING_DIR", "{run}/tensorboard"),
        (ReportTo.WANDB, "WANDB_DIR", "{run}"),
        (ReportTo.TRACKIO, "TRACKIO_DIR", "{run}/trackio"),
        (ReportTo.MLFLOW, "MLFLOW_TRACKING_URI", "sqlite:///{run}/mlflow.db"),
        (ReportTo.COMET, "COMET_OFFLINE_DIRECTORY", "{run}/comet_ml"),
        (ReportTo.SWANLAB, "SWANLAB_LOG_DIR", "{run}/swanlab"),
    ],
)
def test_variables_of_the_user_are_not_overwritten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: ReportTo, key: str, value: str
) -> None:
    variables = trackers._variables(name, tmp_path, Recorder())
    assert variables[key] == value.format(run=tmp_path)
    monkeypatch.setenv(key, "mine")
    assert key not in trackers._variables(name, tmp_path, Recorder())


@pytest.mark.usefixtures("_no_wandb_settings")
@pytest.mark.parametrize("name", PACKAGES)
def test_files_of_a_tracker_in_a_run_are_readable_by_their_owner_alone(tmp_path: Path, name: ReportTo) -> None:
    trackers._variables(name, tmp_path, Recorder())
    (made,) = tmp_path.iterdir()
    assert made.name == ("mlflow.db" if name == ReportTo.MLFLOW else name.value)
    assert made.stat().st_mode & 0o777 == (0o600 if name == ReportTo.MLFLOW else 0o700)
    if name == ReportTo.MLFLOW:
        # An empty file is a new database, and the files next to it are as private.
        with sqlite3.connect(made) as database:
            database.execute("PRAGMA journal_mode=wal")
            database.execute("CREATE TABLE losses (loss)")
            assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
            assert len(list(tmp_path.iterdir())) > 1
        trackers._variables(name, tmp_path, Recorder())  # as a resumed run does
        with sqlite3.connect(made) as database:
            assert database.execute("SELECT * FROM losses").fetchall() == []


@pytest.mark.usefixtures("_no_wandb_settings")
def test_no_database_is_created_for_a_server_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    trackers._variables(ReportTo.MLFLOW, tmp_path, Recorder())
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_restored_and_the_callback_is_present_within(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    need(ReportTo.TENSORBOARD)
    monkeypatch.setenv("TENSORBOARD_MINE", "1")
    before = dict(os.environ)
    output = OutputSettings(directory=tmp_path, report_to=ReportTo.TENSORBOARD)

    def failing_run() -> None:
        with tracking(output, tmp_path, Recorder()) as callbacks:
            assert len(callbacks) == 1
            assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard")
            os.environ["TENSORBOARD_THEIRS"] = "1"
            os.environ["TENSORBOARD_MINE"] = "2"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_run()
    assert dict(os.environ) == before
    with tracking(OutputSettings(directory=tmp_path), tmp_path, Recorder()) as callbacks:
        assert callbacks == ()


class Inner(TrainerCallback):
    """A tracker that fails in one of its events."""

    def __init__(self, fails_in: str | None = None) -> None:
        self.fails_in = fails_in
        self.received: list[str] = []

    def _receive(self, event: str) -> None:
        self.received.append(event)
        if event == self.fails_in:
            raise ConnectionError("the network is gone\nand more")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._receive("begin")

    def on_log(self, *_: Any, **__: Any) -> None:
        self._receive("log")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._receive("end")

    def on_save(self, *_: Any, **__: Any) -> None:
        self._receive("save")


@pytest.mark.parametrize(
    ("fails_in", "received"),
    [
        (None, ["begin", "log", "log", "end"]),
        ("begin", ["begin"]),
        ("log", ["begin", "log"]),
        ("end", ["begin", "log", "log", "end"]),
    ],
)
def test_a_failing_tracker_is_reported_once_and_dropped(fails_in: str | None, received: list[str]) -> None:
    inner, recorder = Inner(fails_in), Recorder()
    tracker = Tracker(ReportTo.WANDB, inner, recorder)
    args: Any = SimpleNamespace()
    state, control = TrainerState(), TrainerControl()
    tracker.on_train_begin(args, state, control)
    tracker.on_log(args, state, control, logs={"loss": 1.0})
    tracker.on_save(args, state, control)
    tracker.on_train_end(args, state, control)  # the last evaluation follows
    tracker.on_log(args, state, control, logs={"eval_loss": 1.0})
    tracker.close()
    tracker.close()
    assert inner.received == received
    warnings = [event.message for event in recorder.events if isinstance(event, Noted)]
    expected = ["wandb failed and is no longer used; the run continues: the network is gone"]
    assert warnings == ([] if fails_in is None else expected)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, base_model: Path, rows: Path, tmp_path: Path, name: ReportTo
) -> None:
    real = importlib.util.find_spec
    hidden = PACKAGES[name][-1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == hidden else real(package))
    with pytest.raises(SettingsError) as caught:
        check_train_inputs(train_settings(base_model, rows, tmp_path / "run", output__report_to=name.value))
    (problem,) = caught.value.problems
    assert "is not installed" in problem.message
    assert problem.hint == f"Run: pip install 'qlora-cli[{name.value}]'"
