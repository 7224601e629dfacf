"""What `qlora inspect-memory` shows: the answer, what would change it, and the peaks, phases and cards behind it.

All sizes are GiB (1024³ bytes) with two decimals, so that figures below one another compare.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from textwrap import wrap

from rich.text import Text

from qlora_cli.cli.console import Row, console, print_lines, print_rows, title
from qlora_cli.cli.rendering.lock_text import check_lines
from qlora_cli.cli.rendering.memory_verdict import NEXT, described_class, significant, verdict_lines, with_article
from qlora_cli.cli.rendering.sweep_table import render_sweep
from qlora_cli.memory.fitting.method_choice import MethodChoice, describe_choice
from qlora_cli.memory.fitting.plan import describe
from qlora_cli.memory.fitting.suggestions import NO
from qlora_cli.memory.gpus import GPUS, Gpu
from qlora_cli.memory.prediction import (
    Components,
    DataSummary,
    GpuFit,
    HostMemory,
    MemoryReport,
    Phase,
    RankedCard,
    RunFigures,
    Solution,
    Suggestion,
)
from qlora_cli.settings.choices import Quantization, Strategy
from qlora_cli.timing.rates_file import DATA_SHEET
from qlora_cli.timing.roofline import HOST
from qlora_cli.timing.run_ratios import described
from qlora_cli.units import GIB, counted, format_count, format_duration

WIDTH = 80
MAX_BARS = 30
MAX_FIT_LINES = 8  # more GPUs than this share lines
NAMES = {
    "quantization_constants": "quantization constants",
    "unquantized_weights": "16/32-bit weights",
    "loss": "logits and loss",
    "gathered": "weights of other GPUs",
    "workspaces": "kernel workspaces",
    "slack": "allocator slack",
    "context": "CUDA context",
}
RESERVED, PROCESS = "reserved", "process"
HOST_PARTS = {
    "process_bytes": "Python, libraries, driver (a guess)",
    "embedding_bytes": "the embedding",
    "shard_bytes": "a shard of the base, in pinned memory",
    "rows_bytes": "numbers about the rows of the data",
    "reading_bytes": "the largest weights, while reading",
    "pinned_bytes": "activations in pinned memory",
    "saving_bytes": "a checkpoint, while saving",
    "paged_bytes": "optimizer state, where the GPU is full",
}


def render_memory(report: MemoryReport, gpus: Sequence[Gpu] = (), *, details: bool = False) -> None:
    """Print a prediction for the named `gpus`; without any, the fits are those of the whole catalogue.

    The answer comes first, then what the settings are and what would change it; all else only with `details`.
    """
    for sentence in verdict_lines(report, gpus):
        for line in hanging(sentence, "", "  "):
            title(line)
    console().print()
    print_rows(_rows(report, gpus, details=details))
    if details:
        _section("Predicted peak", [*figure_lines(report, gpus), *time_lines(report.predicted)])
        is_host = any(gpu.is_host for gpu in gpus)
        _section("What it is for", component_lines(report.components, is_host=is_host))
        if not is_host:
            several = report.host.num_processes
            of_each = f" of each of {several} processes" if several > 1 else ""
            _section(f"Host memory{of_each}, not all at the same time", host_lines(report.host))
        _section("Phases", phase_lines(report.phases, report.ruling_phase, report.reason))
        _section("Where it fits, in GiB", fit_lines(report.fits, is_planned=report.plan is not None))
    if any(details or suggestion.fits != NO for suggestion in report.suggestions):
        _section("What to change", suggestion_lines(report.suggestions))
    if report.solutions:
        _section("The largest that fits", solution_lines(report.solutions))
    if report.cards is not None:
        _section("The best cards for the run", card_lines(report.cards))
    if report.sweep:
        render_sweep(report, gpus[0] if gpus else None)
    if report.check is not None:
        _section("The peak of the process against an earlier one", list(check_lines(report.check)))
    console().print()
    if details:
        title("Taken for granted")
        print_lines([line for text in report.assumptions for line in hanging(text, "  - ", "    ")])
    else:
        print_lines(hanging(NEXT, "", "  "))


def gib(num_bytes: int) -> str:
    """Return bytes as `3.36 GiB`, even below one GiB."""
    return f"{num_bytes / GIB:.2f} GiB"


def hanging(text: str, first: str, rest: str) -> list[str]:
    """Return a sentence as lines of at most 80 columns; flags and paths are not broken."""
    return wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    ) or [first.rstrip()]


def _section(heading: str, lines: Sequence[str]) -> None:
    console().print()
    title(heading)
    for line in lines:
        console().print(Text(line), soft_wrap=True)


def _rows(report: MemoryReport, gpus: Sequence[Gpu], *, details: bool) -> list[Row]:
    attention = ", ".join(report.attention_backends)
    trained = f"{format_count(report.num_trainable_parameters)} of {format_count(report.num_parameters)} parameters"
    rows = [("model", f"{report.model}, {trained} trained")]
    rows += _wrapped("asked", ", ".join(f"{name} {value}" for name, value in report.settings.items()))
    if report.methods is not None:
        choice = MethodChoice(method=Quantization(report.settings["quant"]), options=report.methods)
        rows += _wrapped("chosen", describe_choice(choice))
    if details:
        rows.append(("on", f"{report.gpu} in {report.dtype}; attention: {attention or '-'}"))
        rows += _wrapped("planned", describe(report.plan)) if report.plan is not None else []
        rows.append(("answered in", format_duration(report.estimate_seconds)))
    rows += _data_rows(report.data)
    if gpus or report.cards is None:  # else each of the cards is listed with the time of the run as planned for it
        rows += _run_rows(report.predicted, "" if gpus else f" on {with_article(report.gpu)}")
    rows += _need_rows(report.predicted)
    if not any(gpu.is_host for gpu in gpus):
        rows += _wrapped("smallest", _describe_smallest(report))
    for gpu in gpus:
        rows += _wrapped("note", f"{gpu.name}: {gpu.note}") if gpu.note else []
    return rows


def _wrapped(name: str, value: str, name_width: int = len("answered in")) -> list[Row]:
    """Return a row whose value continues in rows without a name."""
    lines = wrap(value, WIDTH - name_width - 4, break_on_hyphens=False, break_long_words=False)
    return [(name if index == 0 else "", line) for index, line in enumerate(lines)]


def figure_lines(report: MemoryReport, gpus: Sequence[Gpu] = ()) -> list[str]:
    """Return the peaks, each with its error band, and the paged and pinned memory; a CPU reserves nothing."""
    own, is_host = report.predicted, any(gpu.is_host for gpu in gpus)
    shown_by = "what the system shows" if is_host else "what nvidia-smi shows"
    figures = (
        ("allocated", own.allocated_bytes, own.allocated_low_bytes, own.allocated_high_bytes, "by tensors"),
        (RESERVED, own.reserved_bytes, own.reserved_low_bytes, own.reserved_high_bytes, "by PyTorch for them"),
        (PROCESS, own.process_bytes, own.process_low_bytes, own.process_high_bytes, shown_by),
    )
    lines = [
        f"  {name:<10} {gib(middle):>11}   {_bare(low):>6} to {_bare(high):<6}   {meaning}"
        for name, middle, low, high, meaning in figures
        if not (is_host and name == RESERVED)
    ]
    if report.paged_bytes:
        lines.append(f"  {'paged':<10} {gib(report.paged_bytes):>11}   optimizer state, which moves to the host")
    if report.pinned_host_bytes:
        lines.append(f"  {'on the host':<10} {gib(report.pinned_host_bytes):>10}   activations in pinned memory")
    return lines


def _bare(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def time_lines(figures: RunFigures) -> list[str]:
    """Return the time of an optimizer step; nothing if it is not known."""
    low, middle, high = figures.step_seconds_low, figures.step_seconds, figures.step_seconds_high
    if low is None or middle is None or high is None:
        return []
    is_host = figures.limited_by == HOST
    rates = described(figures.rates or "", figures.learnt_ratio, figures.learnt_runs)
    basis = "by arithmetic, not measured" if rates == DATA_SHEET else f"by rates {rates}"
    text = (
        f"{'at least' if is_host else 'about'} {significant(middle)} s a step ({significant(low)} to "
        f"{significant(high)}), {figures.tokens_per_second:,.0f} tokens/s, limited by "
        f"{'the ' if is_host else ''}{figures.limited_by} ({basis})"
    )
    return hanging(text, "  ", "  ")


def _data_rows(data: DataSummary | None) -> list[Row]:
    """Return what is fed of the data set that was read; nothing if none was."""
    if data is None:
        return []
    packed = "" if data.num_packed_rows is None else f", packed into {counted(data.num_packed_rows, 'row')}"
    held_out = "" if data.num_eval_rows is None else f"; {counted(data.num_eval_rows, 'row')} held out"
    return _wrapped(
        "data",
        f"{counted(data.num_train_rows, 'row')} of {counted(data.num_train_tokens, 'token')}, the longest of "
        f"{data.longest_row_tokens:,}{packed}{held_out}; {data.padding_share:.1%} padding, "
        f"micro-batches in the run: {data.num_micro_batches:,}",
    )


def _run_rows(figures: RunFigures, where: str) -> list[Row]:
    """Return the time, the cost and the energy of the whole run; nothing if they were not asked for.

    `where` names a GPU that the user did not.
    """
    low, middle, high = figures.run_seconds_low, figures.run_seconds, figures.run_seconds_high
    if low is None or middle is None or high is None:
        return []
    limit = f"{'the ' if figures.run_limited_by == HOST else ''}{figures.run_limited_by}"
    energy = "" if figures.energy_wh is None else f", {figures.energy_wh / 1000:,.2f} kWh at the GPU's rated power"
    costs = _costs(figures)
    cost = f", {' '.join(costs)} at the given price" if costs else ""
    return _wrapped(
        "the run",
        f"{counted(figures.num_steps or 0, 'step')}{where} in {format_duration(middle)} ({format_duration(low)} to "
        f"{format_duration(high)}), limited by {limit}{cost}{energy}",
    )


def _costs(figures: RunFigures | RankedCard) -> list[str]:
    """Return the cost and its band; nothing without a price."""
    if figures.cost is None or figures.cost_low is None or figures.cost_high is None:
        return []
    return [significant(figures.cost), f"({significant(figures.cost_low)} to {significant(figures.cost_high)})"]


def _need_rows(figures: RunFigures) -> list[Row]:
    """Return what the run takes besides the GPU: host memory, disk and download."""
    low, middle, high = figures.host_bytes_low, figures.host_bytes, figures.host_bytes_high
    if low is None or middle is None or high is None or figures.disk_bytes is None:
        return []
    download = f", a download of {gib(figures.download_bytes)}" if figures.download_bytes else ""
    return _wrapped(
        "needs",
        f"{gib(middle)} of host memory ({_bare(low)} to {_bare(high)}), {gib(figures.disk_bytes)} of disk for the run"
        f"{download}",
    )


def host_lines(host: HostMemory) -> list[str]:
    """Return the parts of the host's memory that each process takes."""
    sizes = [(text, getattr(host, name)) for name, text in HOST_PARTS.items()]
    return [f"  {text:<36} {gib(size):>10}" for text, size in sizes if size]


