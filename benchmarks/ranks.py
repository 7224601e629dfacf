"""Time a step of two processes over gloo against one of a single process with half as many micro-batches.

A Llama of 107M parameters with random weights in NF4, LoRA of rank 16 on all linear layers, rows of 64 tokens, one
thread a process, on a CPU with at least two cores. Each process computes as many micro-batches as the single one, so
that what a step takes longer is what sharing it costs: the exchange, the sum of the gradients, and the wait for the
slower process. The runs take turns; compare their medians on an idle machine.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measured import run_measured, write_model_in_process
from benchmarks.records import RESULTS, ROOT, append, cpu_hardware, now, results_file, revision, versions
from qlora_cli.runs.directory import RunDirectory

SIZE, LENGTH = "107m", 64
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
WARM_UP = 2  # steps, which the medians leave out
PROCESSES = (1, 2)


def write_rows(path: Path, number: int) -> None:
    """Write rows of tokens, all of one length."""
    row = {"input_ids": [(7 * place) % 250 + 4 for place in range(LENGTH)]}
    path.write_text("".join(json.dumps({**row, "labels": row["input_ids"]}) + "\n" for _ in range(number)), "utf-8")


def step_seconds(folder: Path, output: Path, num_processes: int, arguments: argparse.Namespace) -> list[float]:
    """Train in so many processes and return the seconds of each step after the first ones.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    settings = {
        "training.max_steps": arguments.steps + WARM_UP,
        "training.micro_batch_size": 1,
        "training.gradient_accumulation_steps": num_processes * arguments.micro_batches,
        "training.num_gpus": num_processes,
        "training.save_steps": arguments.steps + WARM_UP,
        "model.dtype": "fp32",
        "model.device": "cpu",
        "data.format": "tokens",
        "data.max_length": LENGTH,
    }
    command = [sys.executable, "-m", "qlora_cli", "train", "--model", str(folder / "model"), "--output", str(output)]
    command += ["--dataset", str(folder / "rows.jsonl")]
    for path, value in settings.items():
        command += ["--set", f"{path}={value}"]
    finished = run_measured(command, environment=ENVIRONMENT, timeout_seconds=arguments.timeout)
    if finished.exit_code != 0:
        raise RuntimeError(f"{num_processes} processes ended with {finished.exit_code}:\n{finished.stderr[-3000:]}")
    events = map(json.loads, RunDirectory(output).metrics_file.read_text(encoding="utf-8").splitlines())
    times = [event["elapsed_seconds"] for event in events if event["event"] == "step_done"][WARM_UP - 1 :]
    return [later - earlier for earlier, later in pairwise(times)]


def compare(arguments: argparse.Namespace, results: Path) -> dict[int, list[float]]:
    """Train in turn with one process and with two, record each run, and return the seconds of all steps."""
    measured: dict[int, list[float]] = {number: [] for number in PROCESSES}
    context: dict[str, Any] = {"hardware": cpu_hardware(), "versions": versions(), "revision": revision()}
    with tempfile.TemporaryDirectory(prefix="qlora-benchmark-", dir=arguments.work_dir) as directory:
        folder = Path(directory)
        write_model_in_process(sys.executable, SIZE, folder / "model", environment=ENVIRONMENT)
        write_rows(folder / "rows.jsonl", 64)
        for repeat in range(arguments.repeats):
            for number in PROCESSES:
                load_average = os.getloadavg()[0]
                seconds = step_seconds(folder, folder / f"run-{repeat}-{number}", number, arguments)
                measured[number] += seconds
                record = {"benchmark": "ranks", "time": now(), "num_processes": number, "repeat": repeat}
                figures = {"step_seconds": seconds, "micro_batches_a_process": arguments.micro_batches}
                append(results, {**record, **figures, "load_average_before": load_average, **context})
    return measured


def main() -> None:
    """Compare, and print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=2, help="of each process in a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    measured = compare(arguments, results_file(arguments.results, "ranks"))
    one, two = (statistics.median(measured[number]) for number in PROCESSES)
    print(f"one process   {one:.3f} s a step of {arguments.micro_batches} micro-batches")
    print(f"two processes {two:.3f} s a step of {2 * arguments.micro_batches} micro-batches: {two / one:.3f} times")


if __name__ == "__main__":
    main()
