"""Settings that change the memory of a run but are not traced; every prediction mentions them. Imports no torch."""

from qlora_cli.settings.models import TrainingSettings


def untraced(training: TrainingSettings) -> list[str]:
    """Return sentences about what a prediction for these settings leaves out."""
    sentences = []
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
    if training.full_determinism:
        sentences.append("of full_determinism the smaller workspaces of cuBLAS are counted, other kernels are not")
    return sentences
