"""Settings as TRL's `SFTConfig` takes them.

Every default of theirs that would hurt is set here by name; a test holds the list.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from qlora_cli.errors import HardwareError
from qlora_cli.loading.device import ComputeDtype
from qlora_cli.settings.models import (
    Checkpointing,
    Dtype,
    QuantizationSettings,
    ReportTo,
    TrainingSettings,
    TrainSettings,
)


def resolve_checkpointing(setting: Checkpointing, device: torch.device) -> Checkpointing:
    """Return what `auto` comes to; on a CPU memory is plenty and time is not."""
    if setting != Checkpointing.AUTO:
        return setting
    return Checkpointing.ON if device.type == "cuda" else Checkpointing.OFF


def check_hardware(quantization: QuantizationSettings, training: TrainingSettings, device: torch.device) -> None:
    """Check that what moves memory off a GPU has one to move it off, and that the base is all on `device`.

    Raises:
        HardwareError: a paged optimizer, whose state is CUDA unified memory, or offloaded activations without a
            GPU; or a base that is partly on the CPU, which the trainer can't train.
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
    if quantization.int8_cpu_offload:
        raise HardwareError(
            "a model that is partly on the CPU (quantization.int8_cpu_offload) can be loaded, but not trained",
            hint="Leave it out, and use --quant nf4 if the model does not fit.",
        )


def _checkpointing_arguments(chosen: Checkpointing) -> dict[str, Any]:
    # transformers renamed the argument after 5.17, and warns of the old name where it has the new one.
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    if chosen == Checkpointing.OFF:
        return {name: False, f"{name}_kwargs": None}
    # The trainer takes `offload` out again before PyTorch sees it: huggingface/transformers#48444, since 5.17.
    offload = {"offload": True} if chosen == Checkpointing.OFFLOAD else {}
    return {name: True, f"{name}_kwargs": {"use_reentrant": False, **offload}}


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
    checkpointing = resolve_checkpointing(training.gradient_checkpointing, device)
    report_to = settings.output.report_to
    arguments = SFTConfig(
        output_dir=str(output),
        # The rows come tokenized, cut and masked from our own data path.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,  # the same: packed rows come from there too
        remove_unused_columns=False,  # there are none
        # The loop. The number of steps is computed once, by the plan.
        max_steps=num_steps,
        per_device_train_batch_size=training.micro_batch_size,
        per_device_eval_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule.value,
        warmup_steps=round(training.warmup_ratio * num_steps),
        weight_decay=training.weight_decay,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer.value,
        seed=training.seed,
        data_seed=training.seed,
        # Precision and memory. TRL turns bf16 and gradient checkpointing on by default.
        use_cpu=device.type == "cpu",
        bf16=dtype.name == Dtype.BF16,
        fp16=dtype.name == Dtype.FP16,
        **_checkpointing_arguments(checkpointing),
        dataloader_pin_memory=device.type == "cuda",
        # Evaluation needs the loss only; TRL's fused head never builds the logits.
        prediction_loss_only=True,
        eval_strategy="steps" if has_eval and training.eval_steps else "no",
        eval_steps=training.eval_steps,
        # The trainer also saves at the last step, whatever the interval.
        save_strategy="steps",
        save_steps=training.save_steps or num_steps,
        # Reports: every step to us, nothing to a terminal, NaN shown as NaN.
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none" if report_to == ReportTo.NONE else [report_to.value],
        run_name=settings.output.directory.name,
    )
    # With several GPUs visible and no launcher, the trainer would wrap the model in DataParallel, which TRL
    # refuses. One process uses one GPU; the trainer sets the same attribute for models it finds placed.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
