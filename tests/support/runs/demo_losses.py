"""The first losses of the demonstration in fp32 on a CPU, and the file that records them for given versions."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_cli.demo.demonstration import ASSETS, DEMO_SETTINGS
from qlora_cli.events import Event, StepDone
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Sources, resolve
from qlora_cli.training.callbacks.stop import StopSignal
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.session import Session

NUM_STEPS = 20
FOLDER = Path(__file__).parents[2] / "golden" / "losses"
# The libraries whose releases may change a loss: those that multiply, build the model, train, adapt and quantize it.
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


class _StepLosses:
    """A reporter that records the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def report(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.losses.append(event.loss)


class _StopAfter(TrainerCallback):
    """Ends the loop early; the schedule stays that of the whole run."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signature is that of transformers
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        control.should_training_stop = state.global_step >= self._num_steps


def first_losses(output: Path) -> list[float]:
    """Train the first steps of the demonstration, in fp32 on the CPU, into `output`; return the loss of each."""
    values = {
        "model.name": str(ASSETS / "base"),
        "model.dtype": "fp32",
        "model.device": "cpu",
        "data.dataset": str(ASSETS / "train.jsonl"),
        "output.directory": str(output),
        **DEMO_SETTINGS,
    }
    resolved = resolve(Sources(flags={path: (path, value) for path, value in values.items()}), TrainSettings)
    reporter = _StepLosses()
    prepared = prepare_run(resolved, reporter)
    directory = RunDirectory(output)
    directory.create()
    stop = _StopAfter(NUM_STEPS)
    Session(prepared, directory, reporter, StopSignal(reporter), trackers=[stop]).trainer.train()
    return reporter.losses


def versions() -> dict[str, str]:
    """Return the versions that decide the losses, without the build of torch, as in `2.13.0+cpu`."""
    return {library: version(library).partition("+")[0] for library in LIBRARIES}


def golden_file() -> Path:
    """Return the file for the losses of the installed versions, whether or not they were recorded."""
    return FOLDER / ("-".join(f"{library}_{number}" for library, number in versions().items()) + ".json")


def golden_losses() -> list[float] | None:
    """Return the losses that were recorded with the installed versions; None if none were."""
    file = golden_file()
    if not file.exists():
        return None
    recorded = json.loads(file.read_text(encoding="utf-8"))
    assert recorded["versions"] == versions()
    return [float(loss) for loss in recorded["losses"]]
