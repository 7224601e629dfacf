"""Measure loading and training at true sizes on this machine's NVIDIA GPU, unattended, in under six minutes.

Llama- and Qwen3-MoE-shaped models with random weights are made in a temporary directory, loaded by the shared loader
and trained for a few steps by the code that `qlora train` runs. The results have one JSON line per case: seconds to
load, seconds per step, tokens/s, and the peaks of memory allocated, reserved and used by the process, next to those
predicted; for a case that only loads, bytes predicted, counted and allocated at the peak.

Cases run in the order of their worth, each in its own process with a time limit. Those whose seconds count have the
GPU to themselves, the others run several at a time. A record is on the disk when its case ends. A second run with the
same output directory continues: it skips what is measured, and leaves for last what failed or took too long.
"""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatch
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_cases import CASES, Case, rehearsed
from benchmarks.gpu_processes import Deadline, Ended, run_until
from benchmarks.records import RESULTS, ROOT, append, cpu_hardware, now, read, results_file, revision, versions
from benchmarks.synthetic import SHAPES, num_parameters
from qlora_cli.units import GIB, format_bytes

SHORTEST_SECONDS = 10.0  # with less left, a case is not started: it could not load a model
WORKER_BYTES = 32 * GIB  # of GPU memory for each case that runs at the same time as others
MOST_WORKERS = 4
NUM_STEPS_SHOWN = 20


def select_cases(patterns: Sequence[str], without: Sequence[str] = ()) -> list[Case]:
    """Return the cases that match one of the patterns and none of `without`, in the order of the table."""
    return [
        case
        for case in CASES
        if any(fnmatch(case.name, pattern) for pattern in patterns)
        and not any(fnmatch(case.name, pattern) for pattern in without)
    ]


def remaining(cases: Sequence[Case], records: Sequence[dict[str, Any]]) -> list[Case]:
    """Return the cases that no record says are measured; those that were tried without success come last."""
    of_cases = {case.name: _as_recorded(case) for case in cases}
    tried: dict[str, set[str]] = {}
    for record in records:
        name = record["case"]["name"]
        if record["case"] == of_cases.get(name):
            tried.setdefault(name, set()).add(record["status"])
    waiting = [case for case in cases if "done" not in tried.get(case.name, ())]
    return sorted(waiting, key=lambda case: case.name in tried)


def _as_recorded(case: Case) -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads(json.dumps(asdict(case)))
    return recorded


def batches(cases: Sequence[Case], num_workers: int) -> Iterator[tuple[list[Case], int]]:
    """Return cases that may run at the same time, in order, and how many of them: those that are timed run alone."""
    for is_timed, group in groupby(cases, key=lambda case: case.is_timed):
        yield list(group), 1 if is_timed else num_workers


