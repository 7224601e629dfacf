"""Measure loading and training at true sizes on this machine's NVIDIA GPU, unattended, in under ten minutes.

Llama- and Qwen3-MoE-shaped models with random weights are made in a temporary directory, loaded by the shared loader
and trained for a few steps by the code that `qlora train` runs. The results have one JSON line per case: seconds to
load, seconds per step, tokens/s, and the peaks of memory allocated, reserved and used by the process, next to those
predicted; for a case that only loads, bytes predicted, counted and allocated at the peak.

The cases named `*-memory-*` compare predictions with measurements; together with the rest they take more than ten
minutes, so run `--cases '*-memory-*'` by itself.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_cases import CASES, Case
from benchmarks.measured import run_measured, write_model_in_process
from benchmarks.records import RESULTS, ROOT, append, cpu_hardware, now, results_file, revision, versions
from benchmarks.synthetic import SHAPES, num_parameters
from qlora_cli.units import format_bytes

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

DEFAULT_SIZES = {"cuda": ("1b", "2b-moe", "8b", "70b-wide"), "cpu": ("tiny", "tiny-moe")}


def select_cases(patterns: Sequence[str], sizes: Sequence[str], without: Sequence[str] = ()) -> list[Case]:
    """Return the cases of these sizes that match one of the patterns and none of `without`, by model."""
    cases = [
        case
        for case in CASES
        if case.size in sizes
        and any(fnmatch(case.name, pattern) for pattern in patterns)
        and not any(fnmatch(case.name, pattern) for pattern in without)
    ]
    return sorted(cases, key=lambda case: sizes.index(case.size))


class Suite:
    """One run of the suite: its directory, its deadline, and the fields that all records share."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self._device: str = arguments.device
        self._directory = directory
        self._deadline: float = time.monotonic() + arguments.time_limit
        self._shared = {
            "benchmark": "gpu_suite",
            "command": _shown(shlex.join(["python", "benchmarks/gpu_suite.py", *sys.argv[1:]]), arguments.output_dir),
            "revision": revision(),
            "versions": versions(),
            "host": cpu_hardware(),
            "gpu": query_gpu() if arguments.device == "cuda" else None,
        }

    def run(self, case: Case) -> dict[str, Any]:
        """Return the record of one case, failed or done."""
        record = {**self._shared, "time": now(), "num_parameters": num_parameters(SHAPES[case.size])}
        if self._seconds_left() <= 0:
            return {**record, "case": asdict(case), "status": "skipped", "error": "the time limit was reached"}
        try:
            return {**record, **self._run_in_process(case, self._model(case.size))}
        except RuntimeError as error:
            return {**record, "case": asdict(case), "status": "failed", "error": _shown(str(error), self._directory)}

    def _seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def _model(self, size: str) -> Path:
        """Return the model of this size; it is made at its first use and replaces the previous one."""
        path = self._directory / f"model-{size}"
        if not path.exists():
            for previous in self._directory.glob("model-*"):
                shutil.rmtree(previous)
            seconds = write_model_in_process(
                sys.executable, size, path, environment=ENVIRONMENT, timeout_seconds=self._seconds_left()
            )
            print(f"made the {size} model in {seconds:.0f} s", flush=True)
        return path

    def _run_in_process(self, case: Case, model: Path) -> dict[str, Any]:
        directory = self._directory / f"case-{case.name}"
        directory.mkdir()
        used_before = query_gpu()["memory_used_bytes"] if self._device == "cuda" else None
        command = [
            *(sys.executable, "-m", "benchmarks.gpu_case", "--case", json.dumps(asdict(case))),
            *("--model", str(model), "--device", self._device, "--directory", str(directory)),
            *(("--used-before-bytes", str(used_before)) if used_before is not None else ()),
        ]
        finished = run_measured(command, environment=ENVIRONMENT, timeout_seconds=self._seconds_left())
        result = directory / "result.json"
        if finished.exit_code != 0 or not result.exists():
            reason = "the time limit was reached" if self._seconds_left() <= 0 else finished.stderr[-2000:]
            raise RuntimeError(f"ended with {finished.exit_code}: {reason}")
        record: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        shutil.rmtree(directory)
        if record["status"] == "failed":
            record["error"] = _shown(record["error"], self._directory)
            record["stderr_tail"] = _shown(finished.stderr[-3000:], self._directory)
        return record


def _shown(text: str, directory: Path) -> str:
    """Return `text` without the paths of this machine."""
    for path, name in ((str(directory), "DIR"), (sys.prefix, "PYTHON"), (str(ROOT), ".")):
        text = text.replace(path, name)
    return text


