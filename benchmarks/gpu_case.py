"""Run one case of the GPU suite in this process and write the measurements; `gpu_suite` starts it.

Each case has its own process: peaks start at zero, and a case that runs out of memory affects no other.
"""

import argparse
import faulthandler
import json
import signal
import statistics
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import Case
from benchmarks.gpu_kernels import kernels_of
from benchmarks.gpu_profile import StepProfiler
from benchmarks.load_case import load_with_qlora
from benchmarks.synthetic import write_rows
from qlora_cli.events import Event, Reporters, StepDone
from qlora_cli.runs.run_result import TrainResult
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from qlora_cli.training.train_run import train

SAMPLE_SECONDS = 0.02


class Recorder:
    """Records the steps of a run."""

    def __init__(self) -> None:
        self.steps: list[StepDone] = []

    def report(self, event: Event) -> None:
        """Record a step."""
        if isinstance(event, StepDone):
            self.steps.append(event)


class ProcessPeak:
    """The largest use of the GPU while this process ran, in bytes, minus what was in use before.

    This is the driver's figure: the allocator's pool and the CUDA context. Other programs on the GPU would count.
    """

    def __init__(self, used_before_bytes: int) -> None:
        self._used_before = used_before_bytes
        self._stop = threading.Event()
        self.peak_bytes = 0

    def sample(self) -> None:
        """Sample once."""
        free, total = torch.cuda.mem_get_info()
        self.peak_bytes = max(self.peak_bytes, total - free - self._used_before)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.sample()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample every few milliseconds while the block runs."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self.sample()


def run_case(
    case: Case, model: Path | None, device: str, directory: Path, used_before_bytes: int | None
) -> dict[str, Any]:
    """Load and train, or time kernels, according to `case`; times in seconds, sizes in bytes."""
    if model is None:
        return kernels_of(device)
    if not case.num_steps:
        return load_only(case, model, device)
    resolved = _settings(case, model, device, directory)
    recorder, profiler = Recorder(), StepProfiler(case.num_steps)
    reporter = Reporters([recorder, profiler]) if case.is_profiled else recorder
    if device == "cpu" or used_before_bytes is None:
        result, process_peak = train(resolved, reporter), None
    else:
        watcher = ProcessPeak(used_before_bytes)
        with watcher.watching():
            result = train(resolved, reporter)
        process_peak = watcher.peak_bytes
    run = json.loads((resolved.settings.output.directory / "run.json").read_text(encoding="utf-8"))
    return {
        "load_seconds": run["base_model"]["load_seconds"],
        "load_peak_allocated_bytes": run["base_model"]["peak_device_bytes"],
        "base_model_bytes": run["base_model"]["total_bytes"],
        **(steps := _steps(case, recorder.steps[: case.num_steps])),
        "profile": profiler.figures(steps["step_seconds"]),
        "peak_allocated_bytes": result.peak_memory.device_allocated_bytes,
        "peak_reserved_bytes": result.peak_memory.device_reserved_bytes,
        "peak_process_bytes": process_peak,
        "peak_host_bytes": result.peak_memory.host_bytes,
        "memory": _compared(result),
        "train_seconds": result.train_seconds,
        "total_seconds": result.total_seconds,
        "plan": run["plan"] | {"model": case.size, "output": None},
    }


def _compared(result: TrainResult) -> dict[str, Any] | None:
    """Return predicted and measured memory side by side, errors in percent; None without a GPU."""
    predicted, measured = result.predicted_memory, result.peak_memory
    if predicted is None or measured.device_allocated_bytes is None or measured.device_reserved_bytes is None:
        return None
    pairs = {
        "allocated": (predicted.allocated_bytes, measured.device_allocated_bytes),
        "reserved": (predicted.reserved_bytes, measured.device_reserved_bytes),
    }
    return {
        name: {"predicted_bytes": before, "measured_bytes": after, "error_percent": 100 * (before / after - 1)}
        for name, (before, after) in pairs.items()
    }


def load_only(case: Case, model: Path, device: str) -> dict[str, Any]:
    """Load according to `case` and return the figures; those on the device's peak are None without a GPU."""
    figures = load_with_qlora(model, {**case.settings, "model.device": device})
    peak, most = figures["peak_device_bytes"], figures["device_model_bytes"] + figures["one_tensor_bytes"]
    return {
        **figures,
        "peak_within_one_16_bit_tensor": None if peak is None else peak <= most,
        "peak_within_prediction": None if peak is None else peak <= figures["needed_bytes"],
    }


def _settings(case: Case, model: Path, device: str, directory: Path) -> Resolved[TrainSettings]:
    num_steps = case.num_steps + case.is_profiled
    values = {
        "data.max_length": 1024,
        "training.micro_batch_size": 1,
        "training.gradient_accumulation_steps": 1,
        **case.settings,
        "model.name": str(model),
        "model.device": device,
        "data.dataset": str(directory / "train.jsonl"),
        "training.max_steps": num_steps,
        "output.directory": str(directory / "run"),
    }
    num_rows = values["training.micro_batch_size"] * values["training.gradient_accumulation_steps"] * num_steps
    # Each packed row consists of four short ones.
    share = 4 if values.get("data.packing") else 1
    num_tokens = values["data.max_length"] // share
    write_rows(directory / "train.jsonl", model, num_rows=num_rows * share, num_tokens=num_tokens)
    return resolve(Sources(flags={path: (path, value) for path, value in values.items()}), TrainSettings)


def _steps(case: Case, steps: list[StepDone]) -> dict[str, Any]:
    """Return the time of each step, and median time and tokens per second of those after warm-up."""
    ends = [0.0, *(step.elapsed_seconds for step in steps)]
    tokens = [0, *(step.num_tokens for step in steps)]
    seconds = [end - start for start, end in pairwise(ends)]
    counted = slice(case.num_warmup_steps, None)
    return {
        "step_seconds": statistics.median(seconds[counted]),
        "tokens_per_second": (tokens[-1] - tokens[case.num_warmup_steps]) / sum(seconds[counted]),
        "all_step_seconds": seconds,
        "all_step_tokens": [after - before for before, after in pairwise(tokens)],
        "all_losses": [step.loss for step in steps],
    }


def _device(device: str) -> dict[str, Any]:
    """Return the properties of the device that PyTorch reports."""
    if device == "cpu":
        return {"name": "cpu", "num_threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}


def main() -> None:
    """Run the case given as JSON and write `result.json`; a failure is a result as well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", required=True, help="the case, as JSON")
    parser.add_argument("--model", type=Path, help="the model; without it, kernels are timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--directory", type=Path, required=True, help="where rows, run and result go")
    parser.add_argument(
        "--used-before-bytes",
        type=int,
        help="GPU memory in use before this process; without it, the process peak is not measured",
    )
    arguments = parser.parse_args()
    case = Case(**json.loads(arguments.case))
    faulthandler.register(signal.SIGUSR1)  # the suite asks a case that takes too long where it is
    record: dict[str, Any] = {"case": asdict(case)}
    try:
        figures = run_case(case, arguments.model, arguments.device, arguments.directory, arguments.used_before_bytes)
        record |= {"status": "done", **figures, "device": _device(arguments.device)}
    except Exception as error:  # noqa: BLE001 - whatever ends a case is its result; the suite continues
        traceback.print_exc()
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    (arguments.directory / "result.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
