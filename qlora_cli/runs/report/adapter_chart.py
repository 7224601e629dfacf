"""The charts of an adapter by layer: how much of its rank the updates use, and how large they are."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from statistics import fmean

from qlora_cli.charts.axis_range import AxisRange, spanning
from qlora_cli.charts.line_chart import Curve, LineChart, Rule
from qlora_cli.charts.page_svg import Note
from qlora_cli.charts.series import is_drawable
from qlora_cli.runs.adapter_health import AdapterHealth, ModuleHealth
from qlora_cli.runs.report.step_chart import NUM_LEVELS, Labels, LegendEntry, RunChart

MAX_NOTED = 16  # modules of a layer in its tooltip
ByLayer = Sequence[tuple[int, Sequence[tuple[str, float]]]]


def adapter_charts(health: AdapterHealth) -> Iterator[RunChart]:
    """Yield the charts that have data."""
    ranks = _by_layer(health, lambda module: module.effective_rank)
    if ranks:
        rule = Rule("muted", health.rank, f"rank {health.rank}", is_level=True)
        title, remark = "Effective rank", f"on average {health.effective_rank:.1f} of {health.rank}"
        yield _chart(ranks, "effective_rank", title, remark=remark, spec=".1f", rules=(rule,))
    norms = _by_layer(health, lambda module: 100 * module.relative_norm if module.relative_norm is not None else None)
    if norms:
        yield _chart(norms, "update_norm", "Size of the update", unit="% of the weight's norm", spec=".3g")


def _by_layer(health: AdapterHealth, figure: Callable[[ModuleHealth], float | None]) -> ByLayer:
    """Return for each layer, in order, its modules' names and figures; those that can't be drawn are left out."""
    found = [
        (module.layer, (module.name.rpartition(".")[2], value))
        for module in health.modules
        if module.layer is not None and (value := figure(module)) is not None and is_drawable(value)
    ]
    ordered = sorted(found, key=lambda entry: entry[0])
    return [(layer, [named for _, named in group]) for layer, group in groupby(ordered, key=lambda entry: entry[0])]


def _chart(
    layers: ByLayer, name: str, title: str, *, unit: str = "", remark: str = "", spec: str, rules: Sequence[Rule] = ()
) -> RunChart:
    values = [[value for _, value in named] for _, named in layers]
    numbers = [layer for layer, _ in layers]
    lines = (("second", "highest", max), ("third", "lowest", min), ("first", "mean of its modules", fmean))
    everything = [value for of_layer in values for value in of_layer]
    chart = LineChart(
        x=AxisRange(low=numbers[0] - 0.5, high=numbers[-1] + 0.5),
        y=spanning([*everything, *(rule.at for rule in rules)], from_zero=True),
        x_name="layer",
        num_levels=NUM_LEVELS,
        curves=tuple(
            Curve(color, [(layer, combine(of)) for layer, of in zip(numbers, values, strict=True)])
            for color, _, combine in lines
        ),
        rules=tuple(rules),
        notes=tuple(_note(layer, named, spec) for layer, named in layers),
    )
    labels = Labels(
        name=name,
        title=title,
        unit=unit,
        remark=remark,
        description=f"{title} by layer, from {min(everything):.4g} to {max(everything):.4g}.",
        legend=(
            *(LegendEntry(color, label) for color, label, _ in lines),
            *(LegendEntry("limit", rule.text) for rule in rules),
        ),
    )
    return RunChart(labels=labels, chart=chart)


def _note(layer: int, named: Sequence[tuple[str, float]], spec: str) -> Note:
    lines = [f"{name} {value:{spec}}" for name, value in named[:MAX_NOTED]]
    return Note("\n".join([f"layer {layer}", *lines]), x=(layer - 0.5, layer + 0.5))