def component_lines(components: Components, *, is_host: bool = False) -> list[str]:
    """Return the components of the memory, as a table with bars; the rounded sizes add up to that of the process.

    `is_host`: on a CPU, all is memory of the host.
    """
    names = NAMES | {"context": "Python and libraries"} if is_host else NAMES
    parts = {name.removesuffix("_bytes"): num_bytes for name, num_bytes in asdict(components).items() if num_bytes}
    total = sum(parts.values())
    shown = hundredths(list(parts.values()))
    most = max(parts.values())
    lines = []
    for (name, num_bytes), cents in zip(parts.items(), shown, strict=True):
        bar = "█" * round(MAX_BARS * num_bytes / most)
        label = names.get(name, name.replace("_", " "))
        lines.append(f"  {label:<22} {cents / 100:>7.2f} GiB  {num_bytes / total:>6.1%}  {bar}".rstrip())
    return [*lines, f"  {PROCESS:<22} {sum(shown) / 100:>7.2f} GiB  100.0%"]


def hundredths(sizes: Sequence[int]) -> list[int]:
    """Return sizes in hundredths of a GiB that add up to the rounded sum, by the largest remainders."""
    exact = [100 * size / GIB for size in sizes]
    floors = [int(value) for value in exact]
    missing = round(sum(exact)) - sum(floors)
    by_remainder = sorted(range(len(exact)), key=lambda index: floors[index] - exact[index])
    return [floor + (index in by_remainder[:missing]) for index, floor in enumerate(floors)]


