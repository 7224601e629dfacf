"""Time a training step on the CPU: a plain PEFT loop, TRL's trainer, and `qlora train` with its parts on and off.

A Llama of 107M parameters with random weights in NF4 with double quantization, LoRA of rank 16 on all linear layers,
2 rows of 512 tokens, one thread. Each variant trains in a process of its own, so that its peak memory is its own, and
takes turns with the plain loop, a step each, so that whatever else slows the machine slows both alike. All train the
same adapter on the same rows: their losses have to agree within rounding.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu_step_case import BATCH_SIZE, Paths, Step, Variant, run_variant
from benchmarks.measured import write_model_in_process
from benchmarks.merge_case import write_adapter
from benchmarks.records import RESULTS, ROOT, append, cpu_hardware, now, results_file, revision, versions
from benchmarks.synthetic import SHAPES, num_parameters
from qlora_cli.units import format_bytes

LENGTH = 512
BASELINE = "plain"
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# The largest difference between the losses of two variants, relative: by the dtype of products, and what TRL's
# trainer adds by rounding the adapter to bf16.
TOLERANCES = {"fp32": 2e-5, "bf16": 5e-4}
ROUNDED_ADAPTER = 5e-4
PARTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qlora", {}),
    ("qlora-peft-layers", {"training.fused_lora": False}),
    ("qlora-checkpointed", {"training.gradient_checkpointing": "on"}),
    ("qlora-selective", {"training.gradient_checkpointing": "selective"}),
    ("qlora-compiled", {"training.torch_compile": True}),
    ("qlora-compiled-peft-layers", {"training.torch_compile": True, "training.fused_lora": False}),
)
DTYPES = ("fp32", "bf16")
VARIANTS = tuple(
    variant
    for dtype in DTYPES
    for variant in (
        Variant(name=f"plain-{dtype}", program="plain", dtype=dtype),
        Variant(name=f"trl-{dtype}", program="trl", dtype=dtype),
        *(Variant(name=f"{name}-{dtype}", program="qlora", dtype=dtype, settings=more) for name, more in PARTS),
    )
)


class Contestant:
    """A variant in its process."""

    def __init__(self, variant: Variant, paths: Paths, num_steps: int) -> None:
        self.variant = variant
        self.steps: list[Step] = []
        self._log = paths.output / "log.txt"
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=run_variant, args=(variant, paths, num_steps, theirs))
        self._process.start()
        theirs.close()

    def step(self) -> None:
        """Have it train one step.

        Raises:
            RuntimeError: it ended instead; with the end of its output.
        """
        try:
            self._connection.send("go")
            self.steps.append(self._connection.recv())
        except (EOFError, OSError) as error:
            self._process.join()
            tail = self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""
            raise RuntimeError(f"{self.variant.name} ended with {self._process.exitcode}:\n{tail}") from error

    def end(self) -> None:
        """End the process, if it still runs."""
        self._process.kill()
        self._process.join()
        self._connection.close()


@contextmanager
def contestants(variants: Sequence[Variant], paths: Paths, num_steps: int) -> Iterator[list[Contestant]]:
    """Start a process for each variant, and end all of them."""
    started: list[Contestant] = []
    try:
        for variant in variants:
            own = Paths(model=paths.model, adapter=paths.adapter, rows=paths.rows, output=paths.output / variant.name)
            started.append(Contestant(variant, own, num_steps))
        yield started
    finally:
        for contestant in started:
            contestant.end()


def prepare(directory: Path, size: str) -> Paths:
    """Make the model of a `size` of `SHAPES`, an adapter with random weights and the rows."""
    paths = Paths(
        model=directory / "model",
        adapter=directory / "adapter",
        rows=directory / "rows.jsonl",
        output=directory / "runs",
    )
    write_model_in_process(sys.executable, size, paths.model, environment=ENVIRONMENT)
    adapter = get_context("spawn").Process(target=write_adapter, args=(paths.model, paths.adapter))
    adapter.start()
    adapter.join()
    assert adapter.exitcode == 0, "the adapter could not be written"
    generator = random.Random(0)  # noqa: S311 - reproducible rows, no secret
    rows = [[generator.randrange(2, 4096) for _ in range(LENGTH)] for _ in range(BATCH_SIZE)]
    paths.rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
    return paths


def measure(variants: Sequence[Variant], paths: Paths, *, warmup: int, rounds: int) -> dict[str, list[Step]]:
    """Return the steps of each variant, which took turns.

    Raises:
        RuntimeError: one of them failed.
    """
    with contestants(variants, paths, warmup + rounds) as started:
        for _ in range(warmup + rounds):
            for contestant in started:
                contestant.step()
        return {contestant.variant.name: contestant.steps for contestant in started}


def summary_of(steps: Sequence[Step], baseline: Sequence[Step], *, warmup: int) -> dict[str, Any]:
    """Return the figures of a variant; ratios are to the step of the baseline in the same turn."""
    measured, compared = steps[warmup:], baseline[warmup:]
    num_tokens = BATCH_SIZE * LENGTH
    return {
        "tokens_per_cpu_second": num_tokens / statistics.median(step.cpu_seconds for step in measured),
        "speed_ratio": statistics.median(
            base.cpu_seconds / step.cpu_seconds for step, base in zip(measured, compared, strict=True)
        ),
        "peak_host_bytes": steps[-1].peak_host_bytes,
        "memory_ratio": steps[-1].peak_host_bytes / baseline[-1].peak_host_bytes,
        "first_losses": [step.loss for step in steps[:3]],
    }


def check_losses(steps: Mapping[str, Sequence[Step]], variants: Sequence[Variant]) -> None:
    """Check that all variants computed the same, step by step.

    Raises:
        RuntimeError: the losses of two differ by more than rounding.
    """
    baseline = steps[variants[0].name]
    for variant in variants[1:]:
        tolerance = TOLERANCES[variant.dtype] + (ROUNDED_ADAPTER if variant.program == "trl" else 0.0)
        for number, (step, base) in enumerate(zip(steps[variant.name], baseline, strict=True), start=1):
            if abs(step.loss / base.loss - 1) > tolerance:
                raise RuntimeError(
                    f"step {number}: the loss of {variant.name} is {step.loss:.5f}, that of {variants[0].name} "
                    f"{base.loss:.5f}; they train the same adapter on the same rows"
                )


def compare(variants: Sequence[Variant], paths: Paths, arguments: argparse.Namespace, results: Path) -> None:
    """Measure, check, print and record the variants of one dtype; the first is the baseline."""
    load_average = os.getloadavg()[0]
    steps = measure(variants, paths, warmup=arguments.warmup, rounds=arguments.rounds)
    for variant in variants:
        summary = summary_of(steps[variant.name], steps[variants[0].name], warmup=arguments.warmup)
        record = {
            "benchmark": "cpu_step",
            "time": now(),
            "variant": asdict(variant),
            "baseline": variants[0].name,
            **summary,
            "num_warmup_steps": arguments.warmup,
            "num_threads": arguments.threads,
            "steps": [asdict(step) for step in steps[variant.name]],
            "num_parameters": num_parameters(SHAPES[arguments.size]),
            "load_average_before": load_average,
            "hardware": cpu_hardware(),
            "versions": versions(),
            "revision": revision(),
        }
        append(results, record)
        losses = " ".join(f"{loss:.4f}" for loss in summary["first_losses"])
        print(
            f"{variant.name:32}{summary['tokens_per_cpu_second']:8.0f} tokens/CPU s {summary['speed_ratio']:6.2f} x"
            f"   peak {format_bytes(summary['peak_host_bytes']):>9} {summary['memory_ratio']:5.2f} x   loss {losses}",
            flush=True,
        )
    check_losses(steps, variants)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [variant.name for variant in VARIANTS if variant.program != BASELINE]
    size_help = "of the model (default: 107m; tiny: to try the script out)"
    parser.add_argument("--size", choices=("tiny", "107m"), default="107m", help=size_help)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each variant (default: 5)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--variants", nargs="+", choices=names, default=names, help="which to run (default: all)")
    at_once_help = "variants that take turns with the plain loop, 1 to 3.5 GiB each (default: 2)"
    parser.add_argument("--at-once", type=int, default=2, help=at_once_help)
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the results file goes")
    return parser.parse_args()


def main() -> int:
    """Compare; the exit code is 1 if a variant failed or computed something else."""
    arguments = parse_arguments()
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(arguments.threads))
    results = results_file(arguments.output_dir, "cpu_step")
    try:
        with tempfile.TemporaryDirectory(prefix="qlora-benchmark-") as directory:
            paths = prepare(Path(directory), arguments.size)
            for dtype in DTYPES:
                baseline, *others = [variant for variant in VARIANTS if variant.dtype == dtype]
                others = [variant for variant in others if variant.name in arguments.variants]
                for start in range(0, len(others), arguments.at_once):
                    group = [baseline, *others[start : start + arguments.at_once]]
                    own = replace(paths, output=paths.output / f"{dtype}-{start}")
                    compare(group, own, arguments, results)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Written to {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
