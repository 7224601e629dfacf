"""Time `qlora inspect-memory` from the shell, with and without a cached prediction, against importing its libraries.

    python benchmarks/inspect_memory.py [--repeats 3] [--models llama-3.1-8b ...]

Medians in seconds, of the clock and, in brackets, of all cores. A new prediction begins with an empty cache; a known
one is in the cache. The imports of torch, transformers, bitsandbytes and PEFT are the floor of a new prediction.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.records import RESULTS, append, cpu_hardware, now, results_file, revision, versions

MODELS = ("llama-3.1-8b", "llama-3.1-70b", "qwen3-235b-a22b")
GPUS = ("24GB", "H100 PCIe")
IMPORTS = "import torch, transformers, bitsandbytes, peft; from transformers import AutoModelForCausalLM"


def seconds(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """Return how long a command takes, and of how much CPU; exit code 3 counts as success."""
    start, before = time.perf_counter(), _cpu_seconds()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=False)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr.decode()[-500:]}")
    return time.perf_counter() - start, _cpu_seconds() - before


def _cpu_seconds() -> float:
    """Return the CPU time of the commands that have ended, with that of their own processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def medians(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the median of each kind of time."""
    clock, cpu = zip(*times, strict=True)
    return statistics.median(clock), statistics.median(cpu)


def measure(model: str, options: Sequence[str], repeats: int) -> dict[str, float]:
    """Return the medians for a new prediction, and for the same one from the cache."""
    command = [str(Path(sys.executable).parent / "qlora"), "inspect-memory", model, *options]
    new, known = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            new.append(seconds(command, {"QLORA_CACHE": folder}))
            known.append(seconds(command, {"QLORA_CACHE": folder}))
    (new_seconds, new_cpu), (known_seconds, _) = medians(new), medians(known)
    return {"new_seconds": new_seconds, "new_cpu_seconds": new_cpu, "known_seconds": known_seconds}


def main() -> None:
    """Measure, print, and append to a results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    floor, floor_cpu = medians([seconds([sys.executable, "-c", IMPORTS], {}) for _ in range(arguments.repeats)])
    print(f"{'imports alone':44} {floor:6.2f} s ({floor_cpu:.2f})")
    results = results_file(arguments.output_dir, "inspect_memory")
    for model in arguments.models:
        for options in ([], *(["--gpu", gpu] for gpu in GPUS)):
            figures = measure(model, options, arguments.repeats)
            label = " ".join([model, *options])
            new, cpu = figures["new_seconds"], figures["new_cpu_seconds"]
            ratio, cached = f"{new / floor:.2f} x imports", f"cached {figures['known_seconds']:.2f} s"
            print(f"{label:44} {new:6.2f} s ({cpu:.2f}), {ratio}; {cached}")
            append(
                results,
                {
                    "benchmark": "inspect_memory",
                    "time": now(),
                    "revision": revision(),
                    "versions": versions(),
                    "host": cpu_hardware(),
                    "load_average": os.getloadavg()[0],
                    "model": model,
                    "options": options,
                    "imports_seconds": floor,
                    "imports_cpu_seconds": floor_cpu,
                    **figures,
                },
            )


if __name__ == "__main__":
    main()
