"""A plot of a sweep: process memory over the length of rows, with the GPUs as horizontal lines; and the speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from qlora_cli.charts.canvas import drawing_style, picture_of
from qlora_cli.charts.palette import LIGHT
from qlora_cli.memory.bands import process_band
from qlora_cli.memory.gpus import GPUS, SAME_MEMORY, Gpu
from qlora_cli.memory.prediction import MemoryReport, SweepPoint
from qlora_cli.units import GIB
from qlora_cli.visible import visible
from qlora_cli.writing import write_file

LENGTH = "max-length"
# A card of each common size, shown where no GPU was named.
TYPICAL = ("RTX 3070", "RTX 3060 12GB", "RTX 4060 Ti 16GB", "RTX 4090", "RTX 5090", "RTX A6000", "A100 80GB", "H200")
FONT_POINTS = 10
COLORS = ("#0b7285", "#d9480f", "#5f3dc4", "#2b8a3e", "#c2255c", "#846358", "#1864ab", "#5c940d")
WIDE_RANGE = 8  # ratio of the most to the least memory above which the axis is logarithmic
MOST_ABOVE = 3  # times the most memory: a larger GPU would squeeze the curves to the bottom
MOST_INSIDE = 5  # lines with the legend inside the axes; with more, it is below them
MOST_NAMES = 2  # of cards on one line
LINE_LENGTH = 95  # characters of the subtitle
LABEL_GAP = 0.05  # of the height, between two labels
TICK_GAP = 0.6  # doublings, between two lengths with a label
TICKS_GIB = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class MemoryLine:
    """One combination of everything but the length: `lengths` in tokens, process memory in GiB.

    `speeds` are tokens/s, each with the ends of its band; empty if they are not known.
    """

    label: str
    lengths: tuple[int, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    speeds: tuple[tuple[float, float, float], ...]


def plot_sweep(report: MemoryReport, gpus: Sequence[Gpu], path: Path) -> None:
    """Draw a sweep over the length into `path`, complete or not at all; its suffix is the format.

    `gpus` are shown as lines; if it is empty, one GPU of each common size is.
    """
    with drawing_style(FONT_POINTS):
        picture = picture_of(draw(report, gpus), path.suffix.removeprefix(".").lower())
    write_file(path, picture)


def draw(report: MemoryReport, gpus: Sequence[Gpu]) -> Figure:
    """Return the figure. Call it within `drawing_style`."""
    lines = memory_lines(report)
    most, least = max(max(line.high) for line in lines), min(min(line.low) for line in lines)
    shown, beyond = select_gpus(gpus, most)
    is_timed = all(line.speeds for line in lines)
    figure = Figure(figsize=(9, 7.6 if is_timed else 5.4), dpi=160, layout="constrained", facecolor="white")
    axes, *below = figure.subplots(1 + is_timed, height_ratios=(3, 2)[: 1 + is_timed], squeeze=False)[:, 0]
    tops = [most, *(gpu.usable_bytes / GIB for gpu in shown)]
    _set_scales(axes, lines, max(tops), least)
    for color, line in zip(_colors(len(lines)), lines, strict=True):
        axes.fill_between(line.lengths, line.low, line.high, color=color, alpha=0.15, linewidth=0)
        axes.plot(line.lengths, line.middle, color=color, label=line.label, marker="o", markersize=4, linewidth=1.8)
    _draw_gpu_lines(axes, shown)
    axes.set_ylabel("process memory, GiB")
    [axes, *below][-1].set_xlabel(_x_label(beyond))
    if is_timed:
        _draw_speed(below[0], lines, report.gpu)
    _draw_title(axes, report)
    if len(lines) > MOST_INSIDE:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    elif len(lines) > 1:
        axes.legend(loc="best", framealpha=0.9, edgecolor=LIGHT.line, fontsize=9, reverse=True)
    return figure


def _draw_speed(axes: Axes, lines: Sequence[MemoryLine], gpu: str) -> None:
    for color, line in zip(_colors(len(lines)), lines, strict=True):
        low, middle, high = zip(*line.speeds, strict=True)
        axes.fill_between(line.lengths, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(line.lengths, middle, color=color, marker="o", markersize=4, linewidth=1.8)
    _set_length_scale(axes, lines)
    axes.set_ylim(0, 1.06 * max(high for line in lines for _, _, high in line.speeds))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel(f"tokens/s, {gpu}")
    axes.grid()


def memory_lines(report: MemoryReport) -> list[MemoryLine]:
    """Return a line for each combination of the swept settings other than the length, least memory first."""
    groups: dict[str, list[SweepPoint]] = {}
    varied = varied_settings(report.sweep) - {LENGTH}
    for point in report.sweep:
        assert LENGTH in point.values, "a picture needs a sweep over the length"
        label = ", ".join(f"{name} {value:,}" for name, value in point.values.items() if name in varied)
        groups.setdefault(label, []).append(point)
    assert groups, "a picture needs a sweep"
    lines = []
    for label, points in groups.items():
        points = sorted(points, key=lambda point: point.values[LENGTH])
        bands = [process_band(report, point) for point in points]
        lines.append(
            MemoryLine(
                label=label,
                lengths=tuple(point.values[LENGTH] for point in points),
                middle=tuple(point.process_bytes / GIB for point in points),
                low=tuple(low / GIB for low, _ in bands),
                high=tuple(high / GIB for _, high in bands),
                speeds=tuple(_speed(point) for point in points if point.tokens_per_second is not None),
            )
        )
    return sorted(lines, key=lambda line: line.middle[-1])


def _speed(point: SweepPoint) -> tuple[float, float, float]:
    return point.tokens_per_second_low or 0.0, point.tokens_per_second or 0.0, point.tokens_per_second_high or 0.0


def varied_settings(sweep: Sequence[SweepPoint]) -> set[str]:
    """Return the settings that have more than one value in `sweep`."""
    return {name for point in sweep for name, value in point.values.items() if value != sweep[0].values[name]}


def select_gpus(gpus: Sequence[Gpu], most: float) -> tuple[list[Gpu], list[Gpu]]:
    """Return the GPUs to show, smallest first, and the requested ones that are too far above `most` GiB."""
    if gpus:
        ordered = sorted(gpus, key=lambda gpu: gpu.usable_bytes)
        shown = [gpu for gpu in ordered if gpu.usable_bytes <= MOST_ABOVE * most * GIB]
        return shown, [gpu for gpu in ordered if gpu not in shown]
    typical = sorted((gpu for gpu in GPUS if gpu.name in TYPICAL), key=lambda gpu: gpu.usable_bytes)
    num_within = sum(gpu.usable_bytes <= most * GIB for gpu in typical)
    return typical[: num_within + 1], []  # the next larger one shows where every run fits


def sizes_with_labels(shown: Sequence[Gpu]) -> list[tuple[float, str]]:
    """Return the usable GiB of each size with the names of its cards; those that hardly differ share a line."""
    groups: list[list[Gpu]] = []
    for gpu in shown:
        if groups and gpu.usable_bytes <= groups[-1][0].usable_bytes * (1 + SAME_MEMORY):
            groups[-1].append(gpu)
        else:
            groups.append([gpu])
    labelled = []
    for group in groups:
        names = ", ".join(gpu.name for gpu in group[:MOST_NAMES])
        further = f" + {len(group) - MOST_NAMES}" if len(group) > MOST_NAMES else ""
        size = group[0].usable_bytes / GIB
        labelled.append((size, f"{names}{further}: {size:.1f}"))
    return labelled


def spread_labels(heights: Sequence[float], gap: float = LABEL_GAP) -> list[float]:
    """Return rising heights within 0 and 1 with `gap` between each two, moved as little as possible.

    Least squares by the pool-adjacent-violators algorithm: minus `index * gap`, the heights must not fall.
    """
    gap = min(gap, 1 / max(len(heights) - 1, 1))
    pools: list[tuple[float, int]] = []  # mean and count
    for index, height in enumerate(heights):
        mean, count = height - index * gap, 1
        while pools and pools[-1][0] > mean:
            before, num_before = pools.pop()
            mean = (before * num_before + mean * count) / (num_before + count)
            count += num_before
        pools.append((mean, count))
    top = 1 - (len(heights) - 1) * gap
    means = [min(max(mean, 0.0), top) for mean, count in pools for _ in range(count)]
    return [mean + index * gap for index, mean in enumerate(means)]


def _set_length_scale(axes: Axes, lines: Sequence[MemoryLine]) -> None:
    lengths = sorted({length for line in lines for length in line.lengths})
    axes.set_xscale("log", base=2)
    ticks = lengths[:1]
    for length in lengths[1:]:
        if length >= ticks[-1] * 2**TICK_GAP:
            ticks.append(length)
    axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
    axes.minorticks_off()
    axes.set_xlim(lengths[0] / 2**0.25, lengths[-1] * 2**0.25)


def _set_scales(axes: Axes, lines: Sequence[MemoryLine], most: float, least: float) -> None:
    _set_length_scale(axes, lines)
    if most > WIDE_RANGE * least:
        bottom, top = least / 1.3, most * 1.2
        axes.set_yscale("log", base=2)
        axes.set_ylim(bottom, top)
        ticks_gib = [tick for tick in TICKS_GIB if bottom <= tick <= top]
        axes.set_yticks(ticks_gib, [f"{tick:,}" for tick in ticks_gib])
        axes.minorticks_off()
    else:
        axes.set_ylim(0, 1.06 * most)
    axes.grid()


def _draw_gpu_lines(axes: Axes, shown: Sequence[Gpu]) -> None:
    """Draw each size as a dashed line, with its cards' names on the right, connected to it if they had to be moved."""
    to_axes = axes.transData + axes.transAxes.inverted()
    labelled = sizes_with_labels(shown)
    heights = [float(to_axes.transform((axes.get_xlim()[0], size))[1]) for size, _ in labelled]
    for (size, label), height, at in zip(labelled, heights, spread_labels(heights), strict=True):
        axes.axhline(size, color=LIGHT.host, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        axes.annotate(
            label,
            xy=(1.0, height),
            xytext=(1.03, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            size=9,
            arrowprops={
                "arrowstyle": "-",
                "color": LIGHT.host,
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def _draw_title(axes: Axes, report: MemoryReport) -> None:
    subtitle = _subtitle(report)
    num_lines = subtitle.count("\n") + 1
    axes.set_title(
        f"What training {visible(report.model, is_end=False)} takes",
        loc="left",
        weight="bold",
        pad=12 + 12 * num_lines,
    )
    axes.annotate(
        subtitle,
        xy=(0, 1),
        xytext=(0, 8),
        xycoords="axes fraction",
        textcoords="offset points",
        va="bottom",
        size=9,
        color=LIGHT.muted,
        linespacing=1.3,
    )


def _colors(num_lines: int) -> list[str]:
    """Return a colour for each line: distinct hues or, for too many lines, a ramp from dark to light."""
    if num_lines <= len(COLORS):
        return list(COLORS[:num_lines])
    ramp = mpl.colormaps["viridis"]
    return [to_hex(ramp(index / num_lines)) for index in range(num_lines)]  # without the yellow end


def _x_label(beyond: Sequence[Gpu]) -> str:
    label = "max-length, tokens"
    names = ", ".join(f"{gpu.name} ({gpu.usable_bytes / GIB:.1f} GiB)" for gpu in beyond)
    return f"{label}\nabove the picture: {names}" if beyond else label


def _subtitle(report: MemoryReport) -> str:
    """Return the settings that were not swept, in lines that fit the picture."""
    varied = varied_settings(report.sweep)
    first = report.sweep[0]
    settings = {**report.settings, **first.values, "gradient-checkpointing": first.gradient_checkpointing}
    if report.plan is not None and report.plan.chosen.micro_batch_tokens is not None:  # planned for the run alone
        settings.pop("micro-batch-tokens", None)
    fixed = [f"{name} {value}" for name, value in settings.items() if name not in varied | {LENGTH}]
    lines = [""]
    for part in [*fixed, f"on {report.gpu} in {report.dtype}"]:
        if len(lines[-1]) + len(part) > LINE_LENGTH:
            lines.append("")
        lines[-1] += f", {part}" if lines[-1] else part
    return ",\n".join(lines) + "; shaded: error band"
