"""Plan a run: of what the settings leave open, choose what is fastest among what fits on a GPU. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_cli.errors import QloraError
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import Estimate, Plan, PlanOption
from qlora_cli.memory.solver import Predict
from qlora_cli.memory.suggestions import NO, YES, judge_fit
from qlora_cli.settings.choices import Checkpointing
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.settle import with_settings
from qlora_cli.units import format_bytes

CHECKPOINTING = "training.gradient_checkpointing"
# What `auto` chooses from: each computes more again than the one before.
FASTEST_FIRST = (Checkpointing.OFF, Checkpointing.SELECTIVE, Checkpointing.ON)
COMPILED = (Checkpointing.OFF, Checkpointing.ON)  # compiled layers take no other
LAST_RESORT = Checkpointing.OFFLOAD  # waits for the host, and takes its memory
NUM_ALTERNATIVES = 2


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run on a GPU.

    Attributes:
        values: What is chosen for the open settings, by `section.key`.
        settings: Those of the run, with `values`.
    """

    values: Mapping[str, object]
    settings: EstimateSettings
    estimate: Estimate
    fits: str

    @property
    def high_bytes(self) -> int:
        """The memory of the process at the upper end of its error band."""
        return self.estimate.predicted.process_high_bytes

    def option(self) -> PlanOption:
        """Return it as a plain value."""
        return PlanOption(
            gradient_checkpointing=self.estimate.gradient_checkpointing,
            process_bytes=self.estimate.predicted.process_bytes,
            process_high_bytes=self.high_bytes,
            fits=self.fits,
        )


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run whose open settings are chosen for a GPU.

    Attributes:
        leaner: What to fall back to, one after another, if it does not fit after all: each takes less memory than the
            one before.
    """

    chosen: Candidate
    plan: Plan
    leaner: tuple[Candidate, ...]


def is_open(settings: EstimateSettings) -> bool:
    """Return whether the settings leave something to choose."""
    return settings.training.gradient_checkpointing == Checkpointing.AUTO


def plan_run(settings: EstimateSettings, gpu: Gpu, predict: Predict) -> PlannedRun:
    """Return the fastest run that is predicted to fit on `gpu` with its whole error band.

    If none does, it is the one that takes the least memory. The settings are open, by `is_open`.

    Raises:
        QloraError: the model can't be run with these settings on the GPU.
    """
    trials = _Trials(settings, gpu, predict)
    compiles = settings.training.torch_compile
    trials.add(*(COMPILED if compiles else FASTEST_FIRST))
    if not compiles and all(candidate.fits != YES for candidate in trials.candidates):
        trials.add(LAST_RESORT)
    candidates = trials.candidates
    if not candidates:
        raise trials.failures[-1]
    by_memory = sorted(candidates, key=lambda candidate: -candidate.high_bytes)
    chosen = next((candidate for candidate in candidates if candidate.fits == YES), by_memory[-1])
    at = by_memory.index(chosen)
    nearest = tuple(candidate.option() for candidate in _nearest(by_memory, at))
    return PlannedRun(
        chosen=chosen,
        plan=Plan(chosen=chosen.option(), alternatives=nearest),
        leaner=tuple(by_memory[at + 1 :]),
    )


class _Trials:
    """The ways to run that were tried: the candidates, and the errors of those that the model does not allow."""

    def __init__(self, settings: EstimateSettings, gpu: Gpu, predict: Predict) -> None:
        self._settings, self._gpu, self._predict = settings, gpu, predict
        self.candidates: list[Candidate] = []
        self.failures: list[QloraError] = []

    def add(self, *choices: Checkpointing) -> None:
        for checkpointing in choices:
            values = {CHECKPOINTING: checkpointing}
            changed = with_settings(self._settings, values)
            try:
                estimate = self._predict(changed, self._gpu)
            except QloraError as error:  # some models support no checkpointing
                self.failures.append(error)
            else:
                fits = judge_fit(estimate, self._gpu).fits
                self.candidates.append(Candidate(values=values, settings=changed, estimate=estimate, fits=fits))


def _nearest(by_memory: Sequence[Candidate], at: int) -> Sequence[Candidate]:
    """Return the alternatives to the one at a position that are nearest in memory, the larger ones first."""
    start = max(min(at - 1, len(by_memory) - 1 - NUM_ALTERNATIVES), 0)
    around = by_memory[start : start + NUM_ALTERNATIVES + 1]
    return [candidate for candidate in around if candidate is not by_memory[at]]


def describe(plan: Plan) -> str:
    """Return the plan in one line: what was chosen, and the alternatives with their memory."""
    chosen = plan.chosen
    others = []
    for option in plan.alternatives:
        fits = "" if option.fits == YES else " and does not fit" if option.fits == NO else " and fits tightly"
        others.append(f"{option.gradient_checkpointing} takes {format_bytes(option.process_bytes)}{fits}")
    line = f"gradient checkpointing {chosen.gradient_checkpointing}: {format_bytes(chosen.process_bytes)}"
    return "; ".join([line, ", ".join(others)]) if others else line
