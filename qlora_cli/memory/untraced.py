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
        holds = "a shard of the base and all of the adapter" if training.shards_base else "all of the model"
        sentences.append(
            f"each of {training.num_gpus} GPUs holds {holds}: memory is that of one, tokens a second, cost and energy "
            "those of all; how fast they send each other weights and gradients is a guess by --link; NCCL's buffers, "
            "some hundred MiB, are not counted, and host memory is that of all processes of a host, which has up to 8"
        )
    if training.shards_base:
        sentences.append("weights of the next layer arrive while one computes, so that the longer of both counts")
    if training.full_determinism:
        sentences.append("of full_determinism the smaller workspaces of cuBLAS are counted, other kernels are not")
    return sentences
