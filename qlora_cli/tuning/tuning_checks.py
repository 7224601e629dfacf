"""What a search can't be combined with, and the settings of the run that its trials are parts of. Imports no torch."""

from qlora_cli.errors import OutputDirectoryError, Problem, QloraError, SettingsError
from qlora_cli.events import Noted, Reporter
from qlora_cli.files import check_output_directory, path_problem
from qlora_cli.runs.directory import RunDirectory, has_only_startup_files
from qlora_cli.settings.models import TrainSettings, field_of
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import InferredSettings, inferred_origin, settle
from qlora_cli.tuning.tuning_record import RECORD_FILE, read_tune_record

EVAL_SPLIT, HELD_OUT = "data.eval_split", "10%"  # of the rows, if the run holds none out
TRIAL_FOLDER = "trial"  # in the output directory: not made, but checked as that of a run
OF_TRIALS = inferred_origin("qlora tune")
# What a run does besides learning, which no trial does.
LEFT_TO_THE_RUN = (
    "output.resume",
    "output.report_to",
    "output.push_to_hub",
    "training.eval_steps",
    "training.save_steps",
    "training.early_stopping_patience",
    "training.load_best_model_at_end",
    "training.sample_prompts",
    "training.on_nan",
    "training.auto_micro_batch",
    "training.logging_steps",
)


def check_tune(asked: Resolved[TrainSettings]) -> None:
    """Check the settings and the output directory of a search.

    Raises:
        SettingsError: with every problem.
    """
    settings = asked.settings
    refused = {
        "training.num_gpus": (
            settings.training.num_gpus > 1,
            "trials run in one process",
            "Tune on one GPU; the rate holds for several, since they share the rows of a step.",
        ),
        "training.calibrate": (
            settings.training.calibrate,
            "a base of the run's own is made by the run",
            "Tune without it; add --calibrate to the training.",
        ),
        "training.memory_budget": (
            settings.training.memory_budget is not None,
            "layers in 16 bit are chosen by the run",
            "Tune without it; add --memory-budget to the training.",
        ),
        "training.objective": (
            settings.training.objective.compares,
            "trials are judged by the loss of answers",
            "Train at several rates, and compare the held-out losses: qlora runs DIR.",
        ),
        "data.streaming": (
            settings.data.streaming,
            "trials need the same first rows, and a stream is read once",
            "Tune on a sample, such as --dataset DATA#2000.",
        ),
    }
    problems = [
        Problem(where=asked.where_of(path), message=f"can't be tuned with: {reason}", hint=hint)
        for path, (is_refused, reason, hint) in refused.items()
        if is_refused
    ]
    if (error := output_error(asked)) is not None:
        problems.append(asked.problem("output.directory", error))
    if problems:
        raise SettingsError(problems)


def output_error(asked: Resolved[TrainSettings]) -> QloraError | None:
    """Return why a search can't write into its directory, or go on there."""
    directory = asked.settings.output.directory
    if (problem := path_problem(directory)) is not None:
        return problem
    if RunDirectory(directory).is_run:
        return OutputDirectoryError(f"{directory} holds a run", hint="Choose another --output.")
    if not directory.is_dir() or has_only_startup_files(directory, is_copying=False):
        return None
    if not (directory / RECORD_FILE).exists():
        return check_output_directory(directory)
    try:
        read_tune_record(directory)
    except OutputDirectoryError as error:
        return error
    return None


def run_of_trials(asked: Resolved[TrainSettings], reporter: Reporter) -> Resolved[TrainSettings]:
    """Return the settings of the run without what trials leave to it, and with held-out rows."""
    values: dict[str, object] = {
        path: field_of(path).get_default(call_default_factory=True) for path in LEFT_TO_THE_RUN
    }
    values["output.directory"] = asked.settings.output.directory / TRIAL_FOLDER
    fixed = InferredSettings(values=values, origin=OF_TRIALS, is_fixed=True)
    return settle(asked, [fixed, *held_out_settings(asked, reporter)])


def held_out_settings(asked: Resolved[TrainSettings], reporter: Reporter) -> list[InferredSettings]:
    """Return the rows to hold out, if the run holds out none."""
    data = asked.settings.data
    if data.eval_dataset is not None or data.eval_split is not None:
        return []
    message = f"no rows are held out: {HELD_OUT} of them are, to measure on (--eval-split)"
    reporter.report(Noted(message=message))
    return [InferredSettings(values={EVAL_SPLIT: HELD_OUT}, origin=OF_TRIALS)]
