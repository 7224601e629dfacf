"""Report a run to experiment trackers, which never stop it.

They write into the run directory and print to stderr. A missing login or network neither blocks nor prompts, and the
run continues without a tracker that fails.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from qlora_cli.events import Noted, Reporter
from qlora_cli.runs.directory import TRACKED_FILE
from qlora_cli.settings.choices import ReportTo
from qlora_cli.settings.models import OutputSettings
from qlora_cli.training.callbacks.tracker_services import SERVICES
from qlora_cli.writing import private_file, private_folder

PROJECT = "qlora"  # the project of runs, unless the user has set one
PATIENCE_SECONDS = "60"  # for pending uploads, at the beginning and at the end


class Tracker(TrainerCallback):
    """Wraps the callback of a tracker: its failures are reported and end the tracker, not the run.

    It passes on the beginning, the logs, and by `close` the end, since the trainer ends before the last evaluation.
    Checkpoints are not passed on: transformers' callbacks would look for them in the wrong directory.
    """

    def __init__(self, name: ReportTo, inner: TrainerCallback, reporter: Reporter) -> None:
        self._name = name.value
        self._inner: TrainerCallback | None = inner
        self._reporter = reporter
        self._end: Callable[[], None] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start tracking."""
        self._forward("on_train_begin", args, state, control, kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on the logs."""
        self._forward("on_log", args, state, control, kwargs)

    def close(self) -> None:
        """End tracking, once."""
        end, self._end = self._end, None
        if end is not None:
            end()

    def _forward(
        self,
        event: str,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        kwargs: Mapping[str, Any],
    ) -> None:
        self._try(event, args, state, control, kwargs)
        if self._inner is not None:
            self._end = lambda: self._try("on_train_end", args, state, control, kwargs)

    def _try(self, event: str, args: Any, state: Any, control: Any, kwargs: Mapping[str, Any]) -> None:
        if self._inner is None:
            return
        try:
            getattr(self._inner, event)(args, state, control, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the run
            self._inner = self._end = None
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            message = f"{self._name} failed and is no longer used; the run continues: {reason}"
            self._reporter.report(Noted(level="warning", message=message))


@contextmanager
def tracking(output: OutputSettings, directory: Path, reporter: Reporter) -> Iterator[tuple[TrainerCallback, ...]]:
    """Yield the callbacks of the tracker of a run; `directory` is the run directory, which exists.

    Meanwhile stdout goes to stderr. Afterwards the tracker is closed and the environment is restored.
    """
    name = output.report_to
    if name == ReportTo.NONE:
        yield ()
        return
    before = dict(os.environ)
    with _stdout_to_stderr():
        os.environ.update(_variables(name, directory.absolute(), reporter))
        try:
            (kind,) = get_reporting_integration_callbacks([name.value])
            tracker = Tracker(name, kind(), reporter)
            try:
                yield (tracker,)
            finally:
                tracker.close()
                _shut_down(name)
        finally:
            # MLflow passes on the id of an experiment, which in another run's database is that of another one.
            _restore(before, f"{name.value.partition('_')[0].upper()}_")


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect stdout to stderr, also for child processes."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _restore(before: Mapping[str, str], prefix: str) -> None:
    """Restore the environment variables that begin with `prefix`."""
    for key in [key for key in os.environ if key.startswith(prefix) and key not in before]:
        del os.environ[key]
    os.environ.update({key: value for key, value in before.items() if key.startswith(prefix)})


def _variables(name: ReportTo, directory: Path, reporter: Reporter) -> dict[str, str]:
    """Return the variables that make a tracker write into the run directory; those of the user have precedence."""
    defaults: dict[str, str] = {}
    if name == ReportTo.TENSORBOARD:
        defaults = {"TENSORBOARD_LOGGING_DIR": str(directory / "tensorboard")}
    elif name == ReportTo.TRACKIO:
        defaults = {"TRACKIO_DIR": str(directory / "trackio")}
    elif name == ReportTo.MLFLOW:
        defaults = {
            "MLFLOW_TRACKING_URI": f"sqlite:///{directory / TRACKED_FILE}",
            "MLFLOW_EXPERIMENT_NAME": PROJECT,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
    elif name == ReportTo.WANDB:
        defaults = {
            "WANDB_DIR": str(directory),
            "WANDB_CACHE_DIR": str(directory / "wandb" / "cache"),
            "WANDB_DATA_DIR": str(directory / "wandb" / "data"),
            "WANDB_PROJECT": PROJECT,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_CONSOLE": "off",  # it would record every frame of a progress bar
            "WANDB_INIT_TIMEOUT": PATIENCE_SECONDS,
            "WANDB_FINISH_TIMEOUT": PATIENCE_SECONDS,
        }
    elif name == ReportTo.COMET:
        defaults = {
            "COMET_OFFLINE_DIRECTORY": str(directory / "comet_ml"),
            "COMET_PROJECT_NAME": PROJECT,
            "COMET_DISABLE_AUTO_LOGGING": "1",  # it would replace functions of PyTorch
            "COMET_AUTO_LOG_CODE": "0",
            "COMET_AUTO_LOG_GIT_PATCH": "0",
            "COMET_DISPLAY_SUMMARY_LEVEL": "0",
        }
    elif name == ReportTo.SWANLAB:
        defaults = {"SWANLAB_LOG_DIR": str(directory / "swanlab"), "SWANLAB_PROJECT": PROJECT}
    variables = {key: value for key, value in defaults.items() if key not in os.environ}
    if "MLFLOW_TRACKING_URI" in variables:
        private_file(directory / TRACKED_FILE)  # an empty file is a new database
    if variables and name != ReportTo.MLFLOW:
        private_folder(directory / name.value)  # it holds the same data as the run's own metrics
    if name == ReportTo.TRACKIO and (folder := getattr(sys.modules.get("trackio.utils"), "TRACKIO_DIR", None)):
        message = f"trackio writes to {folder}, that of its first run, as long as this process lives"
        reporter.report(Noted(level="warning", message=message))
    if name in SERVICES and (reason := SERVICES[name].offline_reason()):
        service = SERVICES[name]
        variables[service.mode[0]] = service.mode[1]
        upload = service.upload.format(folder={**os.environ, **variables}[service.folder])
        reporter.report(Noted(message=f"{service.title} is recorded offline: {reason}. Send it later: {upload}"))
    return variables


def _shut_down(name: ReportTo) -> None:
    """Shut down a tracker that would otherwise end with the process, so that the next run starts a new one."""
    module = sys.modules.get(name.value)
    if name == ReportTo.WANDB and module is not None:
        if module.run is not None:
            module.finish()
        with suppress(SystemExit):  # which it raises if its own process failed
            module.teardown()  # else it would keep using the directory of its first run
    elif name == ReportTo.MLFLOW and module is not None:
        module.end_run()
    elif name == ReportTo.COMET and module is not None:
        if (experiment := module.get_running_experiment()) is not None:
            experiment.end()
    elif name == ReportTo.SWANLAB and module is not None and module.get_run() is not None:
        module.finish()
