"""Gather the weights of a layer from the processes that each hold a part of them, without waiting for one that failed.

Other values are exchanged at places that all processes reach, weights in the middle of layers, where the others would
wait for a process that failed for ever. So it leaves word in the store by which they met.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from threading import Event, Thread

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from qlora_cli.ranks.group import Failure, PeerError, PeerLostError

FAILURE = "failure"  # the key in the store
POLL = timedelta(seconds=1)
TIMED_OUT = "timed out"  # in gloo's message when it was waited for in vain


class WeightGather:
    """Gathers weights for `fully_shard`, which calls it as its own `AllGather`; that has no public name."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._is_aborted, self._is_over = Event(), Event()

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gather the shards of all processes into `output_tensor`; over gloo, wait until that is done.

        Raises:
            PeerError: another process failed, and told why.
            PeerLostError: another process ended.
        """
        # The name is new in torch 2.13, where the other one warns.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        is_on_host = output_tensor.device.type == "cpu"
        try:
            if self._is_aborted.is_set():
                self.check()
            work: dist.Work | None = gather(output_tensor, input_tensor, group=group, async_op=async_op or is_on_host)
            if not is_on_host:
                return work  # the device waits
            assert work is not None, "it is waited for here"
            self._wait(work)
        except torch.OutOfMemoryError:  # of this process, not of one that ended
            raise
        except RuntimeError as error:
            self.check()
            raise PeerLostError(error) from error
        return None

    def watch(self, abort: Callable[[], None]) -> None:
        """Call `abort` as soon as a process has left word, from a thread of its own.

        A GPU that waits for weights is not interrupted otherwise, nor a host that waits for the GPU.
        """
        Thread(target=self._watch, args=(abort,), daemon=True).start()

    def _watch(self, abort: Callable[[], None]) -> None:
        try:
            while not self._is_over.wait(POLL.total_seconds()):
                if self._store.check([FAILURE]):
                    self._is_aborted.set()
                    abort()
                    return
        except RuntimeError:  # the process with the store has ended, and its launcher ends this one
            return

    def stop_watching(self) -> None:
        """Let the thread end."""
        self._is_over.set()

    def _wait(self, work: dist.Work) -> None:
        while True:
            try:
                work.wait(timeout=POLL)
                return
            except RuntimeError as error:
                if TIMED_OUT not in str(error):
                    raise
                self.check()

    def announce(self, failure: Failure) -> None:
        """Leave word of a failure of this process to those that wait for its weights."""
        with suppress(RuntimeError):  # the store has ended: they learn of it as their connections to this one close
            self._store.set(FAILURE, json.dumps(asdict(failure)))

    def check(self) -> None:
        """Check that no process has left word.

        Raises:
            PeerError: one has.
        """
        word = None
        with suppress(RuntimeError):  # the store has ended, with a launcher that was killed
            word = self._store.get(FAILURE) if self._store.check([FAILURE]) else None
        if word is not None:
            raise PeerError(Failure(**json.loads(word)))
