"""Whether a run fits on a GPU, and if not, which changes of flags make it fit: what changes the run least first."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qlora_cli.errors import QloraError
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import Estimate, GpuFit, Suggestion
from qlora_cli.memory.solver import LENGTH_STEP, Ask, Point, narrow, room
from qlora_cli.settings.choices import Attention, Checkpointing, Optimizer
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.settle import varied_run
from qlora_cli.settings.shown import flags_of
from qlora_cli.units import MIB

YES, TIGHT, NO = "yes", "tight", "no"

LEAST_RANK = 8
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")

MOST_SUGGESTIONS = 6
LEAST_SAVING = MIB
# Each ask may take a second. A search for a milder step gets few, and none is begun for a combination after so many.
SEARCH_ASKS = 4
MOST_ASKS = 14


@dataclass(frozen=True, kw_only=True)
class Step:
    """Other values of some settings, by `section.key`, and their effect in a few words."""

    values: Mapping[str, object]
    effect: str


@dataclass(frozen=True)
class FlagChange:
    """One way to need less memory. Its steps save less and less: the first saves most, the last changes least.

    `is_gentle`: the same weights are trained on the same rows, at most in another time or with other rounding.
    """

    steps: tuple[Step, ...]
    is_gentle: bool


@dataclass(frozen=True)
class Chosen:
    """A change at one of its steps."""

    change: FlagChange
    step: Step


def fit_on(estimate: Estimate, gpu: Gpu) -> GpuFit:
    """Return whether the run of `estimate`, which was made for `gpu`, fits on it.

    `no` is what can't be: even if PyTorch gave back every segment that it caches, the tensors would not fit beside
    the context. `tight` is what may end with out of memory, or after retries that slow it down.
    """
    assert estimate.gpu == gpu.name, f"an estimate for {estimate.gpu}, judged on {gpu.name}"
    figures = estimate.predicted
    if room(estimate, gpu) >= 0:
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
    )


def suggest(settings: EstimateSettings, gpu: Gpu, ask: Ask, base: Estimate) -> tuple[Suggestion, ...]:
    """Return the changes that make a run fit on `gpu` which `base` says does not; what changes it least comes first.

    Single changes, each at the mildest step that fits; where all of those train something else, first the gentle
    ones together, with the first of the others if it then takes a milder step. If no single one fits, the
    combination that does after the changes it is made of; if nothing fits, the combination that comes nearest, alone.
    A change that this model or these settings can't be run with, or that saves nothing, is none.
    """
    trials = Trials(settings, gpu, ask, base)
    if trials.base_room >= 0:
        return ()
    useful, fitting = _singles(trials, _changes(settings, base))
    if not fitting:
        return _combination(trials, useful)
    found = [[trials.mildest([chosen], 0)] for chosen in fitting]
    if not any(chosen.change.is_gentle for chosen in fitting):
        gentle = [chosen for chosen in useful if chosen.change.is_gentle]
        together = _accumulate(trials, [*gentle, *fitting])
        together = _relax(trials, together) if trials.room(together) >= 0 else []
        if together[-1:] not in ([], *found):
            found.insert(0, together)
    return tuple(trials.suggestion(some) for some in found)


def _singles(trials: "Trials", changes: Iterable[FlagChange]) -> tuple[list[Chosen], list[Chosen]]:
    """Return the changes that save something and those of them that fit, all at the step that saves most."""
    useful: list[Chosen] = []
    fitting: list[Chosen] = []
    for change in changes:
        chosen = Chosen(change, change.steps[0])
        if trials.saved_bytes([chosen]) >= LEAST_SAVING:
            useful.append(chosen)
            if trials.room([chosen]) >= 0:
                fitting.append(chosen)
        if len(fitting) == MOST_SUGGESTIONS:
            break
    return useful, fitting


def _combination(trials: "Trials", useful: Sequence[Chosen]) -> tuple[Suggestion, ...]:
    """Return the combination that fits, after the changes it is made of; if none does, the nearest alone."""
    together = _accumulate(trials, useful)
    if trials.room(together) < 0:
        return (trials.suggestion(together),) if together else ()
    together = _relax(trials, together)
    singles = [[single] for single in together if trials.saved_bytes([single]) >= LEAST_SAVING]
    return tuple(trials.suggestion(some) for some in (*singles, together))


def _accumulate(trials: "Trials", useful: Sequence[Chosen]) -> list[Chosen]:
    """Return the changes added up in their order until the run fits, less those that then save nothing more."""
    together: list[Chosen] = []
    for chosen in useful:
        replaced = chosen.step.values.keys()
        more = [*(other for other in together if not other.step.values.keys() <= replaced), chosen]
        if trials.saved_bytes(more) - trials.saved_bytes(together) >= LEAST_SAVING:
            together = more
        if trials.room(together) >= 0:
            break
    return together


def _relax(trials: "Trials", together: list[Chosen]) -> list[Chosen]:
    """Return the combination with the mildest steps that fit, those that change the run most made milder first."""
    for index in reversed(range(len(together))):
        if trials.num_asks < MOST_ASKS:
            together = [*together[:index], trials.mildest(together, index), *together[index + 1 :]]
    return together


class Trials:
    """What a run takes on a GPU with changes; the same ones are asked once."""

    def __init__(self, settings: EstimateSettings, gpu: Gpu, ask: Ask, base: Estimate) -> None:
        self.base_room = room(base, gpu)
        self._settings, self._gpu, self._ask, self._base = settings, gpu, ask, base
        self._known: dict[str, Estimate | None] = {"": base}

    @property
    def num_asks(self) -> int:
        """How often was asked so far."""
        return len(self._known) - 1

    def _estimate(self, together: Sequence[Chosen]) -> Estimate | None:
        """Return what is predicted with the changes; None if the run can't be made with them."""
        values = _values(together)
        flags = flags_of(values)
        if flags not in self._known:
            try:
                self._known[flags] = self._ask(varied_run(self._settings, values), self._gpu)
            except QloraError:  # not with this model or beside the other settings: no change to propose
                self._known[flags] = None
        return self._known[flags]

    def room(self, together: Sequence[Chosen]) -> int:
        """Return the bytes that are left with the changes; what can't be run has no more than without them."""
        estimate = self._estimate(together)
        return self.base_room if estimate is None else room(estimate, self._gpu)

    def saved_bytes(self, together: Sequence[Chosen]) -> int:
        """Return how much less the process takes with the changes; nothing if it can't be run with them."""
        estimate = self._estimate(together)
        return 0 if estimate is None else self._base.predicted.process_bytes - estimate.predicted.process_bytes

    def mildest(self, together: Sequence[Chosen], index: int) -> Chosen:
        """Return the change at `index` at its mildest step with which the changes, which fit, still do."""
        change = together[index].change

        def room_at(position: int) -> int:
            return self.room([*together[:index], Chosen(change, change.steps[position]), *together[index + 1 :]])

        low, high = Point(0, room_at(0)), Point(len(change.steps), self.base_room)
        return Chosen(change, change.steps[narrow(low, high, room_at, most_asks=SEARCH_ASKS)])

    def suggestion(self, together: Sequence[Chosen]) -> Suggestion:
        """Return the changes as they are shown."""
        estimate = self._estimate(together)
        assert estimate is not None, "suggested, though it can't be run"
        return Suggestion(
            flags=flags_of(_values(together)),
            effect="; ".join(chosen.step.effect for chosen in together),
            saved_bytes=self.saved_bytes(together),
            process_bytes=estimate.predicted.process_bytes,
            fits=fit_on(estimate, self._gpu).fits,
        )


