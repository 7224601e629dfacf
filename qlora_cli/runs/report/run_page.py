"""The report page of a run: one self-contained file, for phones, for paper, and for the next ten years.

What stands in it is untrusted: jinja escapes it, what can't be seen is made visible, and no script can run.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from qlora_cli import __version__
from qlora_cli.charts.canvas import ChartSize, drawing_style
from qlora_cli.charts.line_chart import embedded_line_chart
from qlora_cli.charts.page_svg import PAGE_CSS
from qlora_cli.runs.adapter_health import AdapterHealth
from qlora_cli.runs.directory import REPORT_FILE
from qlora_cli.runs.find_runs import Run, read_run
from qlora_cli.runs.history import RunHistory, parse_time
from qlora_cli.runs.record import RecordedResult, RecordedRows, RunRecord, as_name, as_text
from qlora_cli.runs.report.run_charts import charts_of
from qlora_cli.runs.report.step_chart import Labels, RunChart
from qlora_cli.runs.samples import answers_by_prompt
from qlora_cli.runs.summary import RunSummary
from qlora_cli.units import counted, format_bytes, format_count, format_duration
from qlora_cli.visible import visible
from qlora_cli.writing import PRIVATE_FILE, write_file

TEMPLATE = f"{REPORT_FILE}.jinja"
MAX_SKIPPED = 20  # steps that are listed
BYTES, SECONDS = "_bytes", "_seconds"
ABBREVIATIONS = {"cpus": "CPUs", "gpu": "GPU", "cuda": "CUDA", "dtype": "data type"}
NOT_KNOWN = "\N{EN DASH}"
DATA_ROWS = (
    ("rows", "Rows read"),
    ("rows_trained", "Rows fed"),
    ("packed_rows", "Rows after packing"),
    ("tokens", "Tokens fed"),
    ("supervised_tokens", "Trained tokens"),
    ("longest_row_tokens", "Longest row, in tokens"),
    ("truncated_rows", "Rows truncated"),
    ("dropped_rows", "Rows dropped as too long"),
    ("tokens_lost", "Tokens lost"),
    ("supervised_tokens_lost", "Trained tokens lost"),
    ("rows_without_supervision", "Rows without trained tokens"),
    ("duplicate_rows", "Duplicate rows"),
    ("held_out_rows", "Rows held out"),
    ("near_duplicate_rows", "Near-duplicates of trained rows"),
    ("desirable_rows", "Rows with a wanted answer"),
    ("groups", "Groups"),
    ("bad_rows", "Bad rows"),
)
WITHOUT_PLAN = ("output", "predicted_memory", "predicted_time", "model")  # shown elsewhere on the page
# The first chart has the full width of the page, the others half of it; `PAGE_CSS` selects the size.
NARROW = ChartSize(name="narrow", width=340, height=240, num_ticks=4)
SIZES = (ChartSize(name="medium", width=500, height=242, num_ticks=5), NARROW)
FIRST_SIZES = (
    ChartSize(name="wide", width=1000, height=362, num_ticks=8),
    ChartSize(name="medium", width=560, height=310, num_ticks=6),
    ChartSize(name="narrow", width=340, height=290, num_ticks=4),
)

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Tile:
    """A figure at the head of the page."""

    name: str
    figure: str
    remark: str = ""


@dataclass(frozen=True)
class MemoryRow:
    """A kind of memory, predicted and measured, as text."""

    name: str
    predicted: str
    measured: str
    difference: str


def write_report(directory: Path) -> Path:
    """Write `report.html` into the run directory, complete or not at all, and return its path.

    Raises:
        OSError: it can't be written, such as on a full disk.
    """
    path = directory / REPORT_FILE
    write_page(path, read_run(directory))
    return path


def write_page(path: Path, run: Run) -> None:
    """Write the page of a run to `path`, complete or not at all.

    Raises:
        OSError: it can't be written.
    """
    write_file(path, report_page(run.summary, run.history, run.record), mode=PRIVATE_FILE)


def report_page(summary: RunSummary, history: RunHistory, record: RunRecord) -> str:
    """Return the page."""
    return _template().render(
        summary=summary,
        history=history,
        state=summary.sentence,
        about=about(summary, record),
        tiles=list(tiles_of(summary, history, record.result)),
        charts=drawn_charts(charts_of(history, summary, record)),
        chart_css=Markup(PAGE_CSS),  # noqa: S704 - ours
        memory=list(memory_rows(summary)),
        samples=answers_by_prompt(history),
        skipped=history.skipped[:MAX_SKIPPED],
        data=list(data_rows(record)),
        has_evaluation=record.data.eval is not None,
        facts=[(title, pairs) for title, pairs in facts_of(record).items() if pairs],
        settings=record.settings_used,
        fingerprint=record.data.train.fingerprint if record.data.train else None,
        version=__version__,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"visible": _visible, "lines": _visible_lines, "count": "{:,}".format}
    return environment.from_string(resources.files("qlora_cli.runs.report").joinpath(TEMPLATE).read_text("utf-8"))


def drawn_charts(charts: Sequence[RunChart]) -> list[tuple[Labels, Markup]]:
    """Return the charts as SVG, each with its labels."""
    if not charts:
        return []
    drawn = []
    with drawing_style():
        for index, chart in enumerate(charts):
            labels, sizes = chart.labels, SIZES if index else FIRST_SIZES
            svg = embedded_line_chart(chart.chart, labels.name, sizes, description=labels.description)
            drawn.append((labels, Markup(svg)))  # noqa: S704 - its text is escaped
    return drawn


def about(summary: RunSummary, record: RunRecord) -> Pairs:
    """Return the facts at the head of the page: model, data, device, times and directory."""
    started = parse_time(summary.started)
    device = as_name(record.hardware.get("gpu")) or record.plan.device
    pairs = [
        ("Model", summary.model),
        ("Data", ", ".join(summary.dataset) or None),
        ("Device", device),
        ("Started", f"{started:%Y-%m-%d %H:%M} UTC" if started else None),
        ("Trained for", format_duration(summary.duration_seconds) if summary.duration_seconds else None),
        ("Directory", str(summary.path)),
    ]
    return [(name, value) for name, value in pairs if value]


def tiles_of(summary: RunSummary, history: RunHistory, result: RecordedResult | None = None) -> Iterator[Tile]:
    """Yield the main figures."""
    result = result or RecordedResult()
    if summary.loss is not None:
        yield Tile("Loss", f"{summary.loss:.4f}", "at the last step")
    if summary.best_loss is not None:
        last = history.evaluations[-1]
        is_last = last.step == summary.best_step
        remark = "at the last evaluation" if is_last else f"at step {summary.best_step:,}, {last.loss:.4f} at the end"
        yield Tile("Best held-out loss", f"{summary.best_loss:.4f}", remark)
    if (rewards := summary.rewards) is not None:
        of_which = (
            f"held-out {rewards.rows} at the last evaluation"
            if history.evaluations
            else f"{rewards.rows} of the last step"
        )
        yield Tile("Reward accuracy", f"{rewards.accuracy:.0%}", f"of the {of_which}{rewards.margin_text('; ')}")
    if summary.tokens_per_second is not None:
        yield Tile("Speed", f"{summary.tokens_per_second:,.0f}", f"tokens a second over all steps{_of_step(summary)}")
    if summary.peak_reserved_bytes is not None:
        predicted = summary.predicted_reserved_bytes
        remark = f"reserved, {format_bytes(predicted)} predicted" if predicted else "reserved on the GPU"
        yield Tile("Peak memory", format_bytes(summary.peak_reserved_bytes), remark)
    elif summary.peak_host_bytes is not None:
        yield Tile("Peak memory", format_bytes(summary.peak_host_bytes), "of the process on the host")
    if (health := result.adapter_health) is not None:
        yield Tile("Effective rank", f"{health.effective_rank:.1f}", _of_adapter(health))
    if (forgetting := result.forgetting) is not None:
        remark = f"{forgetting.base_loss:.4f} before, on {counted(forgetting.num_tokens, 'token')}"
        yield Tile("Loss on general text", f"{forgetting.loss:.4f}", remark)


def _of_adapter(health: AdapterHealth) -> str:
    """Return the remark on the effective rank: the rank, and the size of the update where it is known."""
    size = "" if health.relative_norm is None else f"; the update is {health.relative_norm:.2%} of the weights"
    lost = "" if health.lost_share is None else f", {health.lost_share:.1%} of it lost in {health.merge_dtype}"
    return f"of {health.rank:,}{size}{lost}"


def _of_step(summary: RunSummary) -> str:
    """Return the time of a step next to its prediction; empty without one of them."""
    measured, predicted = summary.step_seconds, summary.predicted_step_seconds
    if not measured or not predicted:
        return ""
    return f"; a step {format_duration(measured)}, {format_duration(predicted)} predicted"


def memory_rows(summary: RunSummary) -> Iterator[MemoryRow]:
    """Yield predicted and measured memory."""
    for name, predicted, measured in (
        ("Allocated by tensors", summary.predicted_allocated_bytes, summary.peak_allocated_bytes),
        ("Reserved by PyTorch", summary.predicted_reserved_bytes, summary.peak_reserved_bytes),
        ("Process on the GPU", summary.predicted_process_bytes, None),
        ("Process on the host", None, summary.peak_host_bytes),
    ):
        if predicted is not None or measured is not None:
            yield MemoryRow(name, _bytes(predicted), _bytes(measured), _difference(predicted, measured))


def _bytes(num_bytes: int | None) -> str:
    return NOT_KNOWN if num_bytes is None else format_bytes(num_bytes)


def _difference(predicted: int | None, measured: int | None) -> str:
    return f"{100 * (predicted / measured - 1):+.1f} %" if predicted and measured else ""


def data_rows(record: RunRecord) -> Iterator[tuple[str, str, str]]:
    """Yield figures of the data: a name, and the figures of the training and of the held-out rows."""
    trained, evaluated = record.data.train or RecordedRows(), record.data.eval or RecordedRows()
    for key, name in DATA_ROWS:
        train, held_out = trained.integer(key), evaluated.integer(key)
        if train is not None or held_out is not None:
            yield name, _count(train), _count(held_out)


def _count(value: int | None) -> str:
    return NOT_KNOWN if value is None else f"{value:,}"


def facts_of(record: RunRecord) -> dict[str, Pairs]:
    """Return plan, machine and versions as names and values."""
    plan = {key: value for key, value in record.plan.content.items() if key not in WITHOUT_PLAN}
    return {
        "Plan": _pairs(plan),
        "Machine": _pairs(record.hardware),
        "Versions": [(key, as_text(value)) for key, value in record.versions.items()],
    }


def _pairs(section: Mapping[str, object]) -> Pairs:
    return [(_name_of(key), _value_of(key, value)) for key, value in section.items() if value is not None]


def _name_of(key: str) -> str:
    words = key.removeprefix("num_").removesuffix(BYTES).removesuffix(SECONDS).split("_")
    name = " ".join(ABBREVIATIONS.get(word, word) for word in words)
    return name[:1].upper() + name[1:]


def _value_of(key: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return as_text(value)
    formats: dict[str, Callable[[float], str]] = {
        BYTES: lambda number: format_bytes(int(number)),
        SECONDS: format_duration,
        "_share": lambda number: f"{100 * number:.1f} %",
        "_parameters": lambda number: format_count(int(number)),
    }
    for ending, formatted in formats.items():
        if key.endswith(ending):
            return formatted(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _visible(text: object) -> str:
    return visible(str(text), is_end=False)


def _visible_lines(text: object) -> str:
    """Return text with its line breaks, and with other invisible characters made visible."""
    return "\n".join(_visible(line) for line in str(text).replace("\r\n", "\n").split("\n"))
