"""Compare `qlora train` with `trl sft` on the CPU: one model, data and shape, in one run.

A 107M Llama with random weights in NF4 with double quantization, LoRA of rank 16 on all linear layers,
batches of 2 rows of 512 tokens. The programs run in turn, each in a process of its own. Both are counted
alike: tokens fed, without padding, over the seconds of the training loop, without loading and checkpoints.
`trl sft` runs in its CPU-capable setting, fp32, with its own defaults elsewhere.
"""

import argparse
import ast
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measured import Finished, run_measured, write_model_in_process
from benchmarks.records import RESULTS, ROOT, append, cpu_hardware, now, results_file, revision, versions
from benchmarks.synthetic import SHAPES, num_parameters, write_rows
from qlora_cli.units import format_bytes

MODEL_SIZE = "107m"
MAX_LENGTH = 512
RANK = 16
BATCH_SIZE = 2
BASELINE = "trl"
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The paths of a run: its model, its data and its output."""

    model: Path
    data: Path
    output: Path


@dataclass(frozen=True, kw_only=True)
class Program:
    """One contestant: a program in one setting."""

    name: str
    title: str
    arguments: tuple[str, ...] = ()
    all_threads: bool = False

    @property
    def is_trl(self) -> bool:
        """Whether this is `trl sft`."""
        return self.name.startswith(BASELINE)


PROGRAMS = (
    Program(name=BASELINE, title="trl sft, fp32"),
    Program(name="qlora-auto", title="qlora train", arguments=("--dtype", "auto")),
    Program(name="qlora-fp32", title="qlora train --dtype fp32", arguments=("--dtype", "fp32")),
    # `trl sft` starts its script with one thread; this gives it every core.
    Program(name="trl-all-threads", title="trl sft, fp32, OMP_NUM_THREADS = cores", all_threads=True),
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run of one program."""

    num_tokens: int
    train_seconds: float
    tokens_per_second: float
    peak_host_bytes: int
    wall_seconds: float
    cpu_seconds: float
    compute_dtype: str


def command_of(program: Program, paths: Paths, num_steps: int) -> list[str]:
    """Return the command line of one run."""
    if program.is_trl:
        return _trl_command(paths, num_steps)
    return [
        *(sys.executable, "-m", "qlora_cli", "train", "--json"),
        *("--model", str(paths.model), "--dataset", str(paths.data), "--output", str(paths.output)),
        *("--rank", str(RANK), "--max-length", str(MAX_LENGTH), "--max-steps", str(num_steps)),
        *("--micro-batch-size", str(BATCH_SIZE), "--gradient-accumulation-steps", "1", "--accept-lost"),
        *program.arguments,
    ]


