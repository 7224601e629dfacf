"""Turn the traced step of `qlora train` into milliseconds on a GPU: where they go, and how far that is from a floor.

    python benchmarks/cost_of_a_step.py --models llama-3.1-8b --gpus "RTX 4090" --lengths 2048 --tables

Nothing is measured: FLOPs, bytes and launches are those of the operations that `qlora inspect-memory` traces, the
rates of the GPUs are those of `qlora_cli/timing/rates.py`, and an operation takes as long as its arithmetic or its
traffic, whichever is longer. The floor is 4 (N + V H) FLOPs a token at that rate: each weight of the base and of the
head, forward and backward. `published_algorithm.py` is the step that a traced one is compared with.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published_algorithm import StepShape, floor_flops, published_operations, shape_of
from benchmarks.records import RESULTS, append, now, results_file, revision, versions
from qlora_cli.errors import QloraError, UsageError
from qlora_cli.memory.catalogue import CatalogueModel, find_in_catalogue, nearest_names
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import GPUS, Gpu, find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.prediction import Estimate
from qlora_cli.memory.traced_run import TracedRun
from qlora_cli.quantization.methods.skip_modules import fused_experts
from qlora_cli.settings.choices import Checkpointing, Dtype
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.timing.operation import Counted, Operation, OperationKind, Pass
from qlora_cli.timing.rates import Rates, rates_of
from qlora_cli.timing.roofline import cost_of
from qlora_cli.units import GIB

MODES = tuple(mode for mode in Checkpointing if mode != Checkpointing.AUTO)
SAME_MEMORY = 1.02  # times that with whole layers recomputed


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step: a model on a GPU, `rows` of `length` tokens."""

    model: CatalogueModel
    gpu: Gpu
    length: int
    rows: int
    rank: int

    @property
    def rates(self) -> Rates:
        """What the GPU is assumed to sustain."""
        rates = rates_of(self.gpu.card, self.gpu.num_sms)
        assert rates is not None, f"{self.gpu.name} has no rates"
        return rates


@dataclass(frozen=True, kw_only=True)
class Row:
    """All operations of one kind in one pass; `seconds` are the GPU's."""

    kind: OperationKind
    run_in: Pass
    dispatches: int
    kernels: int
    flops: int
    num_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The cost of a step of one micro-batch, as a whole and by kind of operation.

    `host_seconds` are those of one core, to dispatch all operations; None where their number is unknown.
    """

    rows: tuple[Row, ...]
    device_seconds: float
    host_seconds: float | None

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.device_seconds, self.host_seconds or 0.0)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A step of `qlora train` with its memory and the names of operators that are counted by their bytes alone."""

    checkpointing: Checkpointing
    estimate: Estimate
    fits: bool
    cost: StepCost
    unknown: tuple[str, ...]


def trace(case: Case, checkpointing: Checkpointing) -> tuple[Estimate, TracedRun, StepShape]:
    """Return the prediction, the operations and the shape of a step.

    Raises:
        UsageError: the model is not a dense decoder whose layers are like Llama's, as floor and comparison assume.
    """
    facts = ModelFacts(name=case.model.name, content=deepcopy(dict(case.model.config)))
    settings = EstimateSettings.model_validate(
        {
            "model": {"name": case.model.name},
            "lora": {"rank": case.rank},
            "data": {"max_length": case.length},
            "training": {
                "micro_batch_size": case.rows,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": checkpointing,
            },
        }
    )
    estimator = Estimator(facts, evaluates=False)
    shapes = estimator.shapes(settings, Dtype.BF16)
    if any(True for _ in fused_experts(shapes)) or not hasattr(shapes.config, "intermediate_size"):
        raise UsageError(
            f"{case.model.name} is no dense decoder with layers like Llama's, with which the step is compared",
            hint="Name another model, such as llama-3.1-8b.",
        )
    shape = shape_of(shapes, rank=case.rank, rows=case.rows, length=case.length)
    return estimator.estimate(settings, case.gpu), estimator.traced(settings, case.gpu), shape


