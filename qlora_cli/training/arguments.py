"""Convert the settings to TRL's `SFTConfig`.

Every harmful default is set here explicitly; a test has the list.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from qlora_cli.errors import HardwareError
from qlora_cli.hardware.device import ComputeDtype
from qlora_cli.memory.host_run import AUTO_CHECKPOINTING
from qlora_cli.quantization.methods import method_of
from qlora_cli.settings.choices import Checkpointing, Dtype, Schedule
from qlora_cli.settings.models import QuantizationSettings, TrainingSettings, TrainSettings
from qlora_cli.training.callbacks.trackers import PROJECT

CHECKPOINTS_A_RUN = 10
LION_BETA2 = 0.99  # arXiv 2302.06675, section 5.3; AdamW's beta2 decays another quantity


def resolve_checkpointing(setting: Checkpointing, device: torch.device) -> Checkpointing:
    """Resolve `auto`: off on a CPU, where memory is plentiful; on a GPU, on where memory can't be predicted."""
    if setting != Checkpointing.AUTO:
        return setting
    return Checkpointing.ON if device.type == "cuda" else AUTO_CHECKPOINTING


def check_hardware(quantization: QuantizationSettings, training: TrainingSettings, device: torch.device) -> None:
    """Check that settings for a GPU have one, and that the whole base is on `device`.

    Raises:
        HardwareError: a paged optimizer, whose state is CUDA unified memory, offloaded activations or kernels in
            Triton without a GPU; or a base that is partly on the CPU, which the trainer can't train.
    """
    if training.optimizer.is_paged and device.type != "cuda":
        raise HardwareError(
            f"{training.optimizer.value} pages its state out of GPU memory and there is no GPU",
            hint="Use --optimizer adamw_torch or adamw_8bit.",
        )
    if training.gradient_checkpointing == Checkpointing.OFFLOAD and device.type != "cuda":
        raise HardwareError(
            "gradient_checkpointing offload keeps activations in host memory, where they are without a GPU",
            hint="Use --gradient-checkpointing on.",
        )
    if training.use_liger_kernel and device.type != "cuda":
        raise HardwareError(
            "Liger's kernels (training.use_liger_kernel) run on a GPU only, and there is none",
            hint="Leave training.use_liger_kernel out.",
        )
    method_of(quantization.method).check_trainable(quantization)


def _checkpointing_arguments() -> dict[str, Any]:
    """Return the arguments by which the trainer leaves checkpointing to `enable_checkpointing`."""
    # transformers renamed the argument after 5.17, and warns of the old name where it has the new one.
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: False, f"{name}_kwargs": None}


def _warmup_steps(training: TrainingSettings, num_steps: int) -> int:
    """Return the warm-up steps: never all, so that at least the last step has the full learning rate."""
    if training.schedule == Schedule.CONSTANT:
        return 0
    return min(round(training.warmup_ratio * num_steps), num_steps - 1)


def _schedule_arguments(training: TrainingSettings, num_steps: int) -> dict[str, Any]:
    """Return the schedule and its parameters, by transformers' names."""
    warmup = _warmup_steps(training, num_steps)
    shape: dict[Schedule, dict[str, float]] = {
        Schedule.COSINE_WITH_MIN_LR: {"min_lr_rate": training.min_lr_ratio},
        Schedule.COSINE_WITH_RESTARTS: {"num_cycles": training.cosine_cycles},
        Schedule.POLYNOMIAL: {
            "lr_end": training.min_lr_ratio * training.learning_rate,
            "power": training.polynomial_power,
        },
        # The default would be 10,000 steps in a run without warm-up: nearly constant.
        Schedule.INVERSE_SQRT: {"timescale": max(1, warmup)},
        Schedule.WARMUP_STABLE_DECAY: {
            "num_decay_steps": min(max(1, round(training.decay_ratio * num_steps)), num_steps - warmup),
            "min_lr_ratio": training.min_lr_ratio,
        },
    }
    return {
        "lr_scheduler_type": training.schedule.value,
        "lr_scheduler_kwargs": shape.get(training.schedule, {}),
        "warmup_steps": warmup,
    }


def _batch_arguments(training: TrainingSettings) -> dict[str, int]:
    """Return the rows of a batch; if `StepCollator` divides the rows of a step, a batch is a step."""
    rows, accumulation = training.micro_batch_size, training.gradient_accumulation_steps
    if training.divides_steps:
        rows, accumulation = rows * accumulation, 1
    return {
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
    }


def save_interval(training: TrainingSettings, num_steps: int) -> int:
    """Return the steps between two checkpoints: as set, or a tenth of the run."""
    return training.save_steps or -(-num_steps // CHECKPOINTS_A_RUN)


def training_arguments(
    settings: TrainSettings,
    *,
    output: Path,
    device: torch.device,
    dtype: ComputeDtype,
    num_steps: int,
    has_eval: bool,
) -> SFTConfig:
    """Return the arguments of a run of `num_steps` optimizer steps that writes to `output`."""
    training = settings.training
    arguments = SFTConfig(
        output_dir=str(output),
        # The rows arrive tokenized, truncated and masked by our own data path.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,  # packed rows come from there, too
        remove_unused_columns=False,  # there are none
        # The loop. The number of steps is computed once, by the plan.
        max_steps=num_steps,
        **_batch_arguments(training),
        learning_rate=training.learning_rate,
        **_schedule_arguments(training, num_steps),
        weight_decay=training.weight_decay,
        adam_beta2=LION_BETA2 if training.optimizer.is_lion else training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer.value,
        neftune_noise_alpha=training.neftune_noise_alpha,
        loss_type=training.loss.value,
        seed=training.seed,
        data_seed=training.seed,
        full_determinism=training.full_determinism,
        # It would round the positions of rotary embeddings beyond 1,024.
        tf32=False,
        # Precision and memory. TRL turns bf16 and gradient checkpointing on by default.
        use_cpu=device.type == "cpu",
        bf16=dtype.name == Dtype.BF16,
        fp16=dtype.name == Dtype.FP16,
        **_checkpointing_arguments(),
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={
            "non_blocking": device.type == "cuda",  # from pinned memory
            # By default accelerate slices all tensors of a stream's batch to as many elements as it has rows.
            "dispatch_batches": False,
        },
        # Evaluation needs the loss only, for which the logits are never built as a whole.
        prediction_loss_only=True,
        eval_strategy="steps" if has_eval and training.eval_steps else "no",
        eval_steps=training.eval_steps,
        metric_for_best_model="eval_loss" if has_eval else None,
        greater_is_better=False if has_eval else None,
        # The trainer also saves at the last step, whatever the interval.
        save_strategy="steps",
        save_steps=save_interval(training, num_steps),
        # Reports: every step to our callbacks, nothing to a terminal, NaN shown as NaN.
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",  # trackers are our own callbacks, which contain their failures
        run_name=settings.output.directory.name,
        project=PROJECT,
    )
    # With several GPUs visible and no launcher, the trainer would wrap the model in DataParallel, which TRL
    # refuses. One process uses one GPU; the trainer sets the same attribute for models that are already placed.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
