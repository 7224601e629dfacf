"""Leave PyTorch's compiler out of commands that compile nothing: importing it takes a second of their start."""

import os

from qlora_cli.settings.choices import Attention

VARIABLE = "TORCHDYNAMO_DISABLE"


def leave_out_compiler(attention: Attention = Attention.AUTO, *, compiles_layers: bool = False) -> None:
    """Disable the compiler in this process, before torch is imported, unless attention or layers are compiled.

    bitsandbytes asks for it when it is imported, for kernels that neither CUDA nor CPUs use. What the user has set is
    left alone.
    """
    if not (attention.is_compiled or compiles_layers):
        os.environ.setdefault(VARIABLE, "1")
