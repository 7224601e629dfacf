"""What comes after a command, as commands to type."""

from shlex import join

from qlora_cli.cli.volume import command
from qlora_cli.evaluating.evaluation_result import Evaluation
from qlora_cli.merging.merge_result import MergeResult
from qlora_cli.runs.run_result import TrainResult
from qlora_cli.settings.choices import ExportFormat
from qlora_cli.tuning.tuning_result import TuneResult

AFTER_PLAN = ("the same command without --dry-run",)
AFTER_PREDICTION = ("qlora train with the same settings, and --model, --dataset and --output",)
AFTER_INSPECTION = ("qlora train with the same flags, and --output",)
AFTER_DEMO = (
    "qlora inspect-memory MODEL --gpu 24GB",
    "qlora train --model MODEL --dataset FILE --output DIRECTORY",
)
AFTER_DOCTOR = ("qlora demo", "qlora inspect-memory MODEL --gpu auto")


def after_training(result: TrainResult) -> list[str]:
    """Return what to do with a run; nothing for one that was stopped, which has said how it is resumed."""
    if result.interrupted_by is not None:
        return []
    run = result.output
    return [command("chat", run), command("evaluate", run), command("merge", run)]


def after_tuning(result: TuneResult) -> list[str]:
    """Return how to train with the settings that were found."""
    return [command("train", "--config", result.settings_file, "--output", "DIRECTORY")]


def after_evaluation(result: Evaluation) -> list[str]:
    """Return how an adapter becomes a model of its own."""
    return [command("merge", result.model)] if result.adapter is not None and result.merged is None else []


def after_merge(result: MergeResult) -> list[str]:
    """Return how to run each format."""
    from qlora_cli.merging.exports.all_formats import FORMATS  # with torch, which a merge has imported

    return [join(FORMATS[ExportFormat(name)].serving(path)) for name, path in result.outputs.items()]
