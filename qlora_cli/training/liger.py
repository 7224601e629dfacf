"""Use Liger's kernels in a model's layers. Not its loss: our own does not build the logits either."""

from peft import PeftModel
from transformers.integrations.liger import apply_liger_kernel

from qlora_cli.errors import ModelError

# The trainer's own `use_liger_kernel` is deprecated in TRL 1.16, and silently ignores models without kernels.
NO_LOSS = {"fused_linear_cross_entropy": False, "cross_entropy": False}


def check_liger(model_type: str) -> None:
    """Check that Liger has kernels for an architecture.

    Raises:
        ModelError: it has none.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # needs a GPU's Triton

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(
            f"Liger has no kernels for a model of type {model_type}",
            hint="Leave training.use_liger_kernel out, or install a newer liger-kernel.",
        )


def use_liger_kernels(model: PeftModel) -> None:
    """Replace norms, rotary embeddings and MLPs of `model`, as far as it has them, by Liger's kernels.

    `check_liger` has checked that it has kernels.
    """
    apply_liger_kernel(model, NO_LOSS)
