"""Settings that change the memory of a run but are not traced; every prediction mentions them. Imports no torch."""

from qlora_cli.settings.choices import Attention
from qlora_cli.settings.models import TrainingSettings

TRACED_AS_FLASH = (Attention.FLEX_ATTENTION, Attention.FLASH_ATTENTION_3)


def untraced(training: TrainingSettings, attention: Attention) -> list[str]:
    """Return sentences about what a prediction for these settings leaves out."""
    sentences = []
    if attention in TRACED_AS_FLASH:
        sentences.append(
            f"{attention.value} is not traced itself, but as flash attention, which saves the same activations"
        )
    if training.torch_compile:
        sentences.append(
            "torch.compile is not traced: the figures are those of the run without it; compiled code saves other "
            "activations, usually fewer, and may take more while it compiles"
        )
    if training.use_liger_kernel:
        sentences.append(
            "Liger's kernels are not traced: the figures are those of the run without them; with them it usually "
            "takes less"
        )
    if training.num_gpus > 1:
        sentences.append(
            f"each of {training.num_gpus} GPUs holds all of the model: memory is that of one, tokens a second, cost "
            "and energy those of all; they sum their gradients at 10 GB/s, a guess for PCIe 4.0; NCCL's buffers, some "
            "hundred MiB, are not counted, and host memory is that of one process"
        )
    if training.full_determinism:
        sentences.append("of full_determinism the smaller workspaces of cuBLAS are counted, other kernels are not")
    return sentences
