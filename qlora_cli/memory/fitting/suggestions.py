"""Judge whether a run fits on a GPU, and suggest changes of flags that make it fit, the mildest first."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qlora_cli.errors import QloraError
from qlora_cli.memory.fitting.solver import LENGTH_STEP, Point, headroom_bytes, search_between
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import Estimate, GpuFit, Suggestion
from qlora_cli.memory.request import Predict
from qlora_cli.settings.choices import Attention, Checkpointing, Optimizer
from qlora_cli.settings.display import flags_of
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.settle import with_settings
from qlora_cli.units import MIB

YES, TIGHT, NO = "yes", "tight", "no"

MIN_RANK = 8
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")

MAX_SUGGESTIONS = 6
MIN_SAVING_BYTES = MIB
# A prediction may take a second. A search for a milder step gets a few; no search begins after so many in total.
MAX_SEARCH_PREDICTIONS = 4
MAX_PREDICTIONS = 14


@dataclass(frozen=True, kw_only=True)
class ChangeStep:
    """New values of some settings, by `section.key`, and their effect in a few words."""

    values: Mapping[str, object]
    effect: str


@dataclass(frozen=True)
class FlagChange:
    """A change that saves memory, in steps: the first saves most, the last changes the run least.

    `is_gentle`: the same weights are trained on the same rows; only speed or rounding differ.
    """

    steps: tuple[ChangeStep, ...]
    is_gentle: bool


@dataclass(frozen=True)
class ChosenStep:
    """A change at one of its steps."""

    change: FlagChange
    step: ChangeStep


def judge_fit(estimate: Estimate, gpu: Gpu) -> GpuFit:
    """Return whether the run of `estimate`, which was made for `gpu`, fits on it.

    `no`: even if PyTorch released every cached segment, the tensors and the CUDA context would not fit. `tight`: the
    run may run out of memory, or be slowed down by the allocator's retries.
    """
    assert estimate.gpu == gpu.name, f"an estimate for {estimate.gpu}, judged on {gpu.name}"
    figures = estimate.predicted
    if headroom_bytes(estimate, gpu) >= 0:
        verdict = YES
    elif figures.allocated_low_bytes + estimate.components.context_bytes > gpu.usable_bytes:
        verdict = NO
    else:
        verdict = TIGHT
    return GpuFit(
        gpu=gpu.name,
        group=gpu.group,
        fits=verdict,
        usable_bytes=gpu.usable_bytes,
        process_bytes=figures.process_bytes,
        process_high_bytes=figures.process_high_bytes,
        margin_bytes=gpu.usable_bytes - figures.process_bytes,
        gradient_checkpointing=estimate.gradient_checkpointing,
        step_seconds=None if estimate.time is None else estimate.time.step_seconds,
    )


def keeps_products(settings: EstimateSettings) -> bool:
    """Return whether single products can be kept: not those of compiled layers, nor with compiled attention."""
    return not settings.training.torch_compile and not settings.model.attention.is_compiled


def suggest(settings: EstimateSettings, gpu: Gpu, predict: Predict, base: Estimate) -> tuple[Suggestion, ...]:
    """Return the changes that make a run fit on `gpu`, the mildest first; none if it fits by `base` already.

    Each is a single change at the mildest step that fits. If none of those is gentle, a combination comes first: all
    gentle changes, with the first of the others where that allows it a milder step. If no single change suffices, the
    combination that does comes after its parts; if nothing fits, the combination that comes nearest is the only one.
    Changes that the model or the settings do not allow, and those that save nothing, are left out.
    """
    trials = Trials(settings, gpu, predict, base)
    if trials.base_headroom_bytes >= 0:
        return ()
    useful, fitting = _single_changes(trials, _changes(settings, base, gpu))
    if not fitting:
        return _combined(trials, useful)
    suggested = [[trials.mildest([chosen], 0)] for chosen in fitting]
    if not any(chosen.change.is_gentle for chosen in fitting):
        gentle = [chosen for chosen in useful if chosen.change.is_gentle]
        combination = _accumulate(trials, [*gentle, *fitting])
        combination = _relax(trials, combination) if trials.headroom_bytes(combination) >= 0 else []
        if combination[-1:] not in ([], *suggested):
            suggested.insert(0, combination)
    return tuple(trials.suggestion(steps) for steps in suggested)


def _single_changes(trials: "Trials", changes: Iterable[FlagChange]) -> tuple[list[ChosenStep], list[ChosenStep]]:
    """Return the changes that save memory and those of them that fit, all at the step that saves most."""
    useful: list[ChosenStep] = []
    fitting: list[ChosenStep] = []
    for change in changes:
        chosen = ChosenStep(change, change.steps[0])
        if trials.saved_bytes([chosen]) >= MIN_SAVING_BYTES:
            useful.append(chosen)
            if trials.headroom_bytes([chosen]) >= 0:
                fitting.append(chosen)
        if len(fitting) == MAX_SUGGESTIONS:
            break
    return useful, fitting


def _combined(trials: "Trials", useful: Sequence[ChosenStep]) -> tuple[Suggestion, ...]:
    """Return the combination that fits, after its parts; if none fits, only the one that comes nearest."""
    combination = _accumulate(trials, useful)
    if trials.headroom_bytes(combination) < 0:
        return (trials.suggestion(combination),) if combination else ()
    combination = _relax(trials, combination)
    singles = [[single] for single in combination if trials.saved_bytes([single]) >= MIN_SAVING_BYTES]
    return tuple(trials.suggestion(steps) for steps in (*singles, combination))


def _accumulate(trials: "Trials", useful: Sequence[ChosenStep]) -> list[ChosenStep]:
    """Return the changes, added one by one until the run fits, without those that save nothing more."""
    combination: list[ChosenStep] = []
    for chosen in useful:
        replaced = chosen.step.values.keys()
        more = [*(other for other in combination if not other.step.values.keys() <= replaced), chosen]
        if trials.saved_bytes(more) - trials.saved_bytes(combination) >= MIN_SAVING_BYTES:
            combination = more
        if trials.headroom_bytes(combination) >= 0:
            break
    return combination


def _relax(trials: "Trials", combination: list[ChosenStep]) -> list[ChosenStep]:
    """Return the combination with milder steps that still fit; changes with the most effect on the run relax first."""
    for index in reversed(range(len(combination))):
        if trials.num_predictions < MAX_PREDICTIONS:
            combination = [*combination[:index], trials.mildest(combination, index), *combination[index + 1 :]]
    return combination


class Trials:
    """The estimates of a run on a GPU with changes; each combination is predicted once."""

    def __init__(self, settings: EstimateSettings, gpu: Gpu, predict: Predict, base: Estimate) -> None:
        self.base_headroom_bytes = headroom_bytes(base, gpu)
        self._settings, self._gpu, self._predict, self._base = settings, gpu, predict, base
        self._estimates: dict[str, Estimate | None] = {"": base}

    @property
    def num_predictions(self) -> int:
        """The number of predictions so far."""
        return len(self._estimates) - 1

    def _estimate(self, combination: Sequence[ChosenStep]) -> Estimate | None:
        """Return the estimate with the changes; None if the run is not possible with them."""
        values = _values(combination)
        flags = flags_of(values)
        if flags not in self._estimates:
            try:
                self._estimates[flags] = self._predict(with_settings(self._settings, values), self._gpu)
            except QloraError:  # not with this model, or not with the other settings: nothing to suggest
                self._estimates[flags] = None
        return self._estimates[flags]

    def headroom_bytes(self, combination: Sequence[ChosenStep]) -> int:
        """Return the bytes left with the changes; for an impossible run, those of the unchanged one."""
        estimate = self._estimate(combination)
        return self.base_headroom_bytes if estimate is None else headroom_bytes(estimate, self._gpu)

    def saved_bytes(self, combination: Sequence[ChosenStep]) -> int:
        """Return the bytes that the process saves with the changes; 0 if the run is not possible with them."""
        estimate = self._estimate(combination)
        return 0 if estimate is None else self._base.predicted.process_bytes - estimate.predicted.process_bytes

    def mildest(self, combination: Sequence[ChosenStep], index: int) -> ChosenStep:
        """Return the change at `index` at the mildest step with which the combination, which fits, still does."""
        change = combination[index].change

        def headroom_at(position: int) -> int:
            return self.headroom_bytes(
                [*combination[:index], ChosenStep(change, change.steps[position]), *combination[index + 1 :]]
            )

        low, high = Point(0, headroom_at(0)), Point(len(change.steps), self.base_headroom_bytes)
        return ChosenStep(
            change, change.steps[search_between(low, high, headroom_at, max_predictions=MAX_SEARCH_PREDICTIONS)]
        )

    def suggestion(self, combination: Sequence[ChosenStep]) -> Suggestion:
        """Return the suggestion to make these changes."""
        estimate = self._estimate(combination)
        assert estimate is not None, "suggested, though it can't be run"
        return Suggestion(
            flags=flags_of(_values(combination)),
            effect="; ".join(chosen.step.effect for chosen in combination),
            saved_bytes=self.saved_bytes(combination),
            process_bytes=estimate.predicted.process_bytes,
            fits=judge_fit(estimate, self._gpu).fits,
        )


def _values(combination: Sequence[ChosenStep]) -> dict[str, object]:
    return {path: value for chosen in combination for path, value in chosen.step.values.items()}


def _changes(settings: EstimateSettings, base: Estimate, gpu: Gpu) -> Iterator[FlagChange]:
    """Yield the possible changes, least effect on result and speed first."""
    gentle = (
        _checkpointing(settings, base),
        _smaller_micro_batch(settings),
        _denser_storage(settings),
        _smaller_optimizer(settings, pages=not gpu.is_host),
        () if gpu.is_host else _offload(settings, base),
        () if gpu.is_host else _offload_base(settings),
        _attention(settings),
    )
    other = (_fewer_bits(settings), _lower_rank(settings), _shorter_rows(settings), _fewer_targets(settings))
    for is_gentle, changes in ((True, gentle), (False, other)):
        for change in changes:
            if steps := tuple(change):
                yield FlagChange(steps, is_gentle)


# Each generator yields the steps of one change, the one that saves most first.


def _checkpointing(settings: EstimateSettings, base: Estimate) -> Iterator[ChangeStep]:
    slowdowns = {Checkpointing.OFF: "half", Checkpointing.SELECTIVE: "a third"}
    slowdown = slowdowns.get(Checkpointing(base.gradient_checkpointing))
    if slowdown is not None:
        yield ChangeStep(
            values={"training.gradient_checkpointing": Checkpointing.ON},
            effect=f"same result, a step takes up to {slowdown} as long again",
        )
    if base.gradient_checkpointing == Checkpointing.OFF and keeps_products(settings):
        yield ChangeStep(
            values={"training.gradient_checkpointing": Checkpointing.SELECTIVE},
            effect="same result, a step takes somewhat longer",
        )


def _smaller_micro_batch(settings: EstimateSettings) -> Iterator[ChangeStep]:
    if (tokens := settings.training.micro_batch_tokens) is not None:
        for fewer in _halvings(tokens, settings.longest_row_tokens):
            yield ChangeStep(values={"training.micro_batch_tokens": fewer}, effect="same batch, same result")
        return
    num_rows = settings.training.micro_batch_size
    batch = num_rows * settings.training.gradient_accumulation_steps
    for micro in _halvings(num_rows, 1):
        if batch % micro == 0:
            yield ChangeStep(
                values={
                    "training.micro_batch_size": micro,
                    "training.gradient_accumulation_steps": batch // micro,
                },
                effect="same batch, same result",
            )


def _denser_storage(settings: EstimateSettings) -> Iterator[ChangeStep]:
    from qlora_cli.quantization.methods import method_of  # with torch

    for saving in reversed(list(method_of(settings.quantization.method).savings(settings.quantization))):
        yield ChangeStep(values={f"quantization.{saving.key}": saving.value}, effect=saving.effect)


def _smaller_optimizer(settings: EstimateSettings, *, pages: bool) -> Iterator[ChangeStep]:
    optimizer = settings.training.optimizer
    if optimizer.is_paged:
        return
    # Lion stays Lion: another optimizer would need another learning rate.
    paged, unpaged = (
        (Optimizer.PAGED_LION_8BIT, Optimizer.LION_8BIT)
        if optimizer.is_lion
        else (Optimizer.PAGED_ADAMW_8BIT, Optimizer.ADAMW_8BIT)
    )
    if pages:
        yield ChangeStep(
            values={"training.optimizer": paged},
            effect="optimizer state in 8 bit, and in host memory when the GPU is full",
        )
    if optimizer != unpaged:
        yield ChangeStep(values={"training.optimizer": unpaged}, effect="optimizer state in 8 bit")


def _offload(settings: EstimateSettings, base: Estimate) -> Iterator[ChangeStep]:
    if base.gradient_checkpointing != Checkpointing.OFFLOAD and not settings.training.torch_compile:
        yield ChangeStep(
            values={"training.gradient_checkpointing": Checkpointing.OFFLOAD},
            effect="same result, slower: activations wait in host memory",
        )


def _offload_base(settings: EstimateSettings) -> Iterator[ChangeStep]:
    if settings.training.shards_base and not settings.training.offload_base:
        yield ChangeStep(
            values={"training.offload_base": True},
            effect="same result, slower: the shards wait in host memory",
        )


def _attention(settings: EstimateSettings) -> Iterator[ChangeStep]:
    if settings.model.attention == Attention.EAGER:
        yield ChangeStep(values={"model.attention": Attention.AUTO}, effect="same result but for rounding, faster")


def _fewer_bits(settings: EstimateSettings) -> Iterator[ChangeStep]:
    for method in reversed(settings.quantization.method.smaller()):
        assert method.traits.proposal is not None, "every smaller method has a proposal"
        yield ChangeStep(values={"quantization.method": method}, effect=method.traits.proposal)


def _lower_rank(settings: EstimateSettings) -> Iterator[ChangeStep]:
    for rank in _halvings(settings.lora.rank, MIN_RANK):
        yield ChangeStep(values={"lora.rank": rank}, effect=f"a smaller adapter, of rank {rank}")


def _shorter_rows(settings: EstimateSettings) -> Iterator[ChangeStep]:
    for length in range(LENGTH_STEP, settings.data.max_length, LENGTH_STEP):
        yield ChangeStep(values={"data.max_length": length}, effect=f"rows beyond {length:,} tokens are truncated")


def _fewer_targets(settings: EstimateSettings) -> Iterator[ChangeStep]:
    targets = settings.lora.target_modules
    if targets == "all-linear" or set(targets) > set(ATTENTION_MODULES):
        yield ChangeStep(values={"lora.target_modules": ATTENTION_MODULES}, effect="adapters on attention only")


def _halvings(value: int, least: int) -> list[int]:
    """Return half of `value`, half of that and so on, down to `least`; the smallest first."""
    halves = []
    while (value := value // 2) >= least:
        halves.append(value)
    return halves[::-1]
