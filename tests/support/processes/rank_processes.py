"""Runs of several processes on this machine, forked, as torchrun would start them on the CPU."""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import QloraError
from qlora_cli.events import SampleDone, StepDone
from qlora_cli.ranks.distributed_group import joined
from qlora_cli.ranks.group import ProcessGroup, failing_together
from qlora_cli.ranks.place import place_in
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.train_run import train
from tests.conftest import Recorder
from tests.support.processes.forks import FORKS, end_of, redirect, start_process

SECONDS = 300.0
# Called in each process before it trains: a fault of one of them.
Fault = Callable[[ProcessGroup], Recorder]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended: its exit code, and what `train` returned or raised there."""

    code: int
    told: Mapping[str, Any]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def start_ranks(
    settings: Resolved[TrainSettings], folder: Path, fault: Fault | None = None, size: int | None = None
) -> list[BaseProcess]:
    """Start the processes of a run; each writes what it ended with to a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    size = size or settings.settings.training.num_gpus
    port = free_port()
    return [start_process(_train, settings, folder, rank, size, port, fault) for rank in range(size)]


def end_of_ranks(processes: list[BaseProcess], folder: Path) -> list[Ended]:
    """Wait for all processes and return how they ended, by rank."""
    codes = [end_of(process, SECONDS) for process in processes]
    return [Ended(code=code, told=_told(folder / f"rank-{rank}.json")) for rank, code in enumerate(codes)]


def run_ranks(settings: Resolved[TrainSettings], folder: Path, fault: Fault | None = None) -> list[Ended]:
    """Train in several processes to the end."""
    return end_of_ranks(start_ranks(settings, folder, fault), folder)


def start_ranks_below(settings: Resolved[TrainSettings], folder: Path) -> tuple[BaseProcess, list[int]]:
    """Start the processes of a run as children of a launcher, which waits; return it and their numbers, by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    receiving, sending = FORKS.Pipe(duplex=False)
    launcher = start_process(_launch, settings, folder, free_port(), sending)
    pids: list[int] = receiving.recv()
    return launcher, pids


def _launch(settings: Resolved[TrainSettings], folder: Path, port: int, sending: Connection) -> None:
    size = settings.settings.training.num_gpus
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            _train(settings, folder, rank, size, port, None)
        pids.append(pid)
    sending.send(pids)
    for pid in pids:
        os.waitpid(pid, 0)


def told_by(folder: Path, rank: int) -> Mapping[str, Any]:
    """Return what a process wrote as it ended; nothing if it has not."""
    return _told(folder / f"rank-{rank}.json")


def _told(file: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return content


def _train(
    settings: Resolved[TrainSettings], folder: Path, rank: int, size: int, port: int, fault: Fault | None
) -> None:
    redirect(folder / f"rank-{rank}.log", folder / f"rank-{rank}.log")
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    told: dict[str, Any] = {}
    code = 0
    try:
        place, num_gpus = place_in(os.environ), settings.settings.training.num_gpus
        with joined(place, num_gpus, on_cpu=True) as group, failing_together(group):
            reporter = Recorder() if fault is None else fault(group)
            result = train(settings, reporter, group=group)
            told = {"size": group.size, "steps": result.steps, "interrupted_by": result.interrupted_by}
            told["losses"] = [event.loss for event in reporter.events if isinstance(event, StepDone)]
            told["num_samples"] = len([event for event in reporter.events if isinstance(event, SampleDone)])
            told["eval_loss"] = result.eval_loss
            if result.interrupted_by is not None:
                code = 128 + signal.Signals[result.interrupted_by]
    except QloraError as error:
        told = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
        code = error.exit_code
    (folder / f"rank-{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    sys.exit(code)
