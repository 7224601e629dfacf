"""The weights of a run: its final adapter, or the newest good checkpoint of a run that has not ended.

`adapter/` of a run that was stopped contains its weights at that time. A resumption deletes it, but earlier versions
did not, so only the record decides whether it counts.
"""

from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.runs.checkpoints import damage_of, list_checkpoints, step_of
from qlora_cli.runs.directory import ADAPTER, RunDirectory
from qlora_cli.runs.record import RunRecord
from qlora_cli.units import counted


@dataclass(frozen=True, kw_only=True)
class RunWeights:
    """Weights of a run.

    Attributes:
        path: Their directory.
        step: The step after which they were saved; None if it is unknown.
        num_steps: The number of steps planned.
        is_done: Whether all steps are done.
        is_result: Whether they are the final weights.
        damaged: Newer checkpoints that can't be used, each with the reason.
    """

    path: Path
    step: int | None
    num_steps: int | None
    is_done: bool
    is_result: bool
    damaged: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The step of the weights, and whether the run has ended."""
        of = f" of {self.num_steps:,}" if self.num_steps else ""
        where = "of an unknown step" if self.step is None else f"of step {self.step:,}{of}"
        if self.is_result:
            return f"the weights are those {where}, with which the run ended"
        end = "the run ended with others" if self.is_done else "the run has not ended"
        return f"the weights are those {where}; {end} ({self.path})"


def weights_of(run: RunDirectory, record: RunRecord) -> RunWeights:
    """Return the weights of a run; the files of a checkpoint are verified.

    Raises:
        ModelError: it has none that are undamaged.
    """
    stopped_at = _step_of_adapter(run, record)
    if stopped_at is not None and record.is_done:
        return _of(run.adapter, stopped_at, record)
    damaged: list[str] = []
    for checkpoint in _best_first(list_checkpoints(run.checkpoints), record):
        if stopped_at is not None and step_of(checkpoint) <= stopped_at:
            break
        if reason := damage_of(checkpoint):
            damaged.append(f"{checkpoint.name}: {reason}")
        else:
            return _of(checkpoint, step_of(checkpoint), record, tuple(damaged))
    if run.has_adapter:
        return _of(run.adapter, stopped_at, record, tuple(damaged))
    raise missing_weights(run, record, tuple(damaged))


def weights_of_part(part: Path, run: RunDirectory, record: RunRecord) -> RunWeights:
    """Return the weights of a checkpoint or adapter that the user named instead of its run."""
    if part in list_checkpoints(run.checkpoints):
        return _of(part, step_of(part), record)
    return _of(part, _step_of_adapter(run, record) if part == run.adapter else None, record)


def may_have_weights(run: RunDirectory) -> bool:
    """Return whether there is an adapter or a checkpoint, damaged or not."""
    return run.has_adapter or bool(list_checkpoints(run.checkpoints))


def is_complete(run: RunDirectory, record: RunRecord) -> bool:
    """Return whether a run is done and its final adapter exists."""
    return record.is_done and run.has_adapter


def missing_weights(run: RunDirectory, record: RunRecord, damaged: tuple[str, ...] = ()) -> ModelError:
    """Return the error of a run that has neither an adapter nor an undamaged checkpoint.

    The hint is a command that `train` accepts: it restarts a run in its directory only if nothing would be lost.
    """
    why = f"; {counted(len(damaged), 'checkpoint')} can't be used ({'; '.join(damaged)})" if damaged else ""
    when, hint = "yet", "Give the same qlora train command again: it restarts."
    if record.is_done or damaged or run.holds_adapter_weights:
        when, hint = "any more", f"Put {ADAPTER}/ or a checkpoint back as it was, or train into another --output."
    return ModelError(
        f"the run in {run.path} has no weights {when}: no adapter, and no undamaged checkpoint{why}", hint=hint
    )


def _of(path: Path, step: int | None, record: RunRecord, damaged: tuple[str, ...] = ()) -> RunWeights:
    return RunWeights(
        path=path,
        step=step,
        num_steps=record.plan.num_steps,
        is_done=record.is_done,
        is_result=record.is_done and step is not None and step == _last_step(record),
        damaged=damaged,
    )


def _last_step(record: RunRecord) -> int | None:
    """Return the step of a run's final weights: that of the best evaluation if those are loaded at the end."""
    if record.result is None:
        return None
    if record.is_done and record.setting("training.load_best_model_at_end") is True:
        return record.result.best_step or record.result.steps
    return record.result.steps


def _step_of_adapter(run: RunDirectory, record: RunRecord) -> int | None:
    """Return the step of the adapter; None if there is no adapter, or the run was resumed since."""
    has_ended = record.status in {"done", "interrupted"}
    return _last_step(record) if has_ended and run.has_adapter else None


def _best_first(checkpoints: list[Path], record: RunRecord) -> list[Path]:
    """Return checkpoints, the newest first; for a run that is done, that of its final weights before all others."""
    last = _last_step(record) if record.is_done else None
    return sorted(checkpoints, key=lambda path: (step_of(path) == last, step_of(path)), reverse=True)
