"""Labels of both kinds, and about as much weight of each: what KTO needs to tell wanted answers from others.

The bounds are those that TRL's page on KTO advises: all wanted answers together have 1 to 4/3 times the weight of all
others.
"""

from collections.abc import Iterator

from qlora_cli.data.feeding.data_report import DataReport
from qlora_cli.errors import DataError
from qlora_cli.settings.models import TrainingSettings
from qlora_cli.units import counted

ADVISED = (1.0, 4 / 3)
TOLERATED = 1.5  # times beyond these bounds; a note on every uneven data set would be one on almost all


def label_refusals(report: DataReport) -> list[DataError]:
    """Return the error if the labels of all rows to train on are equal: both kinds are needed to tell them apart."""
    if report.desirable_rows is None or 0 < report.desirable_rows < report.rows_trained:
        return []
    kind, other = ("wanted", "unwanted") if report.desirable_rows else ("unwanted", "wanted")
    hint = "; or learn these as they are, with --objective sft and --columns" if report.desirable_rows else ""
    return [
        DataError(
            f"{report.name} has {kind} answers alone by its labels ({counted(report.rows_trained, 'row')}), and KTO "
            "learns what tells both kinds apart",
            hint=f"Add rows with {other} answers{hint}.",
        )
    ]


def balance_notes(report: DataReport, training: TrainingSettings) -> Iterator[str]:
    """Yield a note if one kind of answers has far more weight in the loss than the other, with what balances them."""
    if not report.desirable_rows or not report.undesirable_rows:
        return
    wanted = training.desirable_weight * report.desirable_rows
    unwanted = training.undesirable_weight * report.undesirable_rows
    least, most = ADVISED
    if least / TOLERATED <= wanted / unwanted <= most * TOLERATED:
        return
    few, weight = (
        ("desirable_weight", unwanted * least / report.desirable_rows)
        if wanted < unwanted
        else ("undesirable_weight", wanted / most / report.undesirable_rows)
    )
    times = max(wanted / unwanted, unwanted / wanted)
    more, less = ("wanted", "unwanted") if wanted > unwanted else ("unwanted", "wanted")
    yield (
        f"{report.name}: its {more} answers have {times:.1f} times the weight of the {less} ones "
        f"({report.desirable_rows:,} wanted, {report.undesirable_rows:,} not); training.{few} {weight:.3g} would "
        "balance them: 1 to 4/3 times for those that are wanted is advised"
    )
