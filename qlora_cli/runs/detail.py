"""A run in detail, as `qlora runs show` prints it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from qlora_cli.events import EvalDone, Noted, StepSkipped
from qlora_cli.files import as_json
from qlora_cli.runs.adapter_health import AdapterHealth
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.find_runs import Run
from qlora_cli.runs.forgetting import Forgetting
from qlora_cli.runs.record import SettingUsed
from qlora_cli.runs.samples import Sample, answers_by_prompt
from qlora_cli.runs.summary import RunSummary


@dataclass(frozen=True, kw_only=True)
class RunDetail:
    """A run in detail.

    Attributes:
        summary: Its figures.
        settings: Those that are not at their default.
        evaluations: On held-out data, in order.
        samples: Prompts with their answers, in order of steps.
        skipped_steps: Steps that changed nothing because they were not finite.
        resumed_from: The steps after which training was resumed.
        adapter_health: What training made of the adapter; None if it was not measured.
        forgetting: What was forgotten; None if it was not measured.
        notes: Notes and warnings.
        next_step: What to do next, in a sentence; None while the run is running.
    """

    summary: RunSummary
    settings: tuple[SettingUsed, ...]
    evaluations: tuple[EvalDone, ...]
    samples: tuple[Sample, ...]
    skipped_steps: tuple[StepSkipped, ...]
    resumed_from: tuple[int, ...]
    adapter_health: AdapterHealth | None
    forgetting: Forgetting | None
    notes: tuple[Noted, ...]
    next_step: str | None

    def as_json(self) -> dict[str, Any]:
        """Return the fields by name, those of the summary on the same level; numbers that are not finite are null."""
        whole = asdict(self)
        settings = {setting.path: {"value": setting.value, "origin": setting.origin} for setting in self.settings}
        finite = _finite({**whole.pop("summary"), **whole, "settings": settings})
        assert isinstance(finite, dict)
        return finite


def detail_of(run: Run) -> RunDetail:
    """Return a run in detail."""
    return RunDetail(
        summary=run.summary,
        settings=tuple(setting for setting in run.record.settings_used if not setting.is_default),
        evaluations=run.history.evaluations,
        samples=answers_by_prompt(run.history),
        skipped_steps=run.history.skipped,
        resumed_from=tuple(event.step for event in run.history.resumes),
        adapter_health=run.record.result.adapter_health if run.record.result else None,
        forgetting=run.record.result.forgetting if run.record.result else None,
        notes=run.history.notes,
        next_step=_next_step(run),
    )


def _next_step(run: Run) -> str | None:
    summary = run.summary
    if summary.state == "running":
        return None
    if summary.state == "done":
        adapter = RunDirectory(summary.path).adapter
        return f"the adapter is in {adapter}" if adapter.is_dir() else None
    never = " without --resume never" if run.record.setting("output.resume") == "never" else ""
    if not summary.checkpoints:
        return f"run the same qlora train again{never}: it restarts, as there is no checkpoint"
    return f"run the same qlora train again{never}: it resumes from {summary.checkpoints[-1].name}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else as_json(value)
