"""The text of `qlora inspect-data`: the numbers of rows, their lengths, and some of them token by token."""

from collections.abc import Sequence

from rich.text import Text

from qlora_cli.cli.console import Row, console, print_rows, title
from qlora_cli.data.feeding.data_report import NEARLY_EQUAL, DataReport, describe_mixture
from qlora_cli.data.showing.inspection import Bar, BatchSummary, DataInspection, Trouble
from qlora_cli.data.showing.preview import TRAINED_BEGIN, TRAINED_END, RowPreview
from qlora_cli.units import counted
from qlora_cli.visible import line_ends, visible

BAR_CELLS = 40
EIGHTHS = " ▏▎▍▌▋▊▉"
TRAINED, SPECIAL, DIM = "bold green", "magenta", "dim"


def render_data(inspection: DataInspection) -> None:
    """Print an inspection."""
    title(f"{inspection.data.name}, read as {inspection.data.recognised}")
    print_rows([*_data_rows(inspection.data, inspection.max_length), *_batch_rows(inspection)])
    if inspection.evaluation is not None:
        title("Held out")
        print_rows(_data_rows(inspection.evaluation, inspection.max_length))
    title(f"Length of rows in tokens (half of them up to {inspection.median_uncut_tokens:,})")
    for bar in length_lines(inspection.lengths, inspection.max_length):
        console().print(bar, soft_wrap=True)
    if inspection.troubles or inspection.notes:
        title("Worth a look")
        for line in trouble_lines(inspection.troubles, inspection.notes):
            console().print(Text(line), soft_wrap=True)
    for row in inspection.previews:
        title(f"{row.where}: {counted(row.num_tokens, 'token')}, {row.num_supervised:,} of them trained")
        console().print(preview_text(row, is_coloured=console().color_system is not None), soft_wrap=True)


def _data_rows(report: DataReport, max_length: int) -> list[Row]:
    all_trained = report.supervised_tokens + report.supervised_tokens_lost
    rows = [
        ("rows", _count_rows(report)),
        (
            "tokens",
            f"{report.tokens:,} fed, {report.supervised_tokens:,} of them trained "
            f"({_share(report.supervised_tokens, report.tokens)})",
        ),
        ("too long", _describe_long(report, max_length)),
    ]
    if report.supervised_tokens_lost:
        lost = f"{report.supervised_tokens_lost:,} ({_share(report.supervised_tokens_lost, all_trained)})"
        rows.append(("lost to train", f"{lost} of {all_trained:,} tokens"))
    if len(report.mixture) > 1:
        rows.append(("mixed of", describe_mixture(report)))
    if report.desirable_rows is not None:
        rows.append(("labels", f"{report.desirable_rows:,} wanted, {report.undesirable_rows:,} not"))
    if report.groups is not None:
        rows.append(("groups", f"{report.groups:,}"))
    for name, number, what in (
        ("not fed", report.rows_without_supervision, " without a token to train"),
        ("duplicates", report.duplicate_rows, f", equal to an earlier one, {report.duplicates_dropped:,} dropped"),
        ("held out", report.held_out_rows, ""),
        (
            "nearly equal",
            report.near_duplicate_rows,
            f" {NEARLY_EQUAL}",
        ),
        ("bad rows", report.bad_rows, " that can't be used"),
    ):
        if number:
            rows.append((name, f"{counted(number, 'row')}{what}"))
    return rows


def _count_rows(report: DataReport) -> str:
    if report.rows_trained == report.rows:
        return f"{report.rows:,}"
    return f"{report.rows:,} read, {report.rows_trained:,} fed"


def _describe_long(report: DataReport, max_length: int) -> str:
    parts = [
        f"{counted(number, 'row')} {what}"
        for number, what in ((report.truncated_rows, "truncated"), (report.dropped_rows, "dropped"))
        if number
    ]
    lost = f", {counted(report.tokens_lost, 'token')} lost" if report.tokens_lost else ""
    return f"{' and '.join(parts) or 'none'} at {max_length:,} tokens{lost}"


def _batch_rows(inspection: DataInspection) -> list[Row]:
    batches = inspection.batches
    rows = [("padding", _describe_padding(batches))]
    if batches.packed_rows is not None and batches.packing_efficiency is not None:
        packed = f"{counted(batches.packed_rows, 'row')} of {inspection.max_length:,}"
        rows.append(("packing", f"{packed}, {batches.packing_efficiency:.1%} full"))
    return rows


def _describe_padding(batches: BatchSummary) -> str:
    if batches.micro_batch_tokens is None or batches.micro_batches is None:
        return (
            f"{batches.padding_share:.1%} of micro-batches of {batches.micro_batch_size}, "
            f"{batches.grouped_padding_share:.1%} with --sampling group_by_length"
        )
    return f"none in micro-batches of up to {batches.micro_batch_tokens:,} tokens, {batches.micro_batches:,} an epoch"


def length_lines(bars: Sequence[Bar], max_length: int) -> list[Text]:
    """Return the histogram, with a line where rows are truncated."""
    most = max(bar.rows for bar in bars)
    names = [f"{bar.first:,}-{bar.last:,}" for bar in bars]
    width = max(map(len, names))
    lines: list[Text] = []
    drawn = False
    for name, bar in zip(names, bars, strict=True):
        if not drawn and bar.first > max_length:
            lines.append(_limit(width, max_length))
            drawn = True
        style = "" if bar.last <= max_length else "red"
        lines.append(Text.assemble(f"  {name:>{width}}  ", (_bar(bar.rows, most), style), f" {bar.rows:,}"))
    return lines if drawn else [*lines, _limit(width, max_length)]


def _limit(width: int, max_length: int) -> Text:
    return Text(f"  {'':>{width}}  {'─' * 8} max length {max_length:,} {'─' * 8}", style="yellow")


def _bar(rows: int, most: int) -> str:
    eighths = round(8 * BAR_CELLS * rows / most)
    whole, rest = divmod(max(eighths, 1 if rows else 0), 8)
    return "█" * whole + (EIGHTHS[rest] if rest else "")


def trouble_lines(troubles: Sequence[Trouble], notes: Sequence[str]) -> list[str]:
    """Return a line for each kind of trouble, with its rows below, and for each note."""
    lines = [f"  {note}" for note in notes]
    for trouble in troubles:
        lines.append(f"  {counted(trouble.rows, 'row')}: {trouble.kind}")
        lines += [f"      {where}" for where in trouble.where]
        if trouble.rows > len(trouble.where):
            lines.append(f"      and {trouble.rows - len(trouble.where):,} more")
    return lines


def preview_text(row: RowPreview, *, is_coloured: bool) -> Text:
    """Return a row with trained tokens coloured, or within « and » without colours."""
    text, trained = Text(), False
    shown = [piece for piece in row.pieces if not piece.is_padding]
    for piece, is_end in zip(shown, line_ends(shown), strict=True):
        if not is_coloured and piece.is_trained != trained:
            text.append(TRAINED_BEGIN if piece.is_trained else TRAINED_END)
            trained = piece.is_trained
        style = TRAINED if piece.is_trained else SPECIAL if piece.is_special else DIM
        text.append(
            visible(piece.text, is_end=is_end),
            style=f"{style} underline" if piece.is_trained and piece.is_special else style,
        )
    if trained:
        text.append(TRAINED_END)
    return text


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