def _values(together: Sequence[Chosen]) -> dict[str, object]:
    return {path: value for chosen in together for path, value in chosen.step.values.items()}


def _changes(settings: EstimateSettings, base: Estimate) -> Iterator[FlagChange]:
    """Yield what could be changed, what changes the result or the speed least first."""
    gentle = (
        _checkpointing(base),
        _smaller_micro_batch(settings),
        _denser_storage(settings),
        _smaller_optimizer(settings),
        _offload(base),
        _sdpa(settings),
    )
    other = (_fewer_bits(settings), _lower_rank(settings), _shorter_rows(settings), _fewer_targets(settings))
    for is_gentle, ladders in ((True, gentle), (False, other)):
        for ladder in ladders:
            if steps := tuple(ladder):
                yield FlagChange(steps, is_gentle)


# Each yields the steps of one change, the one that saves most first.


def _checkpointing(base: Estimate) -> Iterator[Step]:
    if base.gradient_checkpointing == Checkpointing.OFF:
        yield Step(
            values={"training.gradient_checkpointing": Checkpointing.ON},
            effect="same result, a step takes up to half as long again",
        )


def _smaller_micro_batch(settings: EstimateSettings) -> Iterator[Step]:
    num_rows = settings.training.micro_batch_size
    batch = num_rows * settings.training.gradient_accumulation_steps
    for micro in _halvings(num_rows, 1):
        if batch % micro == 0:
            yield Step(
                values={
                    "training.micro_batch_size": micro,
                    "training.gradient_accumulation_steps": batch // micro,
                },
                effect="same batch, same result",
            )


