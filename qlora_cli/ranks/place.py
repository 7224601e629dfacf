"""Which process of a run this is, by the variables that torchrun sets. Imports no torch."""

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

from qlora_cli.errors import HardwareError

TORCHRUN = "WORLD_SIZE"
# The number of processes, by torchrun and by launchers of MPI.
SIZES = (TORCHRUN, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# What torchrun sets for `torch.distributed`.
ADDRESS = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
VARIABLES = (*SIZES, "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One of `size` processes, from 0, and of `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place_in(environment: Mapping[str, str]) -> Place:
    """Return which process this is; the only one without a launcher, and where a scheduler started only one.

    Raises:
        HardwareError: it is one of several that torchrun did not start, or torchrun's variables are incomplete.
    """
    sizes = {name: int(value) for name in SIZES if (value := environment.get(name, "").strip()).isdecimal()}
    several = {name: size for name, size in sizes.items() if size > 1}
    if not several:
        return Place()
    if TORCHRUN not in several:
        name, size = next(iter(several.items()))
        raise HardwareError(
            f"this is one of {size} processes ({name} is {size}) that torchrun did not start",
            hint=f"Use qlora train --num-gpus {size}, or torchrun. If the variable was left over: unset {name}",
        )
    size = several[TORCHRUN]
    missing = [name for name in ADDRESS if not environment.get(name, "").strip()]
    if missing:
        raise HardwareError(
            f"this is one of {size} processes (WORLD_SIZE is {size}), and {missing[0]} is not set",
            hint=f"Use qlora train --num-gpus {size}, or torchrun. If the variables were left over: "
            f"unset {TORCHRUN} RANK LOCAL_RANK",
        )
    rank, local_rank, local_size = (int(environment[name]) for name in ADDRESS[:3])
    return Place(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


def use_own_gpu(place: Place, environment: MutableMapping[str, str], num_gpus: int) -> None:
    """Make the GPU of this process the only visible one, before CUDA begins.

    `num_gpus` is the number of those that this process sees. A scheduler that shows each process its own GPU is left
    alone.
    """
    given = environment.get(VISIBLE)
    visible = [str(index) for index in range(num_gpus)] if given is None else [one for one in given.split(",") if one]
    if place.local_size > 1 and len(visible) > place.local_rank and len(visible) > 1:
        environment[VISIBLE] = visible[place.local_rank].strip()


@contextmanager
def without_launcher() -> Iterator[None]:
    """Hide the variables of launchers, and restore them on exit.

    `accelerate`, on which the trainer is built, would read them, and make its own group of the processes.
    """
    hidden = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