def query_gpu() -> dict[str, Any]:
    """Return name, memory and driver of the GPU that PyTorch uses, without starting CUDA in this process.

    Raises:
        RuntimeError: nvidia-smi is not installed or finds no GPU.
    """
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        raise RuntimeError("nvidia-smi was not found")
    fields = "name,memory.total,memory.used,driver_version,compute_cap"
    command = [nvidia_smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible.split(',')[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0 or not done.stdout.strip():
        raise RuntimeError(f"nvidia-smi found no GPU: {(done.stderr or done.stdout).strip()}")
    name, total, used, driver, capability = (part.strip() for part in done.stdout.splitlines()[0].split(","))
    return {
        "name": name,
        "memory_bytes": _mib(total),
        "memory_used_bytes": _mib(used),
        "driver": driver,
        "compute_capability": capability,
    }


def _mib(text: str) -> int | None:
    """Return MiB in bytes; None where nvidia-smi gives no number, as within a MIG slice."""
    return int(text) * 1024**2 if text.isdigit() else None


def describe(record: dict[str, Any]) -> str:
    """Return one line about a case."""
    name = record["case"]["name"]
    if record["status"] != "done":
        first_line = record["error"].strip().splitlines()[-1]
        return f"{name:24} {record['status']}: {first_line}"
    if not record["case"]["num_steps"]:
        return _describe_load(record)
    peaks = [record[f"peak_{kind}_bytes"] for kind in ("allocated", "reserved", "process", "host")]
    shown = " / ".join("-" if peak is None else format_bytes(peak) for peak in peaks)
    return (
        f"{name:24} load {record['load_seconds']:6.1f} s   step {record['step_seconds']:7.3f} s   "
        f"{record['tokens_per_second']:8.0f} tokens/s   allocated / reserved / process / host {shown}"
        f"{_describe_error(record['memory'])}"
    )


def _describe_error(memory: dict[str, Any] | None) -> str:
    """Return the errors of the prediction, if there was one."""
    if memory is None:
        return ""
    errors = " / ".join(f"{memory[kind]['error_percent']:+.1f} %" for kind in ("allocated", "reserved"))
    return f"   predicted {errors}"


def _describe_load(record: dict[str, Any]) -> str:
    peak, within = record["peak_device_bytes"], record["peak_within_one_16_bit_tensor"]
    shown = "-" if peak is None else f"{format_bytes(peak)}, {'within' if within else 'BEYOND'} one 16-bit tensor"
    return (
        f"{record['case']['name']:24} load {record['load_seconds']:6.1f} s   "
        f"predicted {format_bytes(record['predicted_bytes'])}   counted {format_bytes(record['model_bytes'])}   "
        f"on the device {format_bytes(record['device_model_bytes'])}   peak {shown}"
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["*"], help="names or patterns of cases (default: all)")
    parser.add_argument("--without", nargs="+", default=[], help="names or patterns of cases to leave out")
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SHAPES,
        help="model sizes (default: all but tiny ones and 405b; on a CPU: tiny tiny-moe)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script out")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the results file goes")
    parser.add_argument("--time-limit", type=float, default=560, help="seconds for the whole suite (default: 560)")
    arguments = parser.parse_args()
    arguments.sizes = arguments.sizes or DEFAULT_SIZES[arguments.device]
    return arguments


def main() -> int:
    """Run the suite; return 0 if every case was measured, 1 if one was not, 2 if nothing can be run."""
    arguments = parse_arguments()
    cases = select_cases(arguments.cases, arguments.sizes, arguments.without)
    if not cases:
        print(f"No case matches. There are: {', '.join(case.name for case in CASES)}", file=sys.stderr)
        return 2
    device_name = "cpu"
    if arguments.device == "cuda":
        try:
            device_name = query_gpu()["name"]
        except RuntimeError as error:
            print(f"No NVIDIA GPU: {error}. To try the script out: --device cpu --sizes tiny", file=sys.stderr)
            return 2
    results = results_file(arguments.output_dir, f"gpu-{device_name}")
    statuses = []
    with tempfile.TemporaryDirectory(prefix="qlora-gpu-suite-") as directory:
        suite = Suite(arguments, Path(directory))
        for case in cases:
            record = suite.run(case)
            append(results, record)
            statuses.append(record["status"])
            print(describe(record), flush=True)
    print(f"Written to {results}")
    return 0 if set(statuses) == {"done"} else 1


if __name__ == "__main__":
    sys.exit(main())
