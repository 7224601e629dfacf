"""Settings of the loop that have no effect, or can't work, with the others."""

from collections.abc import Iterator

from qlora_cli.settings.choices import Checkpointing, Optimizer, Schedule
from qlora_cli.settings.conflict import Conflict
from qlora_cli.settings.models import DataSettings, TrainingSettings
from qlora_cli.settings.values import either


def training_conflicts(training: TrainingSettings) -> list[Conflict]:
    """Return path, message and hint of each conflict within the settings of the loop."""
    return [
        *_schedule_conflicts(training),
        *_optimizer_conflicts(training),
        *_compile_conflicts(training),
        *_sample_conflicts(training),
    ]


def evaluation_conflicts(training: TrainingSettings, data: DataSettings) -> list[Conflict]:
    """Return what waits for evaluations that there are none of."""
    missing = []
    if training.eval_steps is None:
        missing.append("training.eval_steps")
    if data.eval_dataset is None and data.eval_split is None:
        missing.append("held-out data")
    if not missing:
        return []
    hint = "Give --eval-steps, and --eval-dataset or --eval-split, or leave it out."
    return [
        (path, f"{path} has no effect without {' and '.join(missing)}: it goes by the evaluations of a run", hint)
        for path, is_set in (
            ("training.early_stopping_patience", training.early_stopping_patience is not None),
            ("training.load_best_model_at_end", training.load_best_model_at_end),
        )
        if is_set
    ]


def _schedule_conflicts(training: TrainingSettings) -> Iterator[Conflict]:
    schedule = training.schedule
    if schedule == Schedule.CONSTANT and training.warmup_ratio:
        message = "training.warmup_ratio has no effect with --schedule constant, which begins at the full rate"
        yield "training.warmup_ratio", message, "Leave it out, or use --schedule constant_with_warmup."
    if schedule == Schedule.WARMUP_STABLE_DECAY and training.warmup_ratio + training.decay_ratio > 1:
        message = (
            f"warming up for {training.warmup_ratio:g} of the steps and decaying for {training.decay_ratio:g} of them "
            "is more than a run has"
        )
        for path in ("training.decay_ratio", "training.warmup_ratio"):
            yield path, message, "Let training.warmup_ratio and training.decay_ratio add up to 1 at most."


def _optimizer_conflicts(training: TrainingSettings) -> Iterator[Conflict]:
    optimizer = training.optimizer
    if not optimizer.is_adam:
        whose = "Lion keeps to its own, 0.99" if optimizer.is_lion else "it keeps no such average"
        adams = either([name for name in Optimizer if name.is_adam])
        message = f"training.adam_beta2 has no effect with --optimizer {optimizer.value}: {whose}"
        yield "training.adam_beta2", message, f"Leave it out, or use --optimizer {adams}."


def _compile_conflicts(training: TrainingSettings) -> Iterator[Conflict]:
    if training.torch_compile and training.gradient_checkpointing == Checkpointing.OFFLOAD:
        message = (
            "training.torch_compile can't be used with --gradient-checkpointing offload: compiled layers keep their "
            "activations themselves, out of reach of what would move them to host memory"
        )
        yield "training.torch_compile", message, "Use --gradient-checkpointing on, or leave torch_compile out."


def _sample_conflicts(training: TrainingSettings) -> Iterator[Conflict]:
    """Yield what belongs to another setting that is not there."""
    if training.sample_prompts is None:
        message = "training.sample_tokens has no effect without prompts to answer"
        yield "training.sample_tokens", message, "Leave it out, or give --sample-prompt."
