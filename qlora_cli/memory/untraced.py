"""What changes the memory of a run and is not followed: to be said with every prediction. Imports no torch."""

from qlora_cli.settings.models import TrainingSettings


def untraced(training: TrainingSettings) -> list[str]:
    """Return in sentences what a prediction for these settings leaves out."""
    found = []
    if training.torch_compile:
        found.append(
            "torch.compile is not traced: the figures are those of the run without it; compiled code keeps other "
            "activations, usually fewer, and may take more while it compiles"
        )
    if training.use_liger_kernel:
        found.append(
            "Liger's kernels are not traced: the figures are those of the run without them; with them it usually "
            "takes less"
        )
    if training.full_determinism:
        found.append("of full_determinism the smaller workspaces of cuBLAS are counted, other kernels are not")
    return found