def step_cost(operations: Counted, rates: Rates, *, host_bytes: int = 0, is_dispatched: bool = True) -> StepCost:
    """Return the cost of operations; not `is_dispatched`: they are known by arithmetic, without the host's part.

    `host_bytes` are copied from or to the host.
    """
    groups: dict[tuple[OperationKind, Pass], list[tuple[int, Operation]]] = {}
    for times, operation in operations:
        groups.setdefault((operation.kind, operation.run_in), []).append((times, operation))
    rows = tuple(
        Row(
            kind=kind,
            run_in=run_in,
            dispatches=sum(times for times, _ in group),
            kernels=sum(times * operation.kernels for times, operation in group),
            flops=sum(times * operation.flops for times, operation in group),
            num_bytes=sum(times * operation.num_bytes for times, operation in group),
            seconds=cost_of(group, rates).device_seconds,
        )
        for (kind, run_in), group in groups.items()
    )
    cost = cost_of(operations, rates, host_bytes=host_bytes)
    return StepCost(
        rows=rows, device_seconds=cost.device_seconds, host_seconds=cost.host_seconds if is_dispatched else None
    )


def traced_costs(case: Case, modes: Sequence[Checkpointing] = MODES) -> tuple[list[Traced], StepCost, float]:
    """Return the cost with each kind of checkpointing, that of the published algorithm, and the floor in seconds."""
    traced = []
    for mode in modes:
        estimate, run, shape = trace(case, mode)
        operations = (*run.micro_batch, *run.update)
        traced.append(
            Traced(
                checkpointing=mode,
                estimate=estimate,
                fits=estimate.predicted.process_bytes <= case.gpu.usable_bytes,
                cost=step_cost(operations, case.rates, host_bytes=2 * run.pinned_host_bytes),
                unknown=tuple(sorted({operation.operator for _, operation in operations if not operation.is_known})),
            )
        )
    published = (*((1, operation) for operation in published_operations(shape)), *run.update)
    return traced, step_cost(published, case.rates, is_dispatched=False), floor_flops(shape) / case.rates.flops


def print_case(case: Case, traced: Sequence[Traced], published: StepCost, floor_seconds: float) -> None:
    """Print a line for each kind of checkpointing, and the ratios to the published algorithm."""
    rates = case.rates
    print(
        f"\n{case.model.name}, rank {case.rank}, {case.rows} x {case.length:,} tokens, {case.gpu.name} "
        f"({rates.flops / 1e12:.0f} TFLOP/s, {rates.num_bytes / 1e12:.2f} TB/s assumed)"
    )
    print(f"  {'checkpointing':28}{'memory':>11}{'GPU':>10}{'host':>9}{'tokens/s':>10}{'of floor':>10}")
    tokens = case.rows * case.length
    for step in traced:
        host = f"{1000 * (step.cost.host_seconds or 0):.0f} ms"
        memory = f"{step.estimate.predicted.allocated_bytes / GIB:.1f} GiB{' ' if step.fits else '!'}"
        print(
            f"  {step.checkpointing.value:28}{memory:>11}{1000 * step.cost.device_seconds:>7.0f} ms{host:>9}"
            f"{tokens / step.cost.seconds:>10,.0f}{floor_seconds / step.cost.seconds:>10.0%}"
        )
    print(
        f"  {'published algorithm':28}{'':>11}{1000 * published.seconds:>7.0f} ms{'':>9}"
        f"{tokens / published.seconds:>10,.0f}{floor_seconds / published.seconds:>10.0%}"
    )
    print(f"  {'floor':28}{'':>11}{1000 * floor_seconds:>7.0f} ms{'':>9}{tokens / floor_seconds:>10,.0f}")
    recomputed = min(step.estimate.predicted.allocated_bytes for step in traced)
    no_more = [step for step in traced if step.estimate.predicted.allocated_bytes <= SAME_MEMORY * recomputed]
    ratios = [
        f"{published.seconds / fastest.cost.seconds:.2f} x {where} ({fastest.checkpointing.value})"
        for where, steps in (("at equal memory", no_more), ("with what fits", [step for step in traced if step.fits]))
        if steps
        for fastest in [min(steps, key=lambda step: step.cost.seconds)]
    ]
    print(f"  tokens/s against the published algorithm: {', '.join(ratios)}")
    if unknown := sorted({name for step in traced for name in step.unknown}):
        print(f"  counted by their bytes alone: {', '.join(unknown)}")