def _trl_command(paths: Paths, num_steps: int) -> list[str]:
    return [
        *(str(Path(sys.executable).with_name("trl")), "sft"),
        *("--model_name_or_path", str(paths.model), "--dataset_name", str(paths.data.parent)),
        *("--output_dir", str(paths.output), "--load_in_4bit", "--bnb_4bit_quant_type", "nf4"),
        *("--use_bnb_nested_quant", "--use_peft", "--lora_r", str(RANK), "--lora_target_modules", "all-linear"),
        *("--use_cpu", "--bf16", "False", "--dtype", "float32"),
        *("--max_length", str(MAX_LENGTH), "--max_steps", str(num_steps)),
        *("--per_device_train_batch_size", str(BATCH_SIZE), "--gradient_accumulation_steps", "1"),
        *("--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "True"),
        *("--save_strategy", "no"),
    ]


def measure(program: Program, paths: Paths, num_steps: int, timeout_seconds: float) -> Measurement:
    """Run `program` once.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    environment = dict(ENVIRONMENT)
    if program.all_threads:
        environment["OMP_NUM_THREADS"] = str(os.cpu_count())
    command = command_of(program, paths, num_steps)
    finished = run_measured(command, environment=environment, timeout_seconds=timeout_seconds)
    if finished.exit_code != 0:
        raise RuntimeError(f"{program.title} ended with {finished.exit_code}:\n{finished.stderr[-3000:]}")
    num_tokens, seconds, dtype = _read_trl(finished) if program.is_trl else _read_qlora(finished, paths)
    return Measurement(
        num_tokens=num_tokens,
        train_seconds=seconds,
        tokens_per_second=num_tokens / seconds,
        peak_host_bytes=finished.peak_host_bytes,
        wall_seconds=finished.wall_seconds,
        cpu_seconds=finished.cpu_seconds,
        compute_dtype=dtype,
    )


def _read_trl(finished: Finished) -> tuple[int, float, str]:
    """Return tokens and seconds from the metrics that the trainer prints."""
    metrics: dict[str, Any] = {}
    for line in re.findall(r"^\{'.*\}$", finished.stdout, re.MULTILINE):
        metrics |= ast.literal_eval(line)
    return int(metrics["num_tokens"]), float(metrics["train_runtime"]), "fp32"


def _read_qlora(finished: Finished, paths: Paths) -> tuple[int, float, str]:
    result = json.loads(finished.stdout)
    run = json.loads((paths.output / "run.json").read_text(encoding="utf-8"))
    # The seconds of the steps: without the checkpoint, which the other program does not write.
    seconds = result["num_tokens"] / result["tokens_per_second"]
    return int(result["num_tokens"]), seconds, str(run["plan"]["compute_dtype"])


def prepare(directory: Path, num_rows: int) -> Paths:
    """Make the model and its data."""
    paths = Paths(model=directory / "model", data=directory / "data" / "train.jsonl", output=directory / "runs")
    write_model_in_process(sys.executable, MODEL_SIZE, paths.model, environment=ENVIRONMENT)
    paths.data.parent.mkdir()
    paths.output.mkdir()
    write_rows(paths.data, paths.model, num_rows=num_rows, num_tokens=MAX_LENGTH)
    os.sync()  # otherwise the first program to flush a file would wait for the model's bytes
    return paths


def compare(arguments: argparse.Namespace, programs: Sequence[Program], results: Path) -> dict[str, list[Measurement]]:
    """Run every program `--repeats` times, in turn, and record each run."""
    measured: dict[str, list[Measurement]] = {program.name: [] for program in programs}
    context = {"hardware": cpu_hardware(), "versions": versions(), "revision": revision()}
    with tempfile.TemporaryDirectory(prefix="qlora-benchmark-") as directory:
        paths = prepare(Path(directory), num_rows=BATCH_SIZE * arguments.steps)
        for repeat in range(arguments.repeats):
            for program in programs:
                output = paths.output / f"{program.name}-{repeat}"
                run_paths = Paths(model=paths.model, data=paths.data, output=output)
                load_average = os.getloadavg()[0]
                measurement = measure(program, run_paths, arguments.steps, arguments.timeout)
                measured[program.name].append(measurement)
                command = [word.replace(directory, "DIR") for word in command_of(program, run_paths, arguments.steps)]
                record = {
                    "benchmark": "cpu_vs_trl",
                    "time": now(),
                    "program": program.name,
                    "repeat": repeat,
                    **asdict(measurement),
                    "load_average_before": load_average,
                    "num_parameters": num_parameters(SHAPES[MODEL_SIZE]),
                    "command": [Path(command[0]).name, *command[1:]],
                    **context,
                }
                append(results, record)
                _print_measurement(program, measurement)
    return measured


def _print_measurement(program: Program, measurement: Measurement) -> None:
    print(
        f"{program.title:40} {measurement.compute_dtype:5} {measurement.tokens_per_second:8.1f} tokens/s"
        f"   peak {format_bytes(measurement.peak_host_bytes)}",
        flush=True,
    )


def summarize(measured: dict[str, list[Measurement]]) -> list[dict[str, Any]]:
    """Return, for each program but the baseline, its median ratio to the baseline run of the same turn."""
    baseline = measured[BASELINE]
    ratios = []
    for name, runs in measured.items():
        if name == BASELINE:
            continue
        pairs = list(zip(runs, baseline, strict=True))
        ratios.append(
            {
                "benchmark": "cpu_vs_trl",
                "program": name,
                "baseline": BASELINE,
                "speed_ratio": statistics.median(
                    run.tokens_per_second / base.tokens_per_second for run, base in pairs
                ),
                "memory_ratio": statistics.median(run.peak_host_bytes / base.peak_host_bytes for run, base in pairs),
                "num_pairs": len(pairs),
            }
        )
    return ratios


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [program.name for program in PROGRAMS]
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a run (default: 6)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each program (default: 2)")
    parser.add_argument("--programs", nargs="+", choices=names, default=names, help="which to run (default: all)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one run may take (default: 900)")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the results file goes")
    return parser.parse_args()


def main() -> int:
    """Compare and print; the exit code is 1 if a program failed."""
    arguments = parse_arguments()
    programs = [program for program in PROGRAMS if program.name in {BASELINE, *arguments.programs}]
    results = results_file(arguments.output_dir, "cpu_vs_trl")
    try:
        measured = compare(arguments, programs, results)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for summary in summarize(measured):
        append(results, {**summary, "time": now()})
        print(
            f"{summary['program']} / {BASELINE}: {summary['speed_ratio']:.2f} x the tokens/s, "
            f"{summary['memory_ratio']:.2f} x the peak memory (median of {summary['num_pairs']} pairs)"
        )
    print(f"Written to {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
