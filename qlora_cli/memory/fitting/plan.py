"""Plan a run: of what the settings leave open, choose what is fastest among what fits on a GPU. Imports no torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from qlora_cli.errors import QloraError
from qlora_cli.memory.fitting.division import MICRO_BATCH_TOKENS, Division, worthwhile_divisions
from qlora_cli.memory.fitting.suggestions import NO, YES, judge_fit, keeps_products
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import Estimate, Plan, PlanOption, Product
from qlora_cli.memory.request import Predict
from qlora_cli.memory.run_batches import StepRows
from qlora_cli.settings.choices import Checkpointing
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.settle import with_settings
from qlora_cli.units import format_bytes

CHECKPOINTING, KEPT = "training.gradient_checkpointing", "training.kept_products"
# By what is computed again, the least first. The last one waits for the host, too, and takes its memory.
FASTEST_FIRST = (Checkpointing.OFF, Checkpointing.SELECTIVE, Checkpointing.ON, Checkpointing.OFFLOAD)
NUM_ALTERNATIVES = 2
MAX_SUBSETS = 3  # of products that are predicted, until one fits

# Returns the products of the base that a run computes twice if whole layers are recomputed.
FindProducts = Callable[[EstimateSettings, Gpu], Sequence[Product]]
# Returns how a run would run on a GPU, with what its settings leave open chosen.
PlanOn = Callable[[EstimateSettings, Gpu], PlanOption]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run on a GPU.

    Attributes:
        values: What is chosen for the open settings, by `section.key`.
        settings: Those of the run, with `values`.
        step_seconds: Of a step with rows as in the data, where they are known, else with the longest ones; None for a
            GPU whose speed is not known.
        left_out: Linear layers whose products `selective` recomputes, although they are worth keeping.
    """

    values: Mapping[str, object]
    settings: EstimateSettings
    estimate: Estimate
    fits: str
    step_seconds: float | None
    left_out: tuple[str, ...] = ()

    @property
    def high_bytes(self) -> int:
        """The memory of the process at the upper end of its error band."""
        return self.estimate.predicted.process_high_bytes

    @property
    def speed(self) -> tuple[float, int]:
        """What orders candidates by time, the fastest first: seconds a step where they are known, then the kind."""
        kind = FASTEST_FIRST.index(Checkpointing(self.estimate.gradient_checkpointing))
        return self.step_seconds or 0.0, kind

    def has(self, values: Mapping[str, object]) -> bool:
        """Return whether it runs with the same checkpointing as `values`, which may be JSON's."""
        kept = values.get(KEPT)
        keeps = tuple(kept) if isinstance(kept, list) else kept
        return self.is_of_kind(values) and keeps == self.values.get(KEPT)

    def is_of_kind(self, values: Mapping[str, object]) -> bool:
        """Return whether it runs with the same kind of checkpointing as `values`, and in the same micro-batches."""
        return all(self.values.get(path) == values.get(path) for path in (CHECKPOINTING, MICRO_BATCH_TOKENS))

    def option(self) -> PlanOption:
        """Return it as a plain value."""
        option = option_of(self.estimate, self.fits)
        return replace(
            option,
            recomputed_products=self.left_out,
            micro_batch_tokens=self.settings.training.micro_batch_tokens,
            step_seconds=self.step_seconds,
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

    def next_leaner(self) -> "PlannedRun | None":
        """Return the plan that takes less memory than this one; None if there is none."""
        return _planned((self.chosen, *self.leaner), 1) if self.leaner else None

    def resumed(self, before: Mapping[str, object], *, ran_out: bool) -> "PlannedRun":
        """Return the plan of a run that ran with the values `before`, by `section.key`: the same, if it still fits.

        `ran_out`: it ran out of memory, and the next leaner one is taken.
        """
        candidates = (self.chosen, *self.leaner)
        same = [index for index, candidate in enumerate(candidates) if candidate.has(before)]
        # With other free memory, other products may be kept.
        same += [index for index, candidate in enumerate(candidates) if candidate.is_of_kind(before)]
        at = min(same[0] + ran_out, len(candidates) - 1) if same else 0
        return self if at == 0 else _planned(candidates, at)


def is_open(settings: EstimateSettings) -> bool:
    """Return whether the settings leave something to choose."""
    training = settings.training
    keeps_all = training.gradient_checkpointing == Checkpointing.SELECTIVE and training.kept_products is None
    return training.gradient_checkpointing == Checkpointing.AUTO or keeps_all


def plan_run(
    settings: EstimateSettings,
    gpu: Gpu,
    predict: Predict,
    find_products: FindProducts,
    rows: StepRows | None = None,
    *,
    only_fastest: bool = False,
) -> PlannedRun:
    """Return the fastest run that is predicted to fit on `gpu` with its whole error band.

    If none does, it is the one that takes the least memory. The settings are open, by `is_open`, or `rows` are given:
    how these are divided into micro-batches is open, too. `only_fastest`: slower ones are not
    predicted once one fits, so that there may be no alternatives.

    Raises:
        QloraError: the model can't be run with these settings on the GPU.
    """
    divisions = () if rows is None else worthwhile_divisions(settings, gpu, predict, rows)
    candidates: list[Candidate] = []
    for division in tuple(reversed(divisions)) or (None,):
        is_last_resort = division is not None and division.tokens is None  # about as large as the smallest filled ones
        if is_last_resort and _fits_any(candidates):
            break
        trials = _Trials(settings, gpu, predict, find_products, division)
        trials.add_all(only_fastest=only_fastest)
        candidates += trials.candidates
        if trials.fits_without_recomputing:
            break
    if not candidates:
        raise trials.failures[-1]
    by_memory = sorted(candidates, key=lambda candidate: -candidate.high_bytes)
    fitting = [candidate for candidate in by_memory if candidate.fits == YES]
    chosen = min(fitting, key=lambda candidate: candidate.speed) if fitting else by_memory[-1]
    return _planned(by_memory, by_memory.index(chosen))


def option_of(estimate: Estimate, fits: str) -> PlanOption:
    """Return a way to run as a plain value."""
    return PlanOption(
        gradient_checkpointing=estimate.gradient_checkpointing,
        recomputed_products=(),
        micro_batch_tokens=None,
        process_bytes=estimate.predicted.process_bytes,
        process_high_bytes=estimate.predicted.process_high_bytes,
        fits=fits,
        step_seconds=None if estimate.time is None else estimate.time.step_seconds,
    )


def best_option(
    settings: EstimateSettings, gpu: Gpu, predict: Predict, find_products: FindProducts, rows: StepRows | None = None
) -> PlanOption:
    """Return how the run with `settings`, open or not, would run on `gpu`. Arguments and errors are `plan_run`'s."""
    if is_open(settings) or rows is not None:
        return plan_run(settings, gpu, predict, find_products, rows, only_fastest=True).plan.chosen
    estimate = predict(settings, gpu)
    return option_of(estimate, judge_fit(estimate, gpu).fits)


def planning(predict: Predict, find_products: FindProducts) -> Predict:
    """Return `predict` for settings that may be open: what it predicts is the run as it would be planned."""

    def predict_planned(settings: EstimateSettings, gpu: Gpu) -> Estimate:
        if not is_open(settings):
            return predict(settings, gpu)
        return plan_run(settings, gpu, predict, find_products, only_fastest=True).chosen.estimate

    return predict_planned


def _planned(by_memory: Sequence[Candidate], at: int) -> PlannedRun:
    """Return the plan to run as the candidate at a position of a list that falls in memory."""
    chosen = by_memory[at]
    start = max(min(at - 1, len(by_memory) - 1 - NUM_ALTERNATIVES), 0)
    around = by_memory[start : start + NUM_ALTERNATIVES + 1]
    nearest = tuple(candidate.option() for candidate in around if candidate is not chosen)
    plan = Plan(chosen=chosen.option(), alternatives=nearest)
    return PlannedRun(chosen=chosen, plan=plan, leaner=tuple(by_memory[at + 1 :]))


def _fits_any(candidates: Sequence[Candidate]) -> bool:
    return any(candidate.fits == YES for candidate in candidates)


class _Trials:
    """The ways to run that were tried: the candidates, and the errors of those that the model does not allow."""

    def __init__(
        self,
        settings: EstimateSettings,
        gpu: Gpu,
        predict: Predict,
        find_products: FindProducts,
        division: Division | None,
    ) -> None:
        """Try ways that divide rows as `division` does; as the settings do, without one."""
        self._settings = settings if division is None else with_settings(settings, division.values)
        self._gpu, self._predict, self._find_products, self._division = gpu, predict, find_products, division
        self.candidates: list[Candidate] = []
        self.failures: list[QloraError] = []

    @property
    def fits_without_recomputing(self) -> bool:
        """Whether the fastest of the ways that the settings allow fits: no other one can be faster."""
        return bool(self.candidates) and self.candidates[0].fits == YES and self._asked != Checkpointing.SELECTIVE

    @property
    def _asked(self) -> Checkpointing:
        return self._settings.training.gradient_checkpointing

    def add_all(self, *, only_fastest: bool) -> None:
        """Try what the settings leave open, the fastest first; `only_fastest`: until one fits."""
        if not is_open(self._settings):
            self._try({})
        elif self._asked == Checkpointing.SELECTIVE:
            self._add_selective()
        else:
            for add in self._kinds():
                add()
                if only_fastest and _fits_any(self.candidates):
                    return
            if not self._settings.training.torch_compile and not _fits_any(self.candidates):
                self._add(Checkpointing.OFFLOAD)

    def _kinds(self) -> Iterator[Callable[[], None]]:
        """Yield what tries each kind of checkpointing on the GPU, by what is computed again, the least first."""
        yield partial(self._add, Checkpointing.OFF)
        if keeps_products(self._settings):
            yield self._add_selective
        yield partial(self._add, Checkpointing.ON)

    def _add(self, checkpointing: Checkpointing) -> None:
        """Try to run with this kind, without anything that could be left out."""
        self._try({CHECKPOINTING: checkpointing, KEPT: None})

    def _try(self, values: Mapping[str, object], left_out: tuple[str, ...] = ()) -> Candidate | None:
        """Try one way to run, and return it; None if the model does not allow it."""
        changed = with_settings(self._settings, values)
        try:
            estimate = self._predict(changed, self._gpu)
        except QloraError as error:  # some models support no checkpointing
            self.failures.append(error)
            return None
        division, time = self._division, estimate.time
        seconds = None if time is None else time.step_seconds
        candidate = Candidate(
            values=values if division is None else {**division.values, **values},
            settings=changed,
            estimate=estimate,
            fits=judge_fit(estimate, self._gpu).fits,
            step_seconds=division.step_seconds(time) if division is not None and time is not None else seconds,
            left_out=left_out,
        )
        self.candidates.append(candidate)
        return candidate

    def _add_selective(self) -> None:
        """Try to keep all products that would be recomputed; if they do not fit, the most valuable ones that do."""
        try:
            recomputed = with_settings(self._settings, {CHECKPOINTING: Checkpointing.ON})
            products = self._find_products(recomputed, self._gpu)
        except QloraError as error:
            self.failures.append(error)
            return
        by_value = sorted(products, key=lambda product: (-product.flops / product.kept_bytes, product.kept_bytes))
        num_kept = len(by_value)
        for _ in range(1 + MAX_SUBSETS):
            names = tuple(product.name for product in by_value)
            kept = names[:num_kept] or None  # without such products, selective keeps what else it keeps
            values = {CHECKPOINTING: Checkpointing.SELECTIVE, KEPT: kept}
            tried = self._try(values, left_out=names[num_kept:])
            if tried is None or _fits_any(self.candidates):
                return
            # Activations grow by what is kept, and the upper end of the band in proportion.
            growth = tried.high_bytes / tried.estimate.predicted.process_bytes
            missing = (tried.high_bytes - self._gpu.usable_bytes) / growth
            while num_kept and missing > 0:
                num_kept -= 1
                missing -= by_value[num_kept].kept_bytes
            if not num_kept:
                return


def describe(plan: Plan) -> str:
    """Return the plan in one line: what was chosen, and the alternatives with their memory and time."""
    options = "; ".join(describe_option(option) for option in (plan.chosen, *plan.alternatives))
    return f"gradient checkpointing {options}"


def name_of(option: PlanOption) -> str:
    """Return the kind of checkpointing, and what it leaves out for want of memory: `selective without up_proj`."""
    name = option.gradient_checkpointing
    return f"{name} without {', '.join(option.recomputed_products)}" if option.recomputed_products else name


def full_name_of(option: PlanOption) -> str:
    """Return `name_of` with what was chosen for micro-batches, if anything: `on in micro-batches of 2,048 tokens`."""
    tokens = option.micro_batch_tokens
    return name_of(option) + ("" if tokens is None else f" in micro-batches of {tokens:,} tokens")


def describe_option(option: PlanOption) -> str:
    """Return a way to run with its memory and time, and that it does not fit if so."""
    time = "" if option.step_seconds is None else f", {option.step_seconds:.2f} s a step"
    fits = {YES: "", NO: ", does not fit"}.get(option.fits, ", fits tightly")
    return f"{full_name_of(option)} {format_bytes(option.process_bytes)}{time}{fits}"