def _denser_storage(settings: EstimateSettings) -> Iterator[Step]:
    from qlora_cli.quantization.methods import method_of  # with torch

    for saving in reversed(list(method_of(settings.quantization.method).savings(settings.quantization))):
        yield Step(values={f"quantization.{saving.key}": saving.value}, effect=saving.effect)


def _smaller_optimizer(settings: EstimateSettings) -> Iterator[Step]:
    optimizer = settings.training.optimizer
    if optimizer.is_paged:
        return
    # Lion stays Lion: another would need another learning rate.
    paged, unpaged = (
        (Optimizer.PAGED_LION_8BIT, Optimizer.LION_8BIT)
        if optimizer.is_lion
        else (Optimizer.PAGED_ADAMW_8BIT, Optimizer.ADAMW_8BIT)
    )
    yield Step(
        values={"training.optimizer": paged},
        effect="optimizer state in 8 bit, and in host memory when the GPU is full",
    )
    if optimizer != unpaged:
        yield Step(values={"training.optimizer": unpaged}, effect="optimizer state in 8 bit")


def _offload(base: Estimate) -> Iterator[Step]:
    if base.gradient_checkpointing != Checkpointing.OFFLOAD:
        yield Step(
            values={"training.gradient_checkpointing": Checkpointing.OFFLOAD},
            effect="same result, slower: activations wait in host memory",
        )


def _sdpa(settings: EstimateSettings) -> Iterator[Step]:
    if settings.model.attention == Attention.EAGER:
        yield Step(values={"model.attention": Attention.SDPA}, effect="same result but for rounding, faster")


def _fewer_bits(settings: EstimateSettings) -> Iterator[Step]:
    for method in reversed(settings.quantization.method.smaller()):
        assert method.traits.proposal is not None, "only what is proposed is smaller"
        yield Step(values={"quantization.method": method}, effect=method.traits.proposal)


def _lower_rank(settings: EstimateSettings) -> Iterator[Step]:
    for rank in _halvings(settings.lora.rank, LEAST_RANK):
        yield Step(values={"lora.rank": rank}, effect=f"a smaller adapter, of rank {rank}")


def _shorter_rows(settings: EstimateSettings) -> Iterator[Step]:
    for length in range(LENGTH_STEP, settings.data.max_length, LENGTH_STEP):
        yield Step(values={"data.max_length": length}, effect=f"rows beyond {length:,} tokens are cut")


def _fewer_targets(settings: EstimateSettings) -> Iterator[Step]:
    targets = settings.lora.target_modules
    if targets == "all-linear" or set(targets) > set(ATTENTION_MODULES):
        yield Step(values={"lora.target_modules": ATTENTION_MODULES}, effect="adapters on attention only")


def _halvings(value: int, least: int) -> list[int]:
    """Return half of `value`, half of that and so on, down to `least`; the smallest first."""
    halves = []
    while (value := value // 2) >= least:
        halves.append(value)
    return halves[::-1]
