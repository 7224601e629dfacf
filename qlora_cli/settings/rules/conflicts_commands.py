"""Settings of single commands that have no effect with the others."""

from collections.abc import Iterator

from qlora_cli.settings.choices import LEAST_FIRST, Quantization, quant_flag
from qlora_cli.settings.models import AnswerSettings, PredictionSettings, QuantizationSettings, SavingSettings
from qlora_cli.settings.rules.conflict import Conflict
from qlora_cli.settings.sections.pushing import Pushed

TEMPERATURE_HINT = "Give --temperature above 0 too, such as 0.7, or leave it out."


def push_conflicts(section: str, pushed: Pushed) -> Iterator[Conflict]:
    """Yield the settings of a repository that nothing is pushed to."""
    if pushed.push_to_hub is None:
        path = f"{section}.hub_private"
        message = f"{path} has no effect without {section}.push_to_hub"
        yield path, message, "Leave it out, or give --push-to-hub OWNER/NAME."


def load_conflicts(quantization: QuantizationSettings) -> Iterator[Conflict]:
    """Yield a method that is left open, where nothing is trained that would decide it."""
    if quantization.method == Quantization.AUTO:
        message = "auto is decided by what a training takes, and nothing is trained here"
        yield "quantization.method", message, f"Use {quant_flag(LEAST_FIRST)}."


def loading_conflicts(saving: SavingSettings) -> Iterator[Conflict]:
    """Yield the number of tokens if nothing is calibrated, and a budget that no data says how to spend."""
    if saving.calibrate is None:
        yield "load.calibration_tokens", "has no effect without --calibrate", "Add --calibrate DATA, or leave it out."
    if saving.memory_budget is not None and saving.error_on is None:
        hint = "Add --error-on DATA, text of the kind that the model will see."
        yield "load.memory_budget", "is spent by what quantization costs on data, and none is named", hint


def prediction_conflicts(prediction: PredictionSettings) -> Iterator[Conflict]:
    """Yield the settings of a prediction that have no effect without others."""
    if prediction.check is None:
        yield "inspect_memory.max_change", "has no effect without --check", "Add --check FILE, or leave it out."
    elif prediction.write_lock is not None:
        message = "the peak would be compared with itself: --write-lock writes what --check reads"
        yield "inspect_memory.write_lock", message, "Leave one of them out."
    if prediction.rows is None:
        hint = "Add --rows N, the rows of the training data."
        yield "inspect_memory.mean_tokens", "has no effect without --rows", hint


def generation_conflicts(answers: AnswerSettings) -> Iterator[Conflict]:
    """Yield the settings of generation that have no effect."""
    for key in ("top_p", "top_k", "seed"):
        if answers.is_greedy and getattr(answers, key) is not None:
            yield f"generate.{key}", "has no effect: decoding is greedy", TEMPERATURE_HINT
    if answers.merged is not None and not answers.compare:
        hint = f"Add --compare, or ask the merged model alone: qlora generate {answers.merged}"
        yield "generate.merged", "has no effect without --compare", hint
