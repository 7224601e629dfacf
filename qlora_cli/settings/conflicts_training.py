"""Settings of the training loop that have no effect, or can't work, with the others."""

from collections.abc import Iterator

from qlora_cli.settings.choices import Checkpointing, Optimizer, Schedule
from qlora_cli.settings.conflict import Conflict
from qlora_cli.settings.models import DataSettings, TrainingSettings
from qlora_cli.settings.values import either


def training_conflicts(training: TrainingSettings) -> list[Conflict]:
    """Return the conflicts within the settings of the loop."""
    return [
        *_schedule_conflicts(training),
        *_optimizer_conflicts(training),
        *_compile_conflicts(training),
        *_noise_conflicts(training),
        *_sample_conflicts(training),
    ]


def evaluation_conflicts(training: TrainingSettings, data: DataSettings) -> list[Conflict]:
    """Return the settings that depend on evaluations if the run has none."""
    missing = []
    if training.eval_steps is None:
        missing.append("training.eval_steps")
    if data.eval_dataset is None and data.eval_split is None:
        missing.append("held-out data")
    if not missing:
        return []
    hint = "Give --eval-steps, and --eval-dataset or --eval-split, or leave it out."
    return [
        (path, f"{path} has no effect without {' and '.join(missing)}: it depends on the evaluations of a run", hint)
        for path, is_set in (
            ("training.early_stopping_patience", training.early_stopping_patience is not None),
            ("training.load_best_model_at_end", training.load_best_model_at_end),
        )
        if is_set
    ]


def _schedule_conflicts(training: TrainingSettings) -> Iterator[Conflict]:
    schedule = training.schedule
    if schedule == Schedule.CONSTANT and training.warmup_ratio:
        message = "training.warmup_ratio has no effect with --schedule constant, which starts at the full rate"
        yield "training.warmup_ratio", message, "Leave it out, or use --schedule constant_with_warmup."
    if schedule == Schedule.WARMUP_STABLE_DECAY and training.warmup_ratio + training.decay_ratio > 1:
        message = (
            f"a warm-up of {training.warmup_ratio:g} of the steps and a decay of {training.decay_ratio:g} of them are "
            "more than a run has"
        )
        for path in ("training.decay_ratio", "training.warmup_ratio"):
            yield path, message, "Let training.warmup_ratio and training.decay_ratio add up to 1 at most."


def _optimizer_conflicts(training: TrainingSettings) -> Iterator[Conflict]:
    optimizer = training.optimizer
    if not optimizer.is_adam:
        reason = "Lion uses its own, 0.99" if optimizer.is_lion else "it has no such moving average"
        adams = either([name for name in Optimizer if name.is_adam])
        message = f"training.adam_beta2 has no effect with --optimizer {optimizer.value}: {reason}"
        yield "training.adam_beta2", message, f"Leave it out, or use --optimizer {adams}."


def _compile_conflicts(training: TrainingSettings) -> Iterator[Conflict]:
    checkpointing = training.gradient_checkpointing
    reasons = {
        Checkpointing.OFFLOAD: "which can't be moved to host memory",
        Checkpointing.SELECTIVE: "and it is not known which operations they consist of",
    }
    if training.torch_compile and checkpointing in reasons:
        message = (
            f"training.torch_compile can't be used with --gradient-checkpointing {checkpointing.value}: compiled "
            f"layers manage their own activations, {reasons[checkpointing]}"
        )
        yield "training.torch_compile", message, "Use --gradient-checkpointing on, or leave torch_compile out."


def _noise_conflicts(training: TrainingSettings) -> Iterator[Conflict]:
    if training.micro_batch_tokens is not None and training.neftune_noise_alpha is not None:
        message = (
            "training.micro_batch_tokens can't be used with neftune_noise_alpha: the noise would be scaled by the "
            "length of a micro-batch, not by that of a row"
        )
        yield "training.micro_batch_tokens", message, "Leave one of them out."


def _sample_conflicts(training: TrainingSettings) -> Iterator[Conflict]:
    """Yield the settings of sample prompts if there are none."""
    if training.sample_prompts is None:
        message = "training.sample_tokens has no effect without prompts to answer"
        yield "training.sample_tokens", message, "Leave it out, or give --sample-prompt."