def print_table(title: str, cost: StepCost) -> None:
    """Print a line for each kind of operation and pass."""
    print(f"\n  {title:26}{'pass':10}{'launches':>9}{'TFLOP':>8}{'GB':>8}{'ms':>9}{'share':>7}")
    for row in sorted(cost.rows, key=lambda row: -row.seconds):
        print(
            f"  {row.kind.value:26}{row.run_in.value:10}{row.kernels:>9,}{row.flops / 1e12:>8.2f}"
            f"{row.num_bytes / 1e9:>8.1f}{1000 * row.seconds:>9.1f}{row.seconds / cost.device_seconds:>7.1%}"
        )


def record_of(case: Case, name: str, cost: StepCost, floor_seconds: float, **more: Any) -> dict[str, Any]:
    """Return the line of a results file for one step."""
    return {
        "benchmark": "cost_of_a_step",
        "time": now(),
        "model": case.model.name,
        "gpu": case.gpu.name,
        "assumed_rates": asdict(case.rates),
        "length": case.length,
        "micro_batch_size": case.rows,
        "rank": case.rank,
        "step": name,
        "device_seconds": cost.device_seconds,
        "host_seconds": cost.host_seconds,
        "floor_seconds": floor_seconds,
        "share_of_floor": floor_seconds / cost.seconds,
        "tokens_per_second": case.rows * case.length / cost.seconds,
        **more,
        "operations": [asdict(row) for row in cost.rows],
    }


def run(case: Case, results: Path, context: dict[str, Any], *, tables: bool) -> None:
    """Trace, print and record one case."""
    traced, published, floor_seconds = traced_costs(case)
    print_case(case, traced, published, floor_seconds)
    for step in traced:
        more = {
            "allocated_bytes": step.estimate.predicted.allocated_bytes,
            "process_bytes": step.estimate.predicted.process_bytes,
            "fits": step.fits,
            "ratio_to_published": published.seconds / step.cost.seconds,
            "counted_by_bytes_alone": step.unknown,
        }
        name = f"checkpointing {step.checkpointing.value}"
        append(results, record_of(case, name, step.cost, floor_seconds, **more) | context)
        if tables:
            print_table(name, step.cost)
    append(results, record_of(case, "published algorithm", published, floor_seconds) | context)
    if tables:
        print_table("published algorithm", published)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = ("RTX 4090", "A100 80GB", "H100 SXM", "H200")
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b", "qwen3-8b"], help="names of the catalogue")
    parser.add_argument(
        "--gpus", nargs="+", default=gpus, choices=[gpu.name for gpu in GPUS], help="default: %(default)s"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192], help="tokens of a row")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1], help="rows of a micro-batch (default: 1)")
    parser.add_argument("--rank", type=int, default=16, help="default: 16")
    parser.add_argument("--tables", action="store_true", help="print where the milliseconds of each step go")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the results file goes")
    return parser.parse_args()


def find_model(name: str) -> CatalogueModel:
    """Return a model of the catalogue.

    Raises:
        UsageError: there is none of this name.
    """
    model = find_in_catalogue(name)
    if model is None:
        nearest = ", ".join(nearest_names(name)) or "llama-3.1-8b, qwen3-8b"
        raise UsageError(f"no model {name!r} in the catalogue", hint=f"It has, for example, {nearest}.")
    return model


def main() -> int:
    """Trace and print each case; the exit code is 2 for a model or a length that can't be traced."""
    arguments = parse_arguments()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    results = results_file(arguments.output_dir, "cost_of_a_step")
    context = {"versions": versions(), "revision": revision()}
    try:
        for name, gpu, length, rows in product(
            arguments.models, arguments.gpus, arguments.lengths, arguments.micro_batches
        ):
            case = Case(model=find_model(name), gpu=find_gpu(gpu), length=length, rows=rows, rank=arguments.rank)
            run(case, results, context, tables=arguments.tables)
    except QloraError as error:
        print(f"{error}\n{error.hint or ''}", file=sys.stderr)
        return 2
    print(f"\nWritten to {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