class Models:
    """The models of the suite: made in the order of their use while earlier cases run, deleted after their last."""

    def __init__(self, directory: Path, deadline: Deadline, cases: Sequence[Case]) -> None:
        self._directory = directory
        self._deadline = deadline
        self._pool = ThreadPoolExecutor(1)
        sizes = dict.fromkeys(case.size for case in cases if case.size is not None)
        self._made: dict[str, Future[Path]] = {size: self._pool.submit(self._make, size) for size in sizes}

    def of(self, case: Case) -> Path | None:
        """Return the model of a case, once it is there; None if the case needs none.

        Raises:
            RuntimeError: it could not be made.
        """
        return None if case.size is None else self._made[case.size].result()

    def delete_unused(self, coming: Sequence[Case]) -> None:
        """Delete the models that no case to come uses."""
        for size in self._made.keys() - {case.size for case in coming}:
            shutil.rmtree(self._path(size), ignore_errors=True)

    def close(self) -> None:
        """Make no more models; the one that is being made is ended by the deadline at the latest."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _path(self, size: str) -> Path:
        return self._directory / f"model-{size}"

    def _make(self, size: str) -> Path:
        command = [sys.executable, "-m", "benchmarks.synthetic", "--size", size, "--output", str(self._path(size))]
        ended = run_until(command, seconds=self._deadline.seconds_left)
        if ended.exit_code != 0:
            raise RuntimeError(f"making the {size} model failed: {ended.errors[-2000:]}")
        print(f"made the {size} model in {ended.seconds:.0f} s", flush=True)
        return self._path(size)


class Suite:
    """One run of the suite: its directory, its deadline, and the fields that all records share."""

    def __init__(self, arguments: argparse.Namespace, directory: Path, results: Path, shared: dict[str, Any]) -> None:
        self._device: str = arguments.device
        self._directory = directory
        self._results = results
        self._shared = shared
        self._deadline = Deadline(arguments.time_limit)

    def run(self, cases: Sequence[Case], num_workers: int) -> list[str]:
        """Run the cases, append a record of each that was started, and return how each ended."""
        statuses: list[str] = []
        models = Models(self._directory, self._deadline, cases)
        try:
            for batch, workers in batches(cases, num_workers):
                with ThreadPoolExecutor(workers) as pool:
                    statuses += pool.map(partial(self._record, models, workers == 1), batch)
                models.delete_unused(cases[len(statuses) :])
        finally:
            models.close()
        return statuses

    def _record(self, models: Models, is_alone: bool, case: Case) -> str:
        """Run one case, append its record, and return how it ended; one that is not started leaves no record."""
        missing = case.needs is not None and importlib.util.find_spec(case.needs) is None
        if missing or self._deadline.seconds_left < SHORTEST_SECONDS:
            reason = f"needs {case.needs}" if missing else "the time limit was reached"
            print(f"{case.name:32} not started: {reason}", flush=True)
            return "left out" if missing else "not started"
        num_weights = num_parameters(SHAPES[case.size]) if case.size is not None else None
        record = {**self._shared, "time": now(), "num_parameters": num_weights, "is_alone": is_alone}
        try:
            record |= self._run_in_process(case, models.of(case), is_alone=is_alone)
        except (RuntimeError, OSError) as error:
            record |= {"case": asdict(case), "status": "failed", "error": _shown(str(error), self._directory)}
        append(self._results, record)
        print(describe(record), flush=True)
        return str(record["status"])

    def _run_in_process(self, case: Case, model: Path | None, *, is_alone: bool) -> dict[str, Any]:
        """Return the record of a case; its directory is deleted.

        The process's use of the GPU is not measured for cases that run at the same time: the driver's figure is that
        of all.
        """
        directory = self._directory / f"case-{case.name}"
        directory.mkdir()
        used_before = query_gpu()["memory_used_bytes"] if self._device == "cuda" and is_alone else None
        command = [
            *(sys.executable, "-m", "benchmarks.gpu_case", "--case", json.dumps(asdict(case))),
            *("--device", self._device, "--directory", str(directory)),
            *(("--model", str(model)) if model is not None else ()),
            *(("--used-before-bytes", str(used_before)) if used_before is not None else ()),
        ]
        seconds = min(case.timeout_seconds, self._deadline.seconds_left)
        ended = run_until(command, seconds=seconds)
        try:
            return {**self._result(case, directory, ended), "case_seconds": ended.seconds}
        finally:
            shutil.rmtree(directory)

    def _result(self, case: Case, directory: Path, ended: Ended) -> dict[str, Any]:
        result = directory / "result.json"
        errors = _shown(ended.errors[-3000:], self._directory)
        if result.exists():
            record: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            if record["status"] != "failed":
                return record
            return {**record, "error": _shown(record["error"], self._directory), "stderr_tail": errors}
        return {
            "case": asdict(case),
            "status": "timed out" if ended.timed_out else "failed",
            "error": f"no result after {ended.seconds:.0f} s; exit code {ended.exit_code}",
            "stderr_tail": errors,
            "steps": list(read(directory.glob("run/metrics.jsonl")))[-NUM_STEPS_SHOWN:],
        }


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
    name = f"{record['case']['name']:32}"
    if record["status"] != "done":
        reason = record["error"].strip().splitlines()[-1]
        last = next((line for line in reversed(record.get("stderr_tail", "").splitlines()) if line.strip()), "")
        return f"{name} {record['status']}: {reason}   {last.strip()}"
    if record["case"]["size"] is None:
        return _describe_kernels(name, record)
    if not record["case"]["num_steps"]:
        return _describe_load(name, record)
    peaks = [record[f"peak_{kind}_bytes"] for kind in ("allocated", "reserved", "process", "host")]
    shown = " / ".join("-" if peak is None else format_bytes(peak) for peak in peaks)
    return (
        f"{name} load {record['load_seconds']:6.1f} s   step {record['step_seconds']:7.3f} s   "
        f"{record['tokens_per_second']:8.0f} tokens/s   allocated / reserved / process / host {shown}"
        f"{_describe_error(record['memory'])}{_describe_profile(record['profile'])}"
    )


def _describe_profile(profile: dict[str, Any] | None) -> str:
    if profile is None:
        return ""
    return f"   GPU {100 * profile['gpu_share_of_step']:.0f} % of the step, {profile['num_launches']:,} launches"


def _describe_kernels(name: str, record: dict[str, Any]) -> str:
    layer, attention = record["layer"], record["attention"]
    dequantized = layer["dequantize_double"]
    return (
        f"{name} copy {record['copy_bytes_per_second'] / 1e9:.0f} GB/s   dequantization "
        f"{100 * dequantized['share_of_copy']:.0f} % of that, {100 * dequantized['share_of_product']:.0f} % of the "
        f"products of {layer['num_tokens']:,} tokens   attention of {len(attention['lengths'])} new lengths "
        f"{attention['without_cudnn']['sum_first']:.2f} s, with cuDNN {attention['with_cudnn']['sum_first']:.2f} s"
    )


def _describe_error(memory: dict[str, Any] | None) -> str:
    """Return the errors of the prediction, if there was one."""
    if memory is None:
        return ""
    errors = " / ".join(f"{memory[kind]['error_percent']:+.1f} %" for kind in ("allocated", "reserved"))
    return f"   predicted {errors}"


def _describe_load(name: str, record: dict[str, Any]) -> str:
    peak, within = record["peak_device_bytes"], record["peak_within_one_16_bit_tensor"]
    shown = "-" if peak is None else f"{format_bytes(peak)}, {'within' if within else 'BEYOND'} one 16-bit tensor"
    return (
        f"{name} load {record['load_seconds']:6.1f} s   "
        f"predicted {format_bytes(record['predicted_bytes'])}   counted {format_bytes(record['model_bytes'])}   "
        f"on the device {format_bytes(record['device_model_bytes'])}   peak {shown}"
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["*"], help="names or patterns of cases (default: all)")
    parser.add_argument("--without", nargs="+", default=[], help="names or patterns of cases to leave out")
    parser.add_argument(
        "--rehearse", action="store_true", help="all of it on a CPU, with tiny models, in place of a GPU"
    )
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the results file goes")
    parser.add_argument("--time-limit", type=float, default=330, help="seconds for the whole suite (default: 330)")
    parser.add_argument(
        "--workers", type=int, help="cases at a time, of those that are not timed (default: by memory)"
    )
    arguments = parser.parse_args()
    arguments.device = "cpu" if arguments.rehearse else "cuda"
    return arguments


def main() -> int:
    """Run the suite; return 0 if every case is measured, 1 if one is not, 2 if nothing can be run."""
    arguments = parse_arguments()
    cases = select_cases(arguments.cases, arguments.without)
    if not cases:
        print(f"No case matches. There are: {', '.join(case.name for case in CASES)}", file=sys.stderr)
        return 2
    try:
        gpu = query_gpu() if arguments.device == "cuda" else None
    except RuntimeError as error:
        print(f"No NVIDIA GPU: {error}. To try the suite out: --rehearse", file=sys.stderr)
        return 2
    shared = {
        "benchmark": "gpu_suite",
        "command": _shown(shlex.join(["python", "benchmarks/gpu_suite.py", *sys.argv[1:]]), arguments.output_dir),
        "revision": revision(),
        "versions": versions(),
        "host": cpu_hardware(),
        "gpu": gpu,
    }
    name = f"gpu-{gpu['name']}" if gpu is not None else "gpu-rehearsed-on-a-cpu"
    results = results_file(arguments.output_dir, name)
    if arguments.rehearse:
        cases = [rehearsed(case) for case in cases]
    cases = remaining(cases, _earlier(results, shared))
    with tempfile.TemporaryDirectory(prefix="qlora-gpu-suite-") as directory:
        suite = Suite(arguments, Path(directory), results, shared)
        statuses = suite.run(cases, arguments.workers or _num_workers(gpu))
    print(f"Written to {results}")
    return 0 if set(statuses) <= {"done", "left out"} else 1


def _earlier(results: Path, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of earlier runs of the same revision on the same GPU, also those of other days."""
    files = sorted(results.parent.glob(f"{results.stem[: -len('-YYYY-MM-DD')]}-*.jsonl"))
    records = [record for record in read(files) if record.get("benchmark") == "gpu_suite"]
    return [record for record in records if record["revision"] == shared["revision"]]


def _num_workers(gpu: dict[str, Any] | None) -> int:
    """Return how many cases run at a time on a GPU of this size."""
    if gpu is None or gpu["memory_bytes"] is None:
        return 1
    return int(min(MOST_WORKERS, max(1, gpu["memory_bytes"] // WORKER_BYTES)))


if __name__ == "__main__":
    sys.exit(main())
