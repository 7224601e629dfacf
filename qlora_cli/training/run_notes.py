"""Report notes on the data and on a resume before training."""

from transformers import PreTrainedTokenizerBase

from qlora_cli.data.feeding.data_report import NEARLY_EQUAL, describe_mixture
from qlora_cli.data.feeding.label_balance import balance_notes
from qlora_cli.data.feeding.prepare import PreparedData, TrainingData
from qlora_cli.data.feeding.stream import OUTCOMES
from qlora_cli.data.limits import MAX_BAD_ROWS_LISTED
from qlora_cli.data.showing.preview import preview_rows
from qlora_cli.events import Noted, Reporter
from qlora_cli.hardware.environment import package_versions
from qlora_cli.settings.models import TrainSettings
from qlora_cli.training.resuming.resume import Resume, changed_versions, check_changes
from qlora_cli.units import counted

LINE_CHARACTERS = 240


def note_previews(rows: TrainingData, tokenizer: PreTrainedTokenizerBase, reporter: Reporter) -> None:
    """Report the first row that is trained, and the first one held out, with what of it is trained."""
    for data in (rows.train, rows.evaluation):
        for row in preview_rows(data, tokenizer, 1) if data is not None else ():
            reporter.report(Noted(message=f"{row.where}, trained is within « »: {row.one_line(LINE_CHARACTERS)}"))


def note_data(data: PreparedData, settings: TrainSettings, reporter: Reporter) -> None:
    """Report what was recognised, and what was truncated, dropped or skipped."""
    report, max_length = data.report, settings.data.max_length
    summary = f"{report.name}: {counted(report.rows, 'row')} read as {report.recognised}"
    trained = f"{counted(report.tokens, 'token')}, {report.supervised_tokens:,} of them trained"
    fed = "" if report.rows_trained == report.rows else f"{report.rows_trained:,} are fed, "
    reporter.report(Noted(message=f"{summary}; {fed}{trained}"))
    if len(report.mixture) > 1 and data.stream is None:
        reporter.report(Noted(message=f"mixed of {describe_mixture(report)}"))
    if report.packed_rows is not None:
        share = report.tokens / (report.packed_rows * max_length)
        reporter.report(
            Noted(message=f"packed into {counted(report.packed_rows, 'row')} of {max_length:,}, {share:.1%} full")
        )
    if report.held_out_rows:
        reporter.report(Noted(message=f"{report.name}: {counted(report.held_out_rows, 'row')} held out, not trained"))
    if report.groups is not None:
        reporter.report(Noted(message=f"{report.name}: {counted(report.groups, 'group')} among the rows that are fed"))
    unbalanced = balance_notes(report, settings.training)
    for message in (*data.notes, *_data_warnings(data, max_length), *unbalanced):
        reporter.report(Noted(level="warning", message=message))


def _data_warnings(data: PreparedData, max_length: int) -> list[str]:
    report = data.report
    too_long = f"longer than {max_length:,} tokens"
    lost = f"{counted(report.supervised_tokens_lost, 'trained token')} lost (raise --max-length)"
    repeated = "fed once" if report.duplicates_dropped else "fed all the same (--drop-duplicates)"
    counts = [
        (report.truncated_rows, f"{too_long}, truncated; {lost}"),
        (report.dropped_rows, f"{too_long}, dropped; {lost}"),
        (report.rows_without_supervision, "without a token to train, not fed"),
        (report.duplicate_rows, f"that repeat an earlier one, {repeated}"),
        (report.near_duplicate_rows or 0, f"held out {NEARLY_EQUAL}"),
        (
            report.bad_rows,
            f"that can't be used, skipped; {_listed(report.bad_rows)} in {', '.join(map(str, data.skipped))}",
        ),
    ]
    return [f"{report.name}: {counted(number, 'row')} {what}" for number, what in counts if number]


def _listed(num_rows: int) -> str:
    return "listed" if num_rows <= MAX_BAD_ROWS_LISTED else f"the first {MAX_BAD_ROWS_LISTED:,} of a data set listed"


def note_stream(data: PreparedData, reporter: Reporter) -> None:
    """Report what was done with the rows of a stream, which is known only after it was read."""
    if data.stream is None:
        return
    counts = data.stream.counts
    for message in data.stream.notes:
        if message not in data.notes:
            reporter.report(Noted(level="warning", message=f"of the stream: {message}"))
    outcomes = [f"{counts[name]:,} {what}" for name, what in OUTCOMES.items() if counts[name]]
    if counts["near_duplicate"]:
        message = f"{counted(counts['near_duplicate'], 'row')} held out {NEARLY_EQUAL}"
        reporter.report(Noted(level="warning", message=message))
    lost = f"; {counts['supervised_tokens_lost']:,} trained tokens lost" if counts["supervised_tokens_lost"] else ""
    summary = ", ".join(outcomes) or "all of use"
    reporter.report(
        Noted(message=f"{counted(counts['read'], 'row')} of the stream read, ahead of what was fed: {summary}{lost}")
    )


def note_resume(
    resume: Resume, settings: TrainSettings, reporter: Reporter, *, trains_given_adapter: bool, digest: str
) -> None:
    """Report that an earlier run is resumed, and what changed since; `digest` is that of the base's weights.

    Raises:
        SettingsError: a change would contradict the record.
    """
    for damaged in resume.damaged:
        reporter.report(Noted(level="warning", message=f"a checkpoint is damaged and not used: {damaged}"))
    if resume.checkpoint is None and not resume.is_done:
        reporter.report(
            Noted(message=f"{resume.run.path} holds a run without a checkpoint: it restarts at the first step")
        )
    for change in check_changes(resume, settings, trains_given_adapter=trains_given_adapter, digest=digest):
        reporter.report(Noted(level="warning", message=f"changed since: {change}"))
    for change in changed_versions(resume, package_versions()):
        reporter.report(
            Noted(level="warning", message=f"another version than before, so the last bits may differ: {change}")
        )
