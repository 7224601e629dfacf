"""Draw docs/explanation/figures/memory-step.png: the memory of one training step, allocation by allocation.

python scripts/make_memory_figure.py          # a test fails when its peaks are not those predicted now
"""

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise

# Nothing is compiled here, and PyTorch's compiler takes a second to import.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from make_figures import FIGURES, FONT_SIZE
from matplotlib.figure import Figure

from qlora_cli.charts.canvas import REPRODUCIBLE_METADATA, drawing_style
from qlora_cli.charts.palette import LIGHT
from qlora_cli.memory.catalogue import find_in_catalogue
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.replaying.loaded_weights import ADAPT, LOAD
from qlora_cli.memory.replaying.optimizer_step import FIRST, LATER
from qlora_cli.memory.replaying.replay import RunEvents
from qlora_cli.memory.tracing.kernels import CUBLAS, cublas_workspace_bytes
from qlora_cli.memory.tracing.passes import Passes
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.units import GIB

FIGURE = "memory-step.png"
MODEL, CARD, LENGTH = "llama-3.1-8b", "RTX 4090", 8192
NUM_COLUMNS = 1200  # of the figure; each shows the moment of its interval with the most memory
# The stacked areas, from the bottom: name, labels, colour.
PARTS: tuple[tuple[str, frozenset[str], str], ...] = (
    ("4-bit weights and constants", frozenset({"quantized_weights", "quantization_constants"}), "#0b7285"),
    ("16-bit weights", frozenset({"unquantized_weights"}), "#3bc9db"),
    ("adapters, gradients, optimizer", frozenset({"adapters", "gradients", "optimizer"}), "#5f3dc4"),
    ("activations", frozenset({"activations"}), "#f08c00"),
    ("loss, weights restored in kernels", frozenset({"loss", "workspaces", CUBLAS}), "#e03131"),
)


@dataclass
class Timeline:
    """The live bytes by label after each event, and the event at which each phase begins."""

    moments: list[dict[str, int]] = field(default_factory=list)
    phases: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)

    def play(self, passes: Passes, name: str, workspace_bytes: int, *, phase: str | None, again: bool) -> None:
        """Replay a pass; without a `phase`, it is not drawn. `again`: permanent storages exist already."""
        if phase is not None:
            self.phases.setdefault(phase, len(self.moments))
        for event in passes.events.get(name, ()):
            storage = passes.storages[max(event, ~event)]
            if event >= 0 and again and event in passes.permanent:
                continue
            size = workspace_bytes if storage.label == CUBLAS else storage.num_bytes
            self.held[storage.label] = self.held.get(storage.label, 0) + (size if event >= 0 else -size)
            if phase is not None:
                self.moments.append(dict(self.held))


def second_step() -> Timeline:
    """Return the second step of a run, with one micro-batch, as `qlora inspect-memory` predicts it."""
    model = find_in_catalogue(MODEL)
    assert model is not None
    settings = EstimateSettings.model_validate(
        {
            "model": {"name": MODEL},
            "data": {"max_length": LENGTH},
            "training": {"gradient_accumulation_steps": 1},
        }
    )
    estimator = Estimator(ModelFacts(name=MODEL, content=deepcopy(dict(model.config))))
    gpu = find_gpu(CARD)
    return _timeline(estimator.traced(settings, gpu).events, cublas_workspace_bytes(gpu.capability))


def _timeline(run: RunEvents, workspace_bytes: int) -> Timeline:
    timeline = Timeline()
    for name in (LOAD, ADAPT):
        timeline.play(run.resident, name, workspace_bytes, phase=None, again=False)
    for again in (False, True):
        for passes, name, phase in (
            (run.step, "first forward", "forward"),
            (run.step, "first backward", "backward"),
            (run.step, "first end", "backward"),
            (run.optimizer, LATER if again else FIRST, "optimizer"),
            (run.step, "zero", "optimizer"),
        ):
            timeline.play(passes, name, workspace_bytes, phase=phase if again else None, again=again)
    return timeline


def describe(timeline: Timeline) -> str:
    """Return the peak of each phase as one line, which is stored in the figure's file."""
    starts = [*timeline.phases.values(), len(timeline.moments)]
    peaks = (max(sum(held.values()) for held in timeline.moments[start:end]) / GIB for start, end in pairwise(starts))
    return "peak of " + "; ".join(
        f"{phase} {peak:.2f} GiB" for phase, peak in zip(timeline.phases, peaks, strict=True)
    )


def columns(timeline: Timeline) -> list[Mapping[str, int]]:
    """Return the live bytes at the peak of each column of the figure."""
    moments = timeline.moments
    width = -(-len(moments) // NUM_COLUMNS)
    return [max(moments[at : at + width], key=lambda held: sum(held.values())) for at in range(0, len(moments), width)]


def draw(timeline: Timeline) -> Figure:
    """Draw the parts as stacked areas, with marks where the phases begin."""
    shown = columns(timeline)
    width = len(timeline.moments) / len(shown)
    rows = [[sum(held.get(label, 0) for label in labels) / GIB for held in shown] for _, labels, _ in PARTS]
    figure = Figure(figsize=(9, 4.6), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.stackplot(range(len(shown)), rows, colors=[color for *_, color in PARTS], labels=[name for name, *_ in PARTS])
    top = max(sum(column) for column in zip(*rows, strict=True))
    for phase, start in timeline.phases.items():
        axes.axvline(start / width, color=LIGHT.ink, linewidth=0.8, ymax=0.97)
        axes.text(start / width + 8, top * 1.17, phase, va="top", color=LIGHT.ink, weight="bold")
    axes.set(xlim=(0, len(shown) - 1), ylim=(0, top * 1.2), ylabel="live tensors, GiB")
    axes.set_xlabel("allocations and releases, in order", color=LIGHT.muted)
    axes.tick_params(bottom=False, labelbottom=False)
    axes.grid(axis="y", color=LIGHT.line, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"One step of Llama-3.1-8B: rank 16, one row of {LENGTH:,} tokens", loc="left", weight="bold")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, reverse=False)
    return figure


if __name__ == "__main__":
    FIGURES.mkdir(parents=True, exist_ok=True)
    step = second_step()
    with drawing_style(FONT_SIZE):
        draw(step).savefig(FIGURES / FIGURE, metadata={**REPRODUCIBLE_METADATA["png"], "Description": describe(step)})
