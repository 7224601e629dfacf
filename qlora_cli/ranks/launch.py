"""Start the processes of a run on this machine, by torch's own launcher."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from uuid import uuid4

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qlora_cli.errors import HardwareError, QloraError
from qlora_cli.ranks.group import NEXT

THREADS = "OMP_NUM_THREADS"
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")  # that go to all; under nohup, SIGHUP is ignored by all
# What a signal leaves to each for its checkpoint.
SHUTDOWN, SHUTDOWN_SECONDS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300"


class ProcessKilledError(QloraError):
    """A process of a run was killed."""


def check_gpus(num_processes: int) -> None:
    """Check that each of the processes has a GPU.

    Raises:
        HardwareError: there are fewer.
    """
    found = torch.cuda.device_count()
    if found < num_processes:
        number = {0: "no GPU is", 1: "one GPU is"}.get(found, f"{found} GPUs are")
        raise HardwareError(
            f"{num_processes} processes need {num_processes} GPUs, and {number} visible to PyTorch",
            setting="training.num_gpus",
            hint="Check nvidia-smi and CUDA_VISIBLE_DEVICES. With --device cpu, they share the cores.",
        )


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `qlora` with `arguments` in several processes, wait for all, and return the exit code.

    Raises:
        ProcessKilledError: one was killed, and could not say why it ended.
    """
    os.environ.setdefault(THREADS, str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ.setdefault(SHUTDOWN, SHUTDOWN_SECONDS)
    logging.disable(logging.ERROR)  # the processes say how they ended
    signals = [name for name in SIGNALS if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle=",".join(signals),
    )
    # The program as it was started: `-m` alone would look for modules in the current directory first.
    program = ("-m", "qlora_cli") if sys.argv[0].endswith("__main__.py") else (sys.argv[0],)
    try:
        elastic_launch(config, sys.executable)(*program, *arguments)
    except ChildFailedError as error:
        return _code_of(error)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _code_of(error: ChildFailedError) -> int:
    """Return the exit code of the processes, which all end with the same if none is killed.

    Raises:
        ProcessKilledError: one was killed.
    """
    rank, first = error.get_first_failure()
    codes = {rank: int(failure.exitcode) for rank, failure in error.failures.items()}
    code = int(first.exitcode)
    if code > 0 or code == -signal.SIGTERM:  # by torch's launcher, when another had ended
        return next(code for code in (codes.get(0, 0), code, 128 - code) if code > 0)
    name = signal.Signals(-code).name
    raise ProcessKilledError(
        f"process {rank} was killed by {name}",
        hint=f"SIGKILL often means that the host ran out of memory (dmesg tells). {NEXT}",
    )
