"""Merge a checkpoint of 6 GB side by side: `qlora merge`, PEFT's merge and save, and a plain `cp -r` as the limit.

A Llama of 3.2 billion parameters with random weights, 6.4 GB in bf16, and LoRA of rank 16 on all linear layers. The
programs take turns, each in a process of its own, and before each the files are dropped from the page cache. Every
program ends when its output is on the disk (`sync`), which is timed separately. The merged weights are compared.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measured import run_measured, write_model_in_process
from benchmarks.records import RESULTS, ROOT, append, cpu_hardware, now, results_file, revision, versions
from benchmarks.synthetic import SHAPES
from qlora_cli.units import format_bytes

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # as the command sets it
}
LIMIT = "cp"


@dataclass(frozen=True, kw_only=True)
class Program:
    """One way to get from base and adapter to a merged directory; `arguments` are those of `merge_case`."""

    name: str
    title: str
    arguments: tuple[str, ...] = ()


PROGRAMS = (
    Program(name=LIMIT, title="cp -r of the base"),
    Program(name="qlora", title="qlora merge, into the original base", arguments=("qlora",)),
    Program(
        name="qlora-dequantized",
        title="qlora merge, into the dequantized base",
        arguments=("qlora", "--base", "dequantized"),
    ),
    Program(name="peft", title="PEFT merge_and_unload, save_pretrained", arguments=("peft",)),
)


def run_program(program: Program, base: Path, adapter: Path, output: Path, timeout_seconds: float) -> dict[str, Any]:
    """Run a program on cold files and return its figures.

    `seconds` are those of the work: without imports, and without the time until everything is on the disk.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    drop_from_cache(base)
    if program.name == LIMIT:
        start = time.monotonic()
        subprocess.run(["cp", "-r", base, output], check=True)  # noqa: S607 - whichever cp is installed
        figures: dict[str, Any] = {"seconds": time.monotonic() - start}
    else:
        name, *options = program.arguments
        command = [sys.executable, "-m", "benchmarks.merge_case", name, str(adapter), str(output), *options]
        finished = run_measured(command, environment=ENVIRONMENT, timeout_seconds=timeout_seconds)
        if finished.exit_code != 0:
            raise RuntimeError(f"{program.name} ended with {finished.exit_code}:\n{finished.stderr[-3000:]}")
        figures = json.loads(finished.stdout.splitlines()[-1])
        figures["cpu_seconds"] = finished.cpu_seconds
    start = time.monotonic()
    os.sync()
    return {**figures, "sync_seconds": time.monotonic() - start}


def drop_from_cache(directory: Path) -> None:
    """Drop the files in a directory from the page cache, after syncing them to the disk."""
    os.sync()
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest difference between the weights of two directories, in units of bf16's last place."""
    import torch
    from safetensors import safe_open

    def files_by_tensor(directory: Path) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        return files

    files, other_files = files_by_tensor(one), files_by_tensor(other)
    assert files.keys() == other_files.keys(), "the merges have different tensors"
    worst = 0.0
    for name, path in files.items():
        with safe_open(path, "pt") as file, safe_open(other_files[name], "pt") as other_file:
            mine, theirs = file.get_tensor(name).float(), other_file.get_tensor(name).float()
        unit = torch.maximum(mine.abs(), theirs.abs()) * 2**-7
        worst = max(worst, float(((mine - theirs).abs() / unit.clamp_min(1e-30)).max()))
    return worst


def compare(arguments: argparse.Namespace, results: Path) -> dict[str, list[dict[str, Any]]]:
    """Run every program `--repeats` times, in turn, and record each run."""
    measured: dict[str, list[dict[str, Any]]] = {program.name: [] for program in PROGRAMS}
    context = {"hardware": cpu_hardware(), "versions": versions(), "revision": revision()}
    with tempfile.TemporaryDirectory(prefix="qlora-benchmark-", dir=arguments.work_dir) as name:
        directory = Path(name)
        base, adapter = directory / "base", directory / "adapter"
        write_model_in_process(sys.executable, arguments.size, base, environment=ENVIRONMENT)
        command = [sys.executable, "-m", "benchmarks.merge_case", "adapter", str(adapter), str(base)]
        subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT})
        for repeat in range(arguments.repeats):
            for program in PROGRAMS:
                load_average = os.getloadavg()[0]
                output = directory / program.name
                figures = run_program(program, base, adapter, output, arguments.timeout)
                measured[program.name].append(figures)
                record = {
                    "benchmark": "merge",
                    "time": now(),
                    "program": program.name,
                    "repeat": repeat,
                    "size": arguments.size,
                    **figures,
                    "checkpoint_bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")),
                    "load_average_before": load_average,
                    **context,
                }
                append(results, record)
                print(f"{program.title:40} {describe(figures)}", flush=True)
                if program.name not in {"qlora", "peft"}:
                    shutil.rmtree(output)
            difference = largest_difference(directory / "qlora", directory / "peft")
            print(f"qlora and PEFT differ by at most {difference:.2f} units of bf16's last place")
            append(
                results, {"benchmark": "merge", "time": now(), "repeat": repeat, "largest_difference_ulp": difference}
            )
            for name in ("qlora", "peft"):
                shutil.rmtree(directory / name)
    return measured


def describe(figures: Mapping[str, Any]) -> str:
    """Return the figures of a run in one line."""
    line = f"{figures['seconds']:7.2f} s, until on the disk {figures['seconds'] + figures['sync_seconds']:7.2f} s"
    if "anonymous_bytes" not in figures:
        return line
    return (
        f"{line}   anonymous memory {format_bytes(figures['anonymous_bytes'])}, resident "
        f"{format_bytes(figures['resident_bytes'])}"
    )


def summarize(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the medians of each program, and of its ratios to `cp -r` in the same turn."""
    summaries = []
    for name, runs in measured.items():
        limits = measured[LIMIT]
        pairs = list(zip(runs, limits, strict=True))
        summaries.append(
            {
                "benchmark": "merge",
                "program": name,
                "num_runs": len(runs),
                "median_seconds": statistics.median(run["seconds"] for run in runs),
                "seconds_ratio": statistics.median(run["seconds"] / limit["seconds"] for run, limit in pairs),
                "on_disk_ratio": statistics.median(_on_disk(run) / _on_disk(limit) for run, limit in pairs),
                "median_anonymous_bytes": statistics.median(run.get("anonymous_bytes", 0) for run in runs),
            }
        )
    return summaries


def _on_disk(run: Mapping[str, Any]) -> float:
    return float(run["seconds"] + run["sync_seconds"])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="3b", help="shape of the model")
    parser.add_argument("--repeats", type=int, default=3, help="merges by each program (default: 3)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one merge may take (default: 900)")
    parser.add_argument("--work-dir", type=Path, help="where models are written, 20 GB (default: the system's)")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the results file goes")
    return parser.parse_args()


def main() -> int:
    """Compare and print; the exit code is 1 if a merge failed."""
    arguments = parse_arguments()
    results = results_file(arguments.output_dir, "merge")
    try:
        measured = compare(arguments, results)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for summary in summarize(measured):
        append(results, {**summary, "size": arguments.size, "time": now()})
        print(
            f"{summary['program']:20} median {summary['median_seconds']:7.2f} s, {summary['seconds_ratio']:.2f} x "
            f"{LIMIT}, on the disk {summary['on_disk_ratio']:.2f} x, anonymous memory "
            f"{format_bytes(int(summary['median_anonymous_bytes']))}"
        )
    print(f"Written to {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
