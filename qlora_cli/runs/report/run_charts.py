"""The charts of a run."""

from collections.abc import Sequence

from qlora_cli.charts.axis_range import spanning
from qlora_cli.charts.line_chart import Rule
from qlora_cli.charts.series import Series, is_drawable
from qlora_cli.runs.history import RunHistory
from qlora_cli.runs.record import RunRecord
from qlora_cli.runs.report.adapter_chart import adapter_charts
from qlora_cli.runs.report.loss_chart import loss_chart
from qlora_cli.runs.report.step_chart import Labels, LegendEntry, Line, RunChart, chart_of
from qlora_cli.runs.summary import RunSummary
from qlora_cli.units import GIB, MIB, format_bytes

WIDE = 20  # times the median: larger gradient norms make the axis logarithmic


def charts_of(history: RunHistory, summary: RunSummary, record: RunRecord) -> list[RunChart]:
    """Return the charts with data, that of the loss first."""
    builders = (
        loss_chart(history),
        learning_rate_chart(history),
        grad_norm_chart(history, record),
        speed_chart(history, summary),
        memory_chart(history, summary),
    )
    health = record.result.adapter_health if record.result else None
    return [*(chart for chart in builders if chart is not None), *(adapter_charts(health) if health else ())]


def learning_rate_chart(history: RunHistory) -> RunChart | None:
    """Return the chart of the learning rate."""
    rates = Series(history.steps.step, history.steps.learning_rate)
    if not rates.drawable:
        return None
    labels = Labels(name="learning_rate", title="Learning rate", description=_describe("Learning rate", rates))
    line = Line(color="first", name="learning rate", series=rates, spec=".3g")
    return chart_of(history, labels, [line], spanning(rates.drawable, from_zero=True))


def grad_norm_chart(history: RunHistory, record: RunRecord) -> RunChart | None:
    """Return the chart of the gradient norm before clipping, with the clipping threshold."""
    norms = Series(history.steps.step, history.steps.grad_norm)
    ordered = sorted(norms.drawable)
    if not ordered:
        return None
    is_log = ordered[0] > 0 and ordered[-1] > WIDE * ordered[len(ordered) // 2]
    limit = record.setting("training.max_grad_norm")
    limits = [float(limit)] if isinstance(limit, int | float) and limit > 0 and is_drawable(limit) else []
    y = spanning([*ordered, *limits], from_zero=True, is_log=is_log)
    labels = Labels(
        name="grad_norm",
        title="Gradient norm",
        unit="logarithmic" if is_log else "",
        description=_describe("Gradient norm", norms),
        legend=tuple(LegendEntry("limit", f"clipped above {limit:g}") for limit in limits),
    )
    line = Line(color="first", name="gradient norm", series=norms, spec=".4g", has_mean=True)
    rules = [Rule("muted", limit, f"clipped above {limit:g}", is_level=True) for limit in limits]
    return chart_of(history, labels, [line], y, rules=rules)


def speed_chart(history: RunHistory, summary: RunSummary) -> RunChart | None:
    """Return the chart of the tokens per second."""
    speeds = Series(history.steps.step, history.steps.tokens_per_second)
    if not speeds.drawable:
        return None
    speed = summary.tokens_per_second
    labels = Labels(
        name="tokens_per_second",
        title="Speed",
        unit="tokens a second",
        remark="" if speed is None else f"over all steps: {speed:,.0f}",
        description=_describe("Tokens a second", speeds),
    )
    line = Line(color="first", name="tokens a second", series=speeds, spec=",.0f", has_mean=True)
    return chart_of(history, labels, [line], spanning(speeds.drawable, from_zero=True))


def _describe(what: str, series: Series) -> str:
    return f"{what} by step, from {min(series.drawable):.4g} to {max(series.drawable):.4g}."


def memory_chart(history: RunHistory, summary: RunSummary) -> RunChart | None:
    """Return the chart of the memory in use after each step, with the predicted peaks."""
    columns = history.steps
    kinds = (
        ("first", "allocated", columns.device_allocated_bytes, summary.predicted_allocated_bytes),
        ("third", "reserved", columns.device_reserved_bytes, summary.predicted_reserved_bytes),
        ("host", "host", columns.host_bytes, None),
    )
    seen = [kind for kind in kinds if any(map(is_drawable, kind[2]))]
    if not seen:
        return None
    most = max(*(max(filter(is_drawable, values)) for _, _, values, _ in seen), *(kind[3] or 0 for kind in seen), 1)
    size, unit = (GIB, "GiB") if most >= GIB else (MIB, "MiB")
    y = spanning([most / size], from_zero=True)
    labels = Labels(
        name="memory",
        title="Memory",
        unit=unit,
        remark="in use after each step; peaks within a step are higher",
        description=f"Memory in use by step, up to {format_bytes(int(most))}.",
        legend=(
            *(LegendEntry(color, name) for color, name, _, _ in seen),
            *([LegendEntry("predicted", "predicted peak")] if any(predicted for _, _, _, predicted in seen) else []),
        ),
    )
    lines = [
        Line(color=color, name=f"{name}, {unit}", series=_scaled(columns.step, values, size), spec=".2f")
        for color, name, values, _ in seen
    ]
    rules = [
        Rule(color, predicted / size, f"{name}, predicted: {format_bytes(predicted)}", is_level=True)
        for color, name, _, predicted in seen
        if predicted
    ]
    return chart_of(history, labels, lines, y, rules=rules)


def _scaled(steps: Sequence[int], values: Sequence[float], size: int) -> Series:
    return Series(steps, [value / size for value in values])
