"""The lines below the bar of a live display, laid out for its width. Pure functions of the state."""

from collections.abc import Iterator, Sequence

from rich.text import Text

from qlora_cli.cli.console import shortened
from qlora_cli.cli.progress.event_text import (
    describe_age,
    describe_epoch,
    describe_loss,
    describe_losses,
    describe_memory,
    describe_prediction,
    describe_step,
)
from qlora_cli.cli.progress.run_state import RunState
from qlora_cli.cli.stderr import sanitize
from qlora_cli.events import MemoryUse
from qlora_cli.units import counted

GAP = "  "
NARROW = 60  # columns; below, figures are shown without words
BAR_WIDTH, LEAST_BAR_WIDTH = 32, 10
ALLOCATED, RESERVED, FREE, PREDICTED = "█", "▒", "░", "│"


def headline(state: RunState, width: int) -> Text:
    """Return what is being done and, once it trains, for which run."""
    line = Text(no_wrap=True, overflow="ellipsis")
    if state.started is not None:
        line.append(shortened(sanitize(str(state.started.output)), width // 2), "bold").append(GAP)
    return line.append(sanitize(state.status), "dim")


def training_lines(state: RunState, width: int, now: float, *, can_show_blocks: bool) -> Iterator[Text]:
    """Yield the figures of a run at `now`, in lines of at most `width` columns."""
    if state.last_step is not None:
        step = state.last_step
        figures = describe_step(step, describe_loss(step, state.loss))
        yield from flow([*figures, *describe_epoch(step, state.num_epochs)], width)
        if can_show_blocks and (curve := describe_losses(state.losses.means(), width)) is not None:
            yield Text(curve, style="cyan", no_wrap=True)
    yield from flow(_evaluation_parts(state), width)
    if state.last_step is not None:
        yield from _memory_lines(state, state.last_step.memory, width, can_show_blocks=can_show_blocks)
    yield from flow(_history_parts(state, now), width, style="dim")


def flow(parts: Sequence[str | Text], width: int, style: str = "") -> list[Text]:
    """Return `parts` in lines of at most `width` columns; a part is never broken."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + len(GAP) + len(part) <= width:
            lines[-1].append(GAP)
        else:
            lines.append(Text(style=style, no_wrap=True, overflow="ellipsis"))
        lines[-1].append(part)
    return lines


def memory_bar(memory: MemoryUse, predicted_reserved_bytes: int | None, width: int) -> str:
    """Return the GPU's memory as `width` blocks: allocated, reserved, free, with a line at the prediction."""
    total = memory.device_total_bytes
    assert total
    allocated = _blocks(memory.device_allocated_bytes or 0, total, width)
    reserved = max(allocated, _blocks(memory.device_reserved_bytes or 0, total, width))
    bar = ALLOCATED * allocated + RESERVED * (reserved - allocated) + FREE * (width - reserved)
    if predicted_reserved_bytes is None:
        return bar
    at = min(_blocks(predicted_reserved_bytes, total, width), width - 1)
    return bar[:at] + PREDICTED + bar[at + 1 :]


def _blocks(num_bytes: int, total_bytes: int, width: int) -> int:
    return min(width, round(num_bytes / total_bytes * width))


def _memory_lines(state: RunState, memory: MemoryUse, width: int, *, can_show_blocks: bool) -> list[Text]:
    parts = [describe_memory(memory, is_short=width < NARROW)]
    if predicted := describe_prediction(memory, state.predicted_reserved_bytes):
        parts.append(predicted)
    lines = flow(parts, width, style="dim")
    bar_width = min(BAR_WIDTH, width - len(lines[-1]) - len(GAP))
    if can_show_blocks and memory.device_total_bytes and bar_width >= LEAST_BAR_WIDTH:
        lines[-1].append(GAP + memory_bar(memory, state.predicted_reserved_bytes, bar_width))
    return lines


def _evaluation_parts(state: RunState) -> list[str]:
    last, best = state.last_eval, state.best_eval
    if last is None:
        return []
    rewards = "" if last.rewards is None else f", {last.rewards}"
    shown = f"held-out {last.loss:.4f}{rewards} at step {last.step:,}"
    if best is last:
        return [f"{shown} (best)"]
    return [shown] if best is None else [shown, f"best {best.loss:.4f} at step {best.step:,}"]


def _history_parts(state: RunState, now: float) -> list[str | Text]:
    parts: list[str | Text] = []
    if state.checkpoint is not None:
        parts.append(f"checkpoint step {state.checkpoint.step:,}, {describe_age(now - state.checkpoint_time)}")
    if state.num_skipped:
        parts.append(Text(f"{counted(state.num_skipped, 'step')} skipped", style="yellow"))
    if state.resumed is not None and state.resumed.step:
        parts.append(f"resumed at step {state.resumed.step:,}")
    return parts
