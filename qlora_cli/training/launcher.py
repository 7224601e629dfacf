"""Launchers of several processes, such as torchrun and `accelerate launch`, and the variables that they leave behind.

`accelerate`, on which the trainer is built, reads these variables: it would wait for the other processes, or fail to
reach them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_cli.errors import HardwareError

# The number of processes, by torchrun and by launchers of MPI.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
VARIABLES = (*SIZES, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")


@contextmanager
def single_process() -> Iterator[None]:
    """Hide the variables of launchers, and restore them on exit.

    Raises:
        HardwareError: this process is one of several.
    """
    for name in SIZES:
        value = os.environ.get(name, "").strip()
        if value.isdecimal() and int(value) > 1:
            raise HardwareError(
                f"this is one of {value} processes ({name} is {value}), and qlora trains in one process on one GPU",
                hint="Start it without torchrun or accelerate launch. If the variable was left over: "
                f"unset {name} RANK LOCAL_RANK",
            )
    hidden = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