def phase_lines(phases: Sequence[Phase], ruling: str, reason: str) -> list[str]:
    """Return the peaks of each phase, with the largest one marked, and the reason for it."""
    lines = [f"  {'':<12} {'allocated':>12} {'reserved':>12}"]
    for phase in phases:
        mark = "  <- the peak" if phase.name == ruling else ""
        lines.append(f"  {phase.name:<12} {gib(phase.allocated_bytes):>12} {gib(phase.reserved_bytes):>12}{mark}")
    return lines + hanging(reason, "  ", "  ")


def fit_lines(fits: Sequence[GpuFit], *, is_planned: bool = False) -> list[str]:
    """Return whether the run fits on each GPU, and what is left: one per line, or two if there are many.

    `is_planned`: checkpointing is chosen for each, and named.
    """
    if len(fits) <= MAX_FIT_LINES:
        width = max((len(fit.gpu) for fit in fits), default=0)
        header = f"  {'':<{width}}  {'':<5} {'takes':>8} {'at most':>8} {'usable':>8} {'left':>8}"
        lines = [header, *(_fit_line(fit, width) for fit in fits)]
        chosen = ["checkpointing", *(fit.gradient_checkpointing for fit in fits)]
        return [f"{line}  {name}" for line, name in zip(lines, chosen, strict=True)] if is_planned else lines
    lines = ["  what is left of each; below zero, what is missing"]
    for group, members in groupby(fits, key=lambda fit: fit.group):
        cells = [f"{fit.gpu:<22} {fit.fits:<5} {fit.margin_bytes / GIB:>+7.2f}" for fit in members]
        lines.append(f"  {group}")
        lines += ["    " + "   ".join(cells[index : index + 2]) for index in range(0, len(cells), 2)]
    return lines


