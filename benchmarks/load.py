"""Compare programs that load one model in 4 bit: seconds, host memory, device memory; in one run, on CPU and GPU.

A Llama of 1.1 billion parameters with random weights, 2.1 GiB in bf16, its files in the page cache. The programs run
in turn, each in a process of its own; importing the libraries does not count.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_suite import query_gpu
from benchmarks.measured import run_measured, write_model_in_process
from benchmarks.records import RESULTS, ROOT, append, cpu_hardware, now, results_file, revision, versions
from benchmarks.synthetic import SHAPES
from qlora_cli.units import format_bytes

ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
BASELINE = "transformers"
FIGURES = ("load_seconds", "peak_host_bytes", "peak_device_bytes")


@dataclass(frozen=True, kw_only=True)
class Loader:
    """One way to load: the program of `load_case`, the checkpoint, and how OpenMP threads wait.

    The command `qlora` makes them wait passively, which alone makes a large difference on a busy machine.
    """

    name: str
    title: str
    program: str
    from_saved: bool = False
    waits_passively: bool = True


LOADERS = (
    Loader(
        name=BASELINE,
        title="from_pretrained, BitsAndBytesConfig",
        program="transformers",
        waits_passively=False,
    ),
    Loader(name="transformers-passive", title="the same, OMP_WAIT_POLICY=PASSIVE", program="transformers"),
    Loader(name="qlora", title="load_model, from bf16", program="qlora"),
    Loader(name="qlora-saved", title="load_model, from what --save wrote", program="qlora", from_saved=True),
)


def measure(arguments: Sequence[str], timeout_seconds: float, *, waits_passively: bool = True) -> dict[str, Any]:
    """Run `load_case` in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    command = [sys.executable, "-m", "benchmarks.load_case", *arguments]
    environment = {**ENVIRONMENT, **({"OMP_WAIT_POLICY": "PASSIVE"} if waits_passively else {})}
    finished = run_measured(command, environment=environment, timeout_seconds=timeout_seconds)
    if finished.exit_code != 0:
        raise RuntimeError(f"load_case ended with {finished.exit_code}:\n{finished.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return {
        **figures,
        "process_seconds": finished.wall_seconds,
        "process_peak_resident_bytes": finished.peak_host_bytes,
    }


def prepare(size: str, directory: Path, dtype: str, timeout_seconds: float) -> tuple[Path, Path]:
    """Make the model, and its quantized copy by `--save`."""
    model, saved = directory / "model", directory / "saved"
    write_model_in_process(sys.executable, size, model, environment=ENVIRONMENT)
    options = json.dumps({"model.dtype": dtype, "model.device": "cpu"})
    measure(["qlora", str(model), "--options", options, "--save", str(saved)], timeout_seconds)
    os.sync()
    return model, saved


def compare(arguments: argparse.Namespace, devices: Sequence[str], results: Path) -> dict[str, dict[str, list[Any]]]:
    """Load in every way `--repeats` times on each device, in turn, and record each load."""
    measured: dict[str, dict[str, list[Any]]] = {device: {way.name: [] for way in LOADERS} for device in devices}
    context = {
        "hardware": cpu_hardware(),
        "gpu": query_gpu() if "cuda" in devices else None,
        "versions": versions(),
        "revision": revision(),
    }
    with tempfile.TemporaryDirectory(prefix="qlora-benchmark-", dir=arguments.work_dir) as directory:
        model, saved = prepare(arguments.size, Path(directory), arguments.dtype, arguments.timeout)
        for device in devices:
            for repeat in range(arguments.repeats):
                for way in LOADERS:
                    options = {"model.dtype": arguments.dtype, "model.device": device}
                    checkpoint = saved if way.from_saved else model
                    load_average = os.getloadavg()[0]
                    command = [way.program, str(checkpoint), "--options", json.dumps(options)]
                    figures = measure(command, arguments.timeout, waits_passively=way.waits_passively)
                    measured[device][way.name].append(figures)
                    record = {
                        "benchmark": "load",
                        "time": now(),
                        "way": way.name,
                        "waits_passively": way.waits_passively,
                        "device": device,
                        "repeat": repeat,
                        "size": arguments.size,
                        **figures,
                        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")),
                        "load_average_before": load_average,
                        "command": [word.replace(directory, "DIR") for word in command],
                        **context,
                    }
                    append(results, record)
                    print(f"{device:5} {way.title:36} {describe(figures)}", flush=True)
    return measured


def describe(figures: Mapping[str, Any]) -> str:
    """Return the figures of a load, or their medians, in one line."""
    seconds, host, device = (figures[name] for name in FIGURES)
    on_device = "" if device is None else f"   device {format_bytes(int(device))}"
    return f"{seconds:7.2f} s   anonymous host memory {format_bytes(int(host))}{on_device}"


def summarize(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return, for each way, its medians and their ratios to the baseline's."""
    medians = {name: _medians(runs) for name, runs in measured.items()}
    base = medians[BASELINE]
    return [
        {
            "benchmark": "load",
            "way": name,
            "baseline": BASELINE,
            "num_loads": len(measured[name]),
            **{f"median_{figure}": value for figure, value in own.items()},
            **{f"{figure}_ratio": None if value is None else value / base[figure] for figure, value in own.items()},
        }
        for name, own in medians.items()
    ]


def _medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: None if runs[0][name] is None else statistics.median(run[name] for run in runs) for name in FIGURES}


def find_devices(asked: str) -> list[str]:
    """Return the devices to compare on: with `auto`, the CPU and a GPU, if there is one.

    Raises:
        RuntimeError: a GPU was asked for, and none is available.
    """
    if asked != "auto":
        if asked == "cuda":
            query_gpu()
        return [asked]
    return ["cpu", "cuda"] if shutil.which("nvidia-smi") else ["cpu"]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1b-small-vocabulary", help="shape of the model")
    parser.add_argument("--repeats", type=int, default=3, help="loads in each way (default: 3)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CPU, and GPU if any")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of what is not quantized")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one load may take (default: 600)")
    parser.add_argument("--work-dir", type=Path, help="where the models are made (default: the system's)")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the results file goes")
    return parser.parse_args()


def main() -> int:
    """Compare and print; the exit code is 1 if a load failed."""
    arguments = parse_arguments()
    results = results_file(arguments.output_dir, "load")
    try:
        measured = compare(arguments, find_devices(arguments.device), results)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for device, ways in measured.items():
        for summary in summarize(ways):
            append(results, {**summary, "device": device, "size": arguments.size, "time": now()})
            ratios = [f"{summary[f'{name}_ratio']:.2f} x {name}" for name in FIGURES if summary[f"{name}_ratio"]]
            medians = describe({name: summary[f"median_{name}"] for name in FIGURES})
            print(f"{device:5} {summary['way']:20} median {medians}   {', '.join(ratios)} of {BASELINE}")
    print(f"Written to {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
