"""What an objective implies for other settings, and what can't be combined with one that compares answers."""

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_cli.settings.choices import LoraInit, LossOn, TrainingLoss
from qlora_cli.settings.models import TrainingSettings
from qlora_cli.settings.objectives import COMPARED_BY, OBJECTIVES_OF_LABELS, OBJECTIVES_OF_PAIRS, DataFormat, Objective
from qlora_cli.settings.rules.conflict import Conflict

FORMAT, LEARNING_RATE = "data.format", "training.learning_rate"
CHANGED_BASE = (LoraInit.PISSA, LoraInit.LOFTQ, LoraInit.CALIBRATED)


def implied_values(objective: Objective) -> dict[str, object]:
    """Return the settings that an objective implies where they are not given, by `section.key`."""
    if not objective.compares:
        return {}
    return {FORMAT: COMPARED_BY[objective].format, LEARNING_RATE: COMPARED_BY[objective].learning_rate}


def objective_conflicts(validated: Mapping[str, Any]) -> Iterator[Conflict]:
    """Yield what the rows and the loop of an objective can't be combined with; `validated` are sections of a run."""
    training, data = validated["training"], validated.get("data")
    if "evaluate" in validated:  # it measures rows of any format, whatever a settings file says of training
        return
    objective: Objective = training.objective
    if data is not None:
        yield from _format_conflicts(objective, data.format)
    if objective.compares:
        for path, is_set, reason, hint in (
            *_loop_problems(training),
            *(_baseline_problems(training) if objective.has_labels else ()),
            *_data_problems(data),
            *_adapter_problems(objective, validated),
        ):
            if is_set:
                yield path, f"{path} can't be used with --objective {objective.value}: {reason}", hint


def _format_conflicts(objective: Objective, given: DataFormat) -> Iterator[Conflict]:
    own = COMPARED_BY[objective].format if objective.compares else None
    if given == DataFormat.PREFERENCE != own:
        message = f"--format preference is for rows of two answers, which {OBJECTIVES_OF_PAIRS} compares"
        hint = f"Add {OBJECTIVES_OF_PAIRS} to qlora train, or name the better answers by --format and --columns."
        yield FORMAT, message, hint
    elif given == DataFormat.UNPAIRED_PREFERENCE != own:
        message = f"--format {given.value} is for answers with a label, which {OBJECTIVES_OF_LABELS} compares"
        yield FORMAT, message, f"Add {OBJECTIVES_OF_LABELS} to qlora train, or leave it out."
    elif objective.has_pairs and given not in (DataFormat.AUTO, own):
        message = f"--format {given.value} has one answer a row, and --objective {objective.value} compares two"
        yield FORMAT, message, "Leave it out; --columns chosen=NAME,rejected=NAME names the columns of the answers."
    elif objective.has_labels and given not in (DataFormat.AUTO, own):
        message = f"--format {given.value} has no label, and --objective {objective.value} compares answers by theirs"
        yield FORMAT, message, "Leave it out; --columns label=NAME names the column of the label."


def _loop_problems(training: TrainingSettings) -> Iterator[tuple[str, bool, str, str]]:
    leave_out = "Leave it out."
    yield (
        "training.neftune_noise_alpha",
        training.neftune_noise_alpha is not None,
        "the noise would differ between the answers that are compared",
        leave_out,
    )
    yield "training.loss", training.loss != TrainingLoss.NLL, "it has a loss of its own", leave_out
    yield "training.torch_compile", training.torch_compile, "compiled layers were not tried with it", leave_out
    yield (
        "training.calibrate",
        training.calibrate,
        "the rows that calibrate a base have one answer",
        "Calibrate the base first, on answers: qlora load MODEL --calibrate DATA --save DIR",
    )
    yield (
        "training.memory_budget",
        training.memory_budget is not None,
        "the rows that it is spent by have one answer",
        "Choose the layers first, by answers: qlora load MODEL --error-on DATA --memory-budget SIZE --save DIR",
    )


def _baseline_problems(training: TrainingSettings) -> Iterator[tuple[str, bool, str, str]]:
    yield (
        "training.gradient_accumulation_steps",
        training.rows_per_step == 1,
        "a step of one row has no other answer to compare with",
        "Give more, or a larger --micro-batch-size: several rows a step, better 16.",
    )


def _data_problems(data: Any) -> Iterator[tuple[str, bool, str, str]]:
    if data is None:
        return
    yield (
        "data.packing",
        data.packing,
        "an answer is compared as a whole, and a packed row has several",
        "Use --micro-batch-tokens.",
    )
    yield "data.streaming", data.streaming, "its rows are read before the first step", "Leave it out."
    yield (
        "data.loss_on",
        data.loss_on == LossOn.ALL,
        "answers are compared, and prompts are not",
        "Leave --loss-on out.",
    )


def _adapter_problems(objective: Objective, validated: Mapping[str, Any]) -> Iterator[tuple[str, bool, str, str]]:
    lora, model = validated.get("lora"), validated.get("model")
    if lora is None:
        return
    name = lora.init_lora_weights.value
    yield (
        "lora.init_lora_weights",
        objective.has_reference and lora.init_lora_weights in CHANGED_BASE,
        f"{name} begins elsewhere than the base, which answers are compared by",
        "Use default, gaussian or orthogonal.",
    )
    yield "lora.dropout", lora.dropout > 0, "it would add noise to the comparison of answers", "Leave it out."
    yield (
        "lora.modules_to_save",
        bool(lora.modules_to_save),
        "a head that is trained whole has no gradient of single answers",
        "Use an adapter alone.",
    )
    yield (
        "model.new_tokens",
        bool(model is not None and model.new_tokens),
        "rows of a head that are trained have no gradient of single answers",
        "Train them with answers first, and merge.",
    )
