"""Memory of a training on a CPU whose rows differ in length, step by step, with and without what bounds it.

oneDNN, which multiplies bf16 matrices, compiles kernels for each new shape and caches those of 1024 products; glibc
returns freed memory only from the end of the heap. `qlora` caches fewer, and returns freed memory after some batches.
The bundled model trains on rows of 5 to 165 words, four at a time, each run in its own process. The results have one
JSON line per run: the resident memory after some of the steps, and the CPU seconds of a step.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measured import run_measured
from benchmarks.records import RESULTS, ROOT, append, cpu_hardware, now, results_file, revision, versions
from qlora_cli.cli.app import CACHED_KERNELS
from qlora_cli.units import format_bytes

ASSETS = ROOT / "qlora_cli" / "demo" / "assets"
ROWS_AT_ONCE = 4
WORDS = (5, 165)
UNLIMITED = "1024"  # oneDNN's own
SHOWN_STEPS = (1, 5, 25, 50, 100, 200, 400)
WARMUP_STEPS = 5
PROGRAMS = {
    "qlora": {"capacity": CACHED_KERNELS, "is_trimmed": True, "is_fixed": False},
    "neither": {"capacity": UNLIMITED, "is_trimmed": False, "is_fixed": False},
    "cache-only": {"capacity": CACHED_KERNELS, "is_trimmed": False, "is_fixed": False},
    "trimmed-only": {"capacity": UNLIMITED, "is_trimmed": True, "is_fixed": False},
    "neither-one-length": {"capacity": UNLIMITED, "is_trimmed": False, "is_fixed": True},
}


def write_rows(path: Path, num_rows: int, *, is_fixed: bool) -> None:
    """Write rows of words of the bundled data, of one number of words if `is_fixed`."""
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(message["content"] for line in lines for message in json.loads(line)["messages"]).split()
    generator = random.Random(0)  # noqa: S311 - reproducible rows, no secret
    rows = []
    for _ in range(num_rows):
        num_words = WORDS[1] // 2 if is_fixed else generator.randint(*WORDS)
        start = 0 if is_fixed else generator.randrange(len(words) - num_words)
        rows.append(json.dumps({"text": " ".join(words[start : start + num_words])}) + "\n")
    path.write_text("".join(rows), encoding="utf-8")


def train_here(directory: Path, num_steps: int, dtype: str, *, is_trimmed: bool) -> dict[str, Any]:
    """Train in this process and return resident bytes and CPU seconds after each step."""
    from qlora_cli.events import Event, StepDone
    from qlora_cli.settings.models import TrainSettings
    from qlora_cli.settings.resolve import Sources, resolve
    from qlora_cli.training.callbacks import heap_trimming
    from qlora_cli.training.train_run import train

    if not is_trimmed:
        heap_trimming.BATCHES_BETWEEN = sys.maxsize
    host_bytes: list[int] = []
    cpu_seconds: list[float] = []

    class Recorder:
        """Records memory and time of each step."""

        def report(self, event: Event) -> None:
            """Record a step."""
            if isinstance(event, StepDone):
                host_bytes.append(event.memory.host_bytes)
                cpu_seconds.append(time.process_time())

    values = {
        "model.name": str(ASSETS / "base"),
        "model.device": "cpu",
        "model.dtype": dtype,
        "data.dataset": str(directory / "rows.jsonl"),
        "data.max_length": 512,
        "output.directory": str(directory / "run"),
        "training.micro_batch_size": ROWS_AT_ONCE,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": num_steps,
    }
    train(resolve(Sources(flags={path: (path, value) for path, value in values.items()}), TrainSettings), Recorder())
    return {"host_bytes": host_bytes, "cpu_seconds": [after - before for before, after in pairwise(cpu_seconds)]}


def run_program(name: str, num_steps: int, dtype: str) -> dict[str, Any]:
    """Return the figures of one program, in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    program = PROGRAMS[name]
    with tempfile.TemporaryDirectory(prefix="qlora-memory-growth-") as directory:
        write_rows(Path(directory) / "rows.jsonl", num_steps * ROWS_AT_ONCE, is_fixed=bool(program["is_fixed"]))
        command = [sys.executable, __file__, "--directory", directory, "--steps", str(num_steps), "--dtype", dtype]
        command += [] if program["is_trimmed"] else ["--untrimmed"]
        environment = {
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(program["capacity"]),
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        finished = run_measured(command, environment=environment, timeout_seconds=3600)
        if finished.exit_code != 0:
            raise RuntimeError(f"{name} ended with {finished.exit_code}: {finished.stderr[-2000:]}")
        steps = json.loads(Path(directory, "steps.json").read_text(encoding="utf-8"))
    return {
        "program": name,
        **program,
        "dtype": dtype,
        "num_steps": num_steps,
        "host_bytes_after_step": {
            str(step): steps["host_bytes"][step - 1] for step in SHOWN_STEPS if step <= num_steps
        },
        "cpu_seconds_per_step": statistics.fmean(steps["cpu_seconds"][WARMUP_STEPS:]),
        "peak_host_bytes": finished.peak_host_bytes,
    }


def describe(record: dict[str, Any]) -> str:
    """Return one line about a run."""
    sizes = ", ".join(f"{step}: {format_bytes(size)}" for step, size in record["host_bytes_after_step"].items())
    return f"{record['program']:18} after step {sizes}   {record['cpu_seconds_per_step']:.3f} CPU s a step"


def main() -> int:
    """Run the programs in turn and append their records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of each run (default: 100)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="compute dtype (default: bf16)")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="default: all")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the results file goes")
    # With these, train here, as one of the programs.
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--untrimmed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.directory is not None:
        steps = train_here(arguments.directory, arguments.steps, arguments.dtype, is_trimmed=not arguments.untrimmed)
        (arguments.directory / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
        return 0
    results = results_file(arguments.output_dir, "cpu_memory_growth")
    shared = {
        "benchmark": "cpu_memory_growth",
        "time": now(),
        "revision": revision(),
        "versions": versions(),
        "host": cpu_hardware(),
        "num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
    for name in arguments.programs:
        record = {**shared, "load_before": os.getloadavg()[0], **run_program(name, arguments.steps, arguments.dtype)}
        append(results, record)
        print(describe(record), flush=True)
    print(f"Written to {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
