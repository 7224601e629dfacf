"""Settings reach the trainer: harmful defaults are off, and every setting changes something."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer
from trl import SFTConfig

from qlora_cli.errors import HardwareError
from qlora_cli.hardware.device import ComputeDtype
from qlora_cli.settings.choices import Checkpointing, Dtype, Optimizer
from qlora_cli.settings.models import QuantizationSettings, TrainingSettings, TrainSettings
from qlora_cli.training.arguments import check_hardware, resolve_checkpointing, training_arguments
from tests.conftest import train_settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def arguments_for(
    tmp_path: Path, device: torch.device = CPU, /, *, has_eval: bool = False, **flags: object
) -> SFTConfig:
    settings: TrainSettings = train_settings(tmp_path / "m", tmp_path / "d.jsonl", tmp_path / "run", **flags).settings
    dtype = ComputeDtype(name=Dtype.FP32, reason="test")
    return training_arguments(
        settings, output=tmp_path / "run", device=device, dtype=dtype, num_steps=100, has_eval=has_eval
    )


def test_harmful_defaults_are_changed(tmp_path: Path) -> None:
    arguments = arguments_for(tmp_path)
    assert arguments.logging_nan_inf_filter is False
    assert arguments.use_cpu
    assert not arguments.bf16
    assert not arguments.fp16
    assert not arguments.gradient_checkpointing
    assert arguments.max_length is None
    assert not arguments.packing
    assert arguments.dataset_kwargs == {"skip_prepare_dataset": True}
    assert arguments.prediction_loss_only
    assert arguments.disable_tqdm
    assert arguments.report_to == []
    assert arguments.n_gpu <= 1
    # TF32 has 10 bits of mantissa; transformers enables it when it compiles, and for bf16 whatever was requested.
    assert arguments.tf32 is False
    assert arguments.optim == "adamw_torch"  # TRL uses the fused one
    assert arguments.project == "qlora"
    assert not arguments.push_to_hub  # we push ourselves
    assert not arguments.full_determinism
    assert not arguments.torch_compile  # it would compile the model as a whole; we compile its layers
    assert not arguments.use_liger_kernel  # deprecated in TRL, with a warning; we apply it
    assert arguments.neftune_noise_alpha is None
    assert arguments.label_smoothing_factor == 0
    assert arguments.loss_type == "nll"
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.999, 1e-8)


@pytest.mark.parametrize(
    ("setting", "value", "attribute", "expected"),
    [
        ("training__learning_rate", 0.5, "learning_rate", 0.5),
        ("training__schedule", "linear", "lr_scheduler_type", "linear"),
        ("training__warmup_ratio", 0.2, "warmup_steps", 20),
        ("training__weight_decay", 0.3, "weight_decay", 0.3),
        ("training__adam_beta2", 0.9, "adam_beta2", 0.9),
        ("training__max_grad_norm", 2.0, "max_grad_norm", 2.0),
        ("training__micro_batch_size", 3, "per_device_train_batch_size", 3),
        ("training__gradient_accumulation_steps", 5, "gradient_accumulation_steps", 5),
        ("training__optimizer", "adamw_8bit", "optim", "adamw_8bit"),
        ("training__optimizer", "lion_8bit", "adam_beta2", 0.99),  # Lion's own: that of AdamW has another meaning
        ("training__neftune_noise_alpha", 5, "neftune_noise_alpha", 5.0),
        ("training__loss", "dft", "loss_type", "dft"),
        ("training__full_determinism", True, "full_determinism", True),
        ("training__seed", 9, "seed", 9),
        ("training__seed", 9, "data_seed", 9),
        ("training__logging_steps", 7, "logging_steps", 7),
        ("training__save_steps", 11, "save_steps", 11),
    ],
)
def test_every_setting_changes_an_argument(
    tmp_path: Path, setting: str, value: object, attribute: str, expected: Any
) -> None:
    assert getattr(arguments_for(tmp_path), attribute) != expected
    assert getattr(arguments_for(tmp_path, has_eval=False, **{setting: value}), attribute) == expected


@pytest.mark.parametrize("optimizer", Optimizer)
def test_transformers_can_make_every_optimizer(tmp_path: Path, optimizer: Optimizer) -> None:
    arguments = arguments_for(tmp_path, training__optimizer=optimizer.value, training__weight_decay=0.25)
    assert arguments.optim == optimizer.value
    kind, values = Trainer.get_optimizer_cls_and_kwargs(arguments)
    assert values["lr"] == arguments.learning_rate
    family = (
        "AdamW" if optimizer.is_adam else "Lion" if optimizer.is_lion else {"sgd": "SGD"}.get(optimizer, "Adafactor")
    )
    assert kind.__name__ == family
    assert values.get("is_paged", False) == optimizer.is_paged
    assert (values.get("optim_bits") == 8) == optimizer.is_8bit


def test_evaluation_runs_at_the_requested_interval(tmp_path: Path) -> None:
    assert arguments_for(tmp_path, has_eval=True).eval_strategy == "no"
    flags = {"training__eval_steps": 4, "data__eval_dataset": str(tmp_path / "e.jsonl")}
    arguments = arguments_for(tmp_path, has_eval=True, **flags)
    assert (arguments.eval_strategy, arguments.eval_steps) == ("steps", 4)


@pytest.mark.parametrize("setting", ["auto", "on", "selective", "off", "offload"])
def test_the_trainer_leaves_checkpointing_to_us(tmp_path: Path, setting: str) -> None:
    arguments = arguments_for(tmp_path, CUDA, training__gradient_checkpointing=setting)
    assert arguments.gradient_checkpointing is False
    assert arguments.gradient_checkpointing_kwargs is None


def test_auto_checkpointing_is_decided_and_an_explicit_choice_stays() -> None:
    assert resolve_checkpointing(Checkpointing.AUTO, CUDA) == "on"
    assert resolve_checkpointing(Checkpointing.AUTO, CPU) == "off"
    for asked in set(Checkpointing) - {Checkpointing.AUTO}:
        assert resolve_checkpointing(asked, CPU) is resolve_checkpointing(asked, CUDA) is asked


def test_transformers_accepts_offload() -> None:
    # If it were not removed from the arguments, PyTorch's checkpoint() would receive it, and fail.
    older = PreTrainedModel.gradient_checkpointing_enable  # its name in 5.17
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", older)
    assert "offload" in inspect.signature(enable).parameters


def test_offloading_needs_a_gpu_to_offload_from() -> None:
    training = TrainingSettings(gradient_checkpointing=Checkpointing.OFFLOAD)
    with pytest.raises(HardwareError, match="where they are without a GPU") as caught:
        check_hardware(QuantizationSettings(), training, CPU)
    assert caught.value.exit_code == 2
    assert caught.value.hint == "Use --gradient-checkpointing on."
    check_hardware(QuantizationSettings(), training, CUDA)
