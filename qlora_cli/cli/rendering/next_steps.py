"""What comes after a command, as commands to type."""

import math
from collections.abc import Sequence
from pathlib import Path
from shlex import join

from qlora_cli.cli.volume import command
from qlora_cli.evaluating.comparison_result import ComparedRun, RunComparison
from qlora_cli.evaluating.evaluation_result import Evaluation
from qlora_cli.merging.merge_result import MergeResult
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.ordering import Order
from qlora_cli.runs.run_result import TrainResult
from qlora_cli.runs.summary import RunSummary
from qlora_cli.settings.choices import ExportFormat
from qlora_cli.tuning.tuning_result import TuneResult

AFTER_PLAN = ("the same command without --dry-run",)
AFTER_PREDICTION = ("qlora train with the same settings, and --model, --dataset and --output",)
AFTER_INSPECTION = ("qlora train with the same flags, and --output",)
TRAIN = "qlora train --model MODEL --dataset FILE --output DIRECTORY"
AFTER_DEMO = ("qlora inspect-memory MODEL --gpu 24GB", TRAIN)
AFTER_DOCTOR = ("qlora demo", "qlora inspect-memory MODEL --gpu auto")


def after_training(result: TrainResult) -> list[str]:
    """Return what to do with a run; nothing for one that was stopped, which has said how it is resumed."""
    if result.interrupted_by is not None:
        return []
    return _with_run(result.output)


def _with_run(run: object) -> list[str]:
    """Return what to do with a run."""
    return [command("chat", run), command("evaluate", run), command("merge", run)]


def after_tuning(result: TuneResult) -> list[str]:
    """Return how to train with the settings that were found."""
    return [command("train", "--config", result.settings_file, "--output", "DIRECTORY")]


def after_list(runs: Sequence[RunSummary], by: Order) -> list[str]:
    """Return how to look at the latest run, or at the best by a figure; how to train one if there is none."""
    if not runs:
        return [TRAIN]
    return [command("runs", "show", runs[-1 if by == Order.STARTED else 0].path)]


def after_show(run: RunSummary) -> list[str]:
    """Return what to do with a run in its state."""
    match run.state:
        case "done":
            return _with_run(run.path)
        case "running":
            return [f"{command('runs', 'show', run.path)} again, while it trains"]
        case _:
            return ["the same qlora train command, which goes on where the run ended"]


def after_comparison(result: RunComparison) -> list[str]:
    """Return how the run with the lowest loss becomes a model of its own."""
    known = [run for run in result.runs if run.loss is not None]
    return [command("merge", min(known, key=_loss).path)] if known else []


def _loss(run: ComparedRun) -> float:
    return math.inf if run.loss is None else run.loss


def after_evaluation(result: Evaluation) -> list[str]:
    """Return how an adapter becomes a model of its own, how it is served, or how a model is trained.

    After a comparison with the unquantized model, also how its layers are compared.
    """
    cost = result.quantization_cost
    layers = (
        [] if cost is None else [f"{command('load', result.base_model, '--quant', cost.quantization)} --error-on FILE"]
    )
    if result.adapter is None:
        return [_train(result.model), *layers]
    return [command("merge", result.model) if result.merged is None else command("chat", result.merged), *layers]


def after_answers(model: str) -> list[str]:
    """Return how to ask further questions."""
    return [command("chat", model)]


def after_chat(model: str) -> list[str]:
    """Return how a run is measured and becomes a model of its own, or how a model is trained."""
    if RunDirectory(Path(model)).is_run:
        return [command("evaluate", model), command("merge", model)]
    return [_train(model)]


def _train(model: str) -> str:
    return f"{command('train', '--model', model)} --dataset FILE --output DIRECTORY"


def after_merge(result: MergeResult) -> list[str]:
    """Return how to run each format."""
    from qlora_cli.merging.exports.all_formats import FORMATS  # with torch, which a merge has imported

    return [join(FORMATS[ExportFormat(name)].serving(path)) for name, path in result.outputs.items()]
