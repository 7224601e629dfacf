"""Compare the cost model with published throughput of QLoRA steps: how optimistic is it?

    python benchmarks/published_speed.py

Rows of Unsloth are compared with its published algorithm by arithmetic, those of other trainers, which run PEFT's
layers, with the step of `qlora train` that recomputes whole layers. The rates of the GPUs are assumed as in
`cost_of_a_step.py`. The rows are `data/published_speed.csv`, with the source of each.
"""

import argparse
import csv
import sys
import warnings
from collections.abc import Mapping
from math import exp, log
from pathlib import Path
from statistics import fmean, stdev

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cost_of_a_step import RATES, Case, find_model, traced_costs
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.settings.choices import Checkpointing

ROWS = Path(__file__).parent / "data" / "published_speed.csv"


def read_rows() -> list[dict[str, str]]:
    """Return the published rows."""
    with ROWS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def predicted(row: Mapping[str, str]) -> float:
    """Return the tokens/s that the cost model gives for a row."""
    case = Case(
        model=find_model(row["model"]),
        gpu=find_gpu(row["gpu"]),
        rate=RATES[row["gpu"]],
        length=int(row["length"]),
        rows=int(row["micro_batch_size"]),
        rank=int(row["rank"]),
    )
    (traced,), published, _ = traced_costs(case, (Checkpointing.ON,))
    cost = published if row["algorithm"] == "published" else traced.cost
    return case.rows * case.length / cost.seconds


def main() -> int:
    """Print each row, and how far the model is from all rows of each algorithm."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    ratios: dict[str, list[float]] = {}
    for row in read_rows():
        model, measured = predicted(row), float(row["tokens_per_second"])
        ratios.setdefault(row["algorithm"], []).append(log(model / measured))
        print(
            f"{row['gpu']:10}{row['model']:14}{row['framework']:40}{row['micro_batch_size']:>2} x {row['length']:>5}"
            f"   published {measured:6,.0f}   model {model:6,.0f}   {model / measured:5.2f} x"
        )
    for algorithm, logs in ratios.items():
        print(f"{algorithm}: model / published {exp(fmean(logs)):.2f} x, scatter {exp(stdev(logs)):.2f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