def _fit_line(fit: GpuFit, width: int) -> str:
    sizes = f"{_bare(fit.process_bytes):>8} {_bare(fit.process_high_bytes):>8} {_bare(fit.usable_bytes):>8}"
    return f"  {fit.gpu:<{width}}  {fit.fits:<5} {sizes} {fit.margin_bytes / GIB:>+8.2f}"


def _describe_smallest(report: MemoryReport) -> str:
    """Return the smallest class of cards, and the smallest with room to spare."""
    smallest, roomy = report.smallest_class, report.roomy_class
    if smallest is None:
        return "no card of the catalogue is large enough" if report.smallest_gpu is None else f"{report.smallest_gpu}"
    (size_gb,) = [gpu.size_gb for gpu in GPUS if gpu.name == report.smallest_gpu] or [smallest.size_gb]
    # Cards that are sold with as much memory do not all have as much for a program.
    before = f"; of {size_gb} GB, {with_article(str(report.smallest_gpu))}" if size_gb < smallest.size_gb else ""
    ease = f"; with ease: {described_class(roomy)}" if roomy is not None and roomy != smallest else ""
    planned = "; with each layer recomputed" if report.plan is not None else ""
    return f"{described_class(smallest)}{before}{ease}{planned}"


def suggestion_lines(suggestions: Sequence[Suggestion]) -> list[str]:
    """Return each change of flags with its cost, its saving, and the memory after it."""
    lines = []
    for suggestion in suggestions:
        lines.append(f"  {suggestion.flags}")
        saving = f"saves {gib(suggestion.saved_bytes)}, then {gib(suggestion.process_bytes)}: {_verdict(suggestion)}"
        lines += hanging(f"{saving}; {suggestion.effect}" if suggestion.effect else saving, "      ", "      ")
    return lines


def _verdict(suggestion: Suggestion) -> str:
    return {"yes": "fits", "tight": "fits tightly", "no": "still too large"}[suggestion.fits]


def solution_lines(solutions: Sequence[Solution]) -> list[str]:
    """Return the largest values that fit, and what limits them."""
    lines = []
    for solution in solutions:
        if solution.value is None or solution.process_bytes is None:
            lines.append(f"  no --{solution.setting} fits on the {solution.gpu}")
            continue
        limit = f"; limited by {solution.limited_by}" if solution.limited_by else ""
        text = f"--{solution.setting} {solution.value} on the {solution.gpu}: {gib(solution.process_bytes)}{limit}"
        lines += hanging(text, "  ", "      ")
    return lines


def card_lines(cards: Sequence[RankedCard]) -> list[str]:
    """Return a line for each card: what the run costs on it, and how long it takes, each with its band."""
    if not cards:
        return ["  it fits on none of those that were asked about"]
    rows = [["", "cost", "", "time", ""], *map(_card_cells, cards)]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for name, *cells in zip(*columns, strict=True):
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append(f"  {name:<{widths[0]}}  {' '.join(padded)}".rstrip())
    return lines


def _card_cells(card: RankedCard) -> list[str]:
    band = f"({format_duration(card.run_seconds_low)} to {format_duration(card.run_seconds_high)})"
    shared = ", sharded" if card.strategy == Strategy.FSDP else ""
    name = card.gpu if card.num_gpus == 1 else f"{card.num_gpus} {card.gpu}{shared}"
    return [name, *(_costs(card) or ["", ""]), format_duration(card.run_seconds), band]
