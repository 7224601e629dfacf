"""Attach a LoRA adapter to a frozen base."""

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import ModelError
from qlora_cli.settings.models import LoraSettings


def attach_adapter(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Return `model` frozen, with LoRA matrices in fp32 on its target modules, the only part that trains.

    PEFT's `prepare_model_for_kbit_training` is not called: it would upcast norms, embedding and head to
    fp32, which costs 2 GiB on Llama-3.1-8B and gains nothing for a frozen base.

    Raises:
        ModelError: a target names no linear layer of the model.
    """
    targets = settings.target_modules
    if targets != "all-linear":
        _check_targets(model, targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if targets == "all-linear" else list(targets),
        bias="none",
    )
    model.requires_grad_(False)
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def _check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linears = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    known = sorted({name.rsplit(".", 1)[-1] for name in linears})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            raise ModelError(
                f"target module {target!r} matches no linear layer of the model",
                hint=f"Its linear layers are {', '.join(known)}; or use all-linear.",
            )
