"""Draw the figures of docs/explanation, and measure the numbers in its text.

python scripts/make_figures.py          # a test fails when figure or text are stale
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import torch
from bitsandbytes import functional
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qlora_cli.charts.canvas import REPRODUCIBLE_METADATA, drawing_style
from qlora_cli.charts.palette import LIGHT

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "explanation" / "figures"
BLOCK = 64
NUM_WEIGHTS = 1024 * 4096
OFFSET = 0.9677083  # the outermost quantile of NF4
FONT_SIZE = 10


@dataclass(frozen=True)
class DataType:
    """A 4-bit data type with one constant per block."""

    name: str
    levels: torch.Tensor
    error: float
    color: str


def relative_rms(restored: torch.Tensor, weight: torch.Tensor) -> float:
    """Return the root mean square of the error over that of the weight."""
    error = restored.reshape(-1).double() - weight.reshape(-1)
    return float(error.norm() / weight.double().norm())


def normal_weights() -> torch.Tensor:
    """Return 4,194,304 seeded normal numbers, `(1024, 4096)`."""
    return torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))


def by_bitsandbytes(weight: torch.Tensor, kind: str, *, double: bool = False) -> float:
    """Return the relative RMS error of quantizing `weight` to nf4 or fp4 and back."""
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    return relative_rms(functional.dequantize_4bit(packed, state), weight)


def evenly_spaced(weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor, num_levels: int = 16) -> float:
    """Return the same for evenly spaced levels from `low` to `high`, which broadcast against `weight`."""
    steps = num_levels - 1
    return relative_rms(torch.round((weight - low) / (high - low) * steps) / steps * (high - low) + low, weight)


def by_int8(weight: torch.Tensor) -> float:
    """Return the same for LLM.int8(), with one constant per row."""
    codes, tops, _ = functional.int8_vectorwise_quant(weight.half())
    return relative_rms(functional.int8_vectorwise_dequant(codes, tops), weight)


def measure(weight: torch.Tensor) -> dict[str, float]:
    """Return the relative RMS error of each way to store a weight, by its name in the text."""
    blocks = weight.view(-1, BLOCK)
    top = blocks.abs().amax(1, keepdim=True)
    return {
        "NF4": by_bitsandbytes(weight, "nf4"),
        "NF4, double quantization": by_bitsandbytes(weight, "nf4", double=True),
        "16 evenly spaced levels": evenly_spaced(blocks, -top, top),
        "Int4, -7 to 7": evenly_spaced(blocks, -top, top, num_levels=15),
        "FP4": by_bitsandbytes(weight, "fp4"),
        "min-max, a block": evenly_spaced(blocks, blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)),
        "min-max, a row": evenly_spaced(weight, weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)),
        "min-max, a matrix": evenly_spaced(weight, weight.min(), weight.max()),
        "LLM.int8()": by_int8(weight),
    }


def in_percent(error: float) -> str:
    """Return an error in the format of figure and text."""
    return f"{100 * error:.1f} %"


def describe(errors: Mapping[str, float]) -> str:
    """Return the numbers as one line, which is stored in the figure's file."""
    return "relative RMS error: " + "; ".join(f"{name} {in_percent(error)}" for name, error in errors.items())


