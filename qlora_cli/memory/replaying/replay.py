"""Replay a whole run through the allocator, from loading to evaluation, and take the peaks of its phases."""

from collections.abc import Iterable
from dataclasses import dataclass

from qlora_cli.memory.prediction import PHASES, Phase
from qlora_cli.memory.replaying.allocator import Block, CachingAllocator
from qlora_cli.memory.replaying.loaded_weights import ADAPT, LOAD
from qlora_cli.memory.replaying.optimizer_step import FIRST, LATER
from qlora_cli.memory.tracing.kernels import CUBLAS, GATHER_BUFFERS, GATHERED, WORKSPACES
from qlora_cli.memory.tracing.passes import MISMATCHED, REFERENCE, Passes

OPENINGS = (f"{MISMATCHED}{REFERENCE}", MISMATCHED, REFERENCE, "")  # the passes of a forward pass that there may be
NUM_STEPS = 2  # the first creates the optimizer's state, the second has it from the start


@dataclass(frozen=True, kw_only=True)
class RunEvents:
    """The allocations of a run: of the weights and the adapter, of the passes of a step, and of the optimizer."""

    resident: Passes
    step: Passes
    optimizer: Passes
    num_micro_batches: int
    evaluates: bool


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Peaks in bytes: of each phase and of the run, and what was allocated at the run's peak, by label.

    `by_label` sums the requested sizes; the rest of each block counts as slack.
    """

    phases: tuple[Phase, ...]
    allocated_bytes: int
    reserved_bytes: int
    by_label: dict[str, int]
    ruling_phase: str


class Replay:
    """The allocator during a run, starting with an empty pool; each cuBLAS handle allocates `workspace_bytes`.

    A training loop that loads in another way is a subclass with its own `load`.
    """

    def __init__(self, workspace_bytes: int) -> None:
        self.workspace_bytes = workspace_bytes
        self.allocator = CachingAllocator()
        self.labels: dict[str, int] = {}
        self.peak_labels: dict[str, int] = {}
        self.peak_bytes = 0
        self.ruling_phase = PHASES[0]
        self.phases: dict[str, Phase] = {}
        self._live: dict[int, dict[int, Block]] = {}  # by the identity of their passes, by storage

    def peaks(self, run: RunEvents) -> Peaks:
        """Return the peaks of `run`, from loading to evaluation."""
        self.load(run.resident)
        rounds = min(run.num_micro_batches - 1, 1)  # later micro-batches find gradients, as the second does
        for step in range(NUM_STEPS):
            again = step > 0
            self.run("forward", run.step, [f"first forward{opening}" for opening in OPENINGS], again=again)
            self.run("backward", run.step, ["first backward", "first end"], again=again)
            for _ in range(rounds):
                self.run("forward", run.step, [f"again forward{opening}" for opening in OPENINGS], again=again)
                self.run("backward", run.step, ["again backward", "again end"], again=again)
            self.run("optimizer", run.optimizer, [LATER if again else FIRST], again=again)
            self.run("optimizer", run.step, ["zero"], again=again)
        if run.evaluates:
            evaluation = [f"evaluation{opening}" for opening in OPENINGS]
            self.run("evaluation", run.step, [*evaluation, "evaluation end"])
        return Peaks(
            phases=tuple(self.phases[name] for name in PHASES if name in self.phases),
            allocated_bytes=self.peak_bytes,
            reserved_bytes=max(phase.reserved_bytes for phase in self.phases.values()),
            by_label=_merged(self.peak_labels),
            ruling_phase=self.ruling_phase,
        )

    def load(self, resident: Passes) -> None:
        """Replay the loading of the weights, and the adapter."""
        self.run("load", resident, [LOAD, ADAPT])

    def run(self, phase: str, passes: Passes, names: Iterable[str], *, again: bool = False) -> None:
        """Replay passes as a part of `phase`; `again`: they ran before, so permanent storages exist already."""
        allocator, labels, storages = self.allocator, self.labels, passes.storages
        live = self._live.setdefault(id(passes), {})  # each counts its storages from 0
        known = passes.permanent if again else ()
        allocator.reset_peaks()
        is_at_peak = False  # since the last allocation, so that the labels are copied once for all that lead to a peak
        for event in (event for name in names for event in passes.events.get(name, ())):
            if event >= 0:
                if event in known:
                    continue
                storage = storages[event]
                label = storage.label
                # A trace is of every GPU with the same kernels, and so knows no size of this workspace.
                num_bytes = self.workspace_bytes if label == CUBLAS else storage.num_bytes
                leftover = live.get(event)
                live[event] = allocator.allocate(num_bytes, apart=label == GATHER_BUFFERS)
                if leftover is not None:  # still allocated from the previous pass: replaced by the new one
                    allocator.free(leftover)
                if allocator.allocated_bytes > self.peak_bytes:
                    self.peak_bytes = allocator.allocated_bytes
                    is_at_peak = True
                elif is_at_peak:
                    self._note_peak(phase)
                    is_at_peak = False
                if leftover is None:
                    labels[label] = labels.get(label, 0) + num_bytes
            else:
                if is_at_peak:
                    self._note_peak(phase)
                    is_at_peak = False
                storage = storages[~event]
                allocator.free(live.pop(~event))
                labels[storage.label] -= storage.num_bytes
        if is_at_peak:
            self._note_peak(phase)
        self._update_phase(phase)

    def _note_peak(self, phase: str) -> None:
        self.peak_labels, self.ruling_phase = dict(self.labels), phase

    def _update_phase(self, phase: str) -> None:
        before = self.phases.get(phase)
        self.phases[phase] = Phase(
            name=phase,
            allocated_bytes=max(self.allocator.peak_allocated_bytes, before.allocated_bytes if before else 0),
            reserved_bytes=max(self.allocator.peak_reserved_bytes, before.reserved_bytes if before else 0),
        )


def _merged(labels: dict[str, int]) -> dict[str, int]:
    """Return `labels` with the workspaces of cuBLAS added to the others, and buffers to what is gathered in them."""
    merged = dict(labels)
    for part, whole in ((CUBLAS, WORKSPACES), (GATHER_BUFFERS, GATHERED)):
        merged[whole] = merged.get(whole, 0) + merged.pop(part, 0)
    return merged
