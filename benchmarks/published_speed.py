"""Compare the model of time with published throughput of QLoRA steps: how far off is it?

    python benchmarks/published_speed.py [FILE]

Each row is predicted with the algorithm of its trainer, as far as that is known (`published_steps.py`), and with the
rates that `qlora inspect-memory` uses (`qlora_cli/timing/rates.py`). The rows are `data/published_speed.csv`, or FILE
with the same columns; those that do not say what was run are named and left out.
"""

import argparse
import csv
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path
from statistics import fmean, pstdev

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published_steps import PublishedRow, costs_of, read_row
from benchmarks.records import RESULTS, append, now, results_file, revision, versions
from qlora_cli.memory.costs.step_time import HIGH, LOW

ROWS = Path(__file__).parent / "data" / "published_speed.csv"
LONG = 1024  # tokens of a micro-batch from which on a step is not bound by the host alone


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A published row, and what the model of time says about it. `ratio` is predicted to published tokens/s."""

    row: PublishedRow
    predicted: float
    limited_by: str

    @property
    def ratio(self) -> float:
        """Above one, the model is optimistic."""
        return self.predicted / self.row.tokens_per_second

    @property
    def is_within_band(self) -> bool:
        """Whether the published time is within the band that a prediction states."""
        return LOW <= self.ratio <= HIGH


def read_rows(path: Path = ROWS) -> tuple[list[PublishedRow], list[str]]:
    """Return the published rows of a file, and a sentence on each that does not say enough."""
    rows, left_out = [], []
    with path.open(encoding="utf-8", newline="") as file:
        for content in csv.DictReader(file):
            try:
                rows.append(read_row(content))
            except ValueError as error:
                left_out.append(f"row {content['id']} ({content['framework']}) says too little: {error}")
    return rows, left_out


def compare(row: PublishedRow) -> Comparison:
    """Return what the model of time says about a row."""
    micro_batch, update = costs_of(row)
    seconds = row.num_micro_batches * micro_batch.seconds + update.seconds
    predicted = row.num_micro_batches * row.rows * row.length / seconds
    return Comparison(row=row, predicted=predicted, limited_by=micro_batch.limited_by)


def geometric(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """Return the geometric mean of the ratios, and their geometric standard deviation."""
    logs = [log(comparison.ratio) for comparison in comparisons]
    return exp(fmean(logs)), exp(pstdev(logs))


def print_comparison(comparison: Comparison) -> None:
    """Print a line."""
    row = comparison.row
    print(
        f"{row.id:>4} {row.gpu.name:10}{row.model:13}{row.algorithm:11}{row.rows:>2} x {row.length:>6}"
        f"   published {row.tokens_per_second:7,.0f}   predicted {comparison.predicted:7,.0f}"
        f"   {comparison.ratio:5.2f} x{'' if comparison.is_within_band else ' !'}  {comparison.limited_by}"
    )


def print_summary(comparisons: Sequence[Comparison]) -> None:
    """Print how far the model is from all rows, and from those of each kind."""
    groups = {
        "all rows": comparisons,
        f"NF4, {LONG:,} tokens and more": [
            each for each in comparisons if each.row.is_nf4 and each.row.rows * each.row.length >= LONG
        ],
        **{
            algorithm: [each for each in comparisons if each.row.algorithm == algorithm]
            for algorithm in dict.fromkeys(each.row.algorithm for each in comparisons)
        },
    }
    for name, group in groups.items():
        mean, scatter = geometric(group)
        within = sum(each.is_within_band for each in group)
        print(
            f"{name:28}{len(group):>3} rows   predicted / published {mean:.2f} x, scatter {scatter:.2f} x, "
            f"{within} within the band"
        )


def main() -> int:
    """Print and record each row, and how far the model is from all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=ROWS, help="the published rows (default: ours)")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the results file goes")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    rows, left_out = read_rows(arguments.file)
    for sentence in left_out:
        print(sentence)
    results, context = (
        results_file(arguments.output_dir, "published_speed"),
        {"versions": versions(), "revision": revision()},
    )
    comparisons = []
    for row in rows:
        comparison = compare(row)
        comparisons.append(comparison)
        print_comparison(comparison)
        record = {
            "benchmark": "published_speed",
            "time": now(),
            **asdict(row),
            "gpu": row.gpu.name,
            "algorithm": row.algorithm,
            "predicted_tokens_per_second": comparison.predicted,
            "ratio": comparison.ratio,
            "limited_by": comparison.limited_by,
        }
        append(results, record | context)
    print_summary(comparisons)
    print(f"Written to {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