def draw(errors: Mapping[str, float]) -> Figure:
    """Draw the levels of three data types under the normal density, and their errors next to them."""
    types = [
        DataType("NF4", functional.get_4bit_type("nf4", device="cpu"), errors["NF4"], "#0b7285"),
        DataType("evenly spaced", torch.linspace(-1, 1, 16), errors["16 evenly spaced levels"], "#5f3dc4"),
        DataType("FP4", functional.get_4bit_type("fp4", device="cpu").unique(), errors["FP4"], "#d9480f"),
    ]
    figure = Figure(figsize=(9, 5.4), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplot_mosaic(
        [["density", "note"], ["levels", "errors"]], width_ratios=[3.4, 1], height_ratios=[1.35, 1]
    )
    draw_density(axes["density"], types[0])
    draw_levels(axes["levels"], types)
    draw_errors(axes["errors"], types)
    axes["note"].set_axis_off()
    return figure


def draw_density(axes: Axes, nf4: DataType) -> None:
    """Draw the normal density with a stripe between each two levels."""
    normal = NormalDist(0, 1 / NormalDist().inv_cdf(OFFSET))
    levels = nf4.levels.tolist()
    for index, (left, right) in enumerate(pairwise(levels)):
        xs = torch.linspace(left, right, 60).tolist()
        axes.fill_between(xs, [normal.pdf(x) for x in xs], color=nf4.color, alpha=(0.16, 0.32)[index % 2], linewidth=0)
    xs = torch.linspace(-1.18, 1.18, 400).tolist()
    axes.plot(xs, [normal.pdf(x) for x in xs], color=LIGHT.ink, linewidth=1.4)
    axes.vlines(levels, 0, [normal.pdf(x) for x in levels], color=nf4.color, linewidth=1.1)
    axes.set(xlim=(-1.1, 1.1), ylim=(0, 0.84))
    axes.tick_params(labelbottom=False, bottom=False, left=False, labelleft=False)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.set_title("The 16 levels of NF4 are quantiles of the normal distribution", loc="left", weight="bold")
    share = {"left": (OFFSET - 0.5) / 7, "right": (OFFSET - 0.5) / 8}
    for side, x in (("left", -0.98), ("right", 0.98)):
        text = f"{100 * share[side]:.1f} % of the area\nin each stripe\n{side} of zero"
        axes.text(x, 0.78, text, ha=side, va="top", color=nf4.color, size=9)


def draw_levels(axes: Axes, types: list[DataType]) -> None:
    """Draw a row of levels for each data type."""
    for row, data_type in enumerate(types):
        levels = data_type.levels.tolist()
        axes.hlines(row, -1, 1, color=LIGHT.line, linewidth=1, zorder=1)
        axes.vlines(levels, row - 0.26, row + 0.26, color=data_type.color, linewidth=2, zorder=2)
    axes.set_yticks(range(len(types)), [data_type.name for data_type in types])
    for label, data_type in zip(axes.get_yticklabels(), types, strict=True):
        label.set(color=data_type.color, fontweight="bold")
    axes.text(0, len(types) - 0.64, "-0.005, 0, 0.005", ha="center", va="top", color=types[-1].color, size=8)
    axes.set(xlim=(-1.1, 1.1), ylim=(len(types) - 0.4, -0.5), xlabel="weight / largest magnitude of its block")
    axes.tick_params(left=False)
    axes.spines[["top", "left", "right"]].set_visible(False)


def draw_errors(axes: Axes, types: list[DataType]) -> None:
    """Draw a bar for the error of each data type."""
    axes.barh(range(len(types)), [data_type.error for data_type in types], 0.52, color=[each.color for each in types])
    for row, data_type in enumerate(types):
        axes.text(data_type.error + 0.004, row, in_percent(data_type.error), va="center", color=data_type.color)
    axes.set(xlim=(0, 0.18), ylim=(len(types) - 0.4, -0.5))
    axes.set_title("Relative RMS error", loc="left", size=10, weight="bold")
    axes.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
    axes.set_xlabel(
        f"{NUM_WEIGHTS / 1e6:.1f}M normal weights,\nblocks of {BLOCK}", color=LIGHT.muted, size=9, loc="left"
    )
    axes.spines[:].set_visible(False)


def save(errors: Mapping[str, float], path: Path) -> None:
    """Draw the figure into `path`: the same bytes for the same errors and version of matplotlib."""
    with drawing_style(FONT_SIZE):
        draw(errors).savefig(path, metadata={**REPRODUCIBLE_METADATA["png"], "Description": describe(errors)})


def write(directory: Path = FIGURES) -> dict[str, float]:
    """Write nf4.png into `directory` and return the errors it shows."""
    errors = measure(normal_weights())
    directory.mkdir(parents=True, exist_ok=True)
    save(errors, directory / "nf4.png")
    return errors


if __name__ == "__main__":
    for name, error in write().items():
        print(f"{name:26} {in_percent(error)}")
