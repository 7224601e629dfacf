"""What a search leaves besides its record: the settings of the run with the rate that was found, and a page."""

from qlora_cli import __version__
from qlora_cli.files import as_json
from qlora_cli.settings.files.settings_file import in_one_line, settings_lines
from qlora_cli.settings.models import TrainSettings, metadata_of
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.run_plan import SettledRun
from qlora_cli.tuning.tuning_checks import EVAL_SPLIT, OF_TRIALS
from qlora_cli.tuning.tuning_page import tuning_page
from qlora_cli.tuning.tuning_result import TuneResult
from qlora_cli.units import counted
from qlora_cli.writing import PRIVATE_FILE, write_file

LEARNING_RATE = "training.learning_rate"


def write_tuned_files(asked: Resolved[TrainSettings], settled: SettledRun, result: TuneResult) -> None:
    """Write both, each complete or not at all.

    Raises:
        OSError: one can't be written, such as on a full disk.
    """
    write_file(result.settings_file, tuned_settings(asked, settled, result))
    write_file(result.page, tuning_page(result), mode=PRIVATE_FILE)


def tuned_settings(asked: Resolved[TrainSettings], settled: SettledRun, result: TuneResult) -> str:
    """Return a settings file of the run that was asked for, with the rate that was found; it names no output."""
    values = {
        f"{section}.{key}": value
        for section in type(asked.settings).model_fields
        for key, value in as_json(asked.given(section)).items()
    }
    values.pop("output.directory", None)
    left_out = [path for path in values if metadata_of(path).is_forbidden_in_files]
    comments = {path: asked.where_of(path) for path in values}
    if settled.resolved.origin_of(EVAL_SPLIT) == OF_TRIALS:
        values[EVAL_SPLIT] = settled.resolved.settings.data.eval_split
        comments[EVAL_SPLIT] = "held out by qlora tune, to measure on"
    values[LEARNING_RATE], comments[LEARNING_RATE] = result.learning_rate, measured_on(result)
    head = [f"# By qlora tune, version {__version__}: for qlora train --config."]
    head += [f"# Not in a file, but needed: {asked.where_of(path)}" for path in left_out]
    kept = {path: value for path, value in values.items() if path not in left_out}
    return "\n".join([*map(in_one_line, head), *settings_lines(kept, comments)]) + "\n"


def measured_on(result: TuneResult) -> str:
    """Return what the rate was measured on, in words."""
    best = next(trial for trial in reversed(result.trials) if trial.verdict == "best")
    stderr = "" if best.loss_stderr is None else f" ± {best.loss_stderr:.4f}"
    rows = counted(result.num_eval_rows, "held-out row")
    return f"measured: loss {best.loss:.4f}{stderr} on {rows} after {counted(best.num_steps, 'step')}"
