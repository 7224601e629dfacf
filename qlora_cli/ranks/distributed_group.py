"""A group of processes by `torch.distributed`: values over gloo, gradients over NCCL where there are GPUs."""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from threading import Thread
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from qlora_cli.errors import HardwareError
from qlora_cli.ranks.group import ALONE, CLOSED, Failure, PeerError, PeerLostError, ProcessGroup, SumError, Value
from qlora_cli.ranks.place import VISIBLE, Place, use_own_gpu
from qlora_cli.ranks.weight_gather import WeightGather
from qlora_cli.units import MIB

RENDEZVOUS = timedelta(minutes=10)  # for all processes to start
# Between two exchanges one process may tokenize a data set or download a model.
PATIENCE = timedelta(days=7)
LAST_WORDS_SECONDS = 60.0
BUCKET_BYTES = 25 * MIB  # of gradients that are summed at once, as many as PyTorch's DistributedDataParallel takes
CONTAINERS = ("docker", "br-", "veth", "virbr")  # interfaces to the containers and virtual machines of this one
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"


class RendezvousError(HardwareError):
    """This process did not meet the others, so that each tells of it."""


@dataclass(frozen=True, kw_only=True)
class SharedWeights:
    """The processes that hold the parts of weights, as `fully_shard` takes them, and how they gather them."""

    mesh: DeviceMesh
    gather: Any  # a `WeightGather`, of the type that `fully_shard` has no public name for


class DistributedGroup(ProcessGroup):
    """One of several processes, which met by `store`.

    `values` and `gradients` are their groups in `torch.distributed`.
    """

    def __init__(self, place: Place, store: Store, values: dist.ProcessGroup, gradients: dist.ProcessGroup) -> None:
        self._place = place
        self._store = store
        self._values = values
        self._gradients = gradients
        self._weights: SharedWeights | None = None
        self._launcher = os.getppid()
        self._is_unheard = False  # whether the others did not listen when this process failed
        self.rank = place.rank
        self.size = place.size

    @property
    def is_first_on_host(self) -> bool:
        """Whether no process of this machine comes before this one."""
        return self._place.local_rank == 0

    @property
    def num_on_host(self) -> int:
        """The number of processes on this machine."""
        return self._place.local_size

    @property
    def has_lost_launcher(self) -> bool:
        """Whether the launcher has ended since the processes met."""
        return os.getppid() != self._launcher

    def exchange(self, value: Value) -> list[Value]:
        """Return the values of all processes, by rank."""
        values = self._gather(value)
        for other in values:
            if isinstance(other, Failure):
                raise PeerError(other)
        return values

    @property
    def shares_weights(self) -> bool:
        """Whether each process holds a part of weights, so that none can compute without the others."""
        return self._weights is not None

    def weights(self) -> SharedWeights:
        """Return the processes for weights that each holds a part of; all processes call this."""
        if self._weights is None:
            backend = dist.get_backend(self._gradients)
            group = dist.new_group(backend=backend, timeout=PATIENCE)
            mesh = DeviceMesh.from_group(group, "cuda" if backend == "nccl" else "cpu")
            self._weights = SharedWeights(mesh=mesh, gather=WeightGather(self._store))
            if backend == "nccl":
                self._weights.gather.watch(group.abort)
        return self._weights

    def close(self) -> None:
        """Watch for failures of other processes no more."""
        if self._weights is not None:
            self._weights.gather.stop_watching()

    def announce(self, failure: Failure) -> None:
        """Let the next exchange of the other processes, or gathering of weights, fail with `failure`."""
        if self._weights is None:
            self._tell(failure)
            return
        self._weights.gather.announce(failure)
        # One that a GPU keeps waiting may never listen: then the launcher ends it, as soon as this one has ended.
        telling = Thread(target=self._tell, args=(failure,), daemon=True)
        telling.start()
        telling.join(LAST_WORDS_SECONDS)
        self._is_unheard = telling.is_alive()

    def _tell(self, failure: Failure) -> None:
        with suppress(PeerLostError):  # those that are left know of a failure, too
            self._gather(failure)

    def _gather(self, value: Value) -> list[Value]:
        values: list[Value] = [value] * self.size
        try:
            dist.all_gather_object(values, value, group=self._values)
        except RuntimeError as error:
            raise PeerLostError(error) from error
        return values

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum tensors over all processes, in buckets."""
        try:
            for bucket in _buckets(tensors):
                joined = torch.cat([tensor.reshape(-1) for tensor in bucket])
                dist.all_reduce(joined, group=self._gradients)
                for tensor, summed in zip(bucket, torch.split(joined, [one.numel() for one in bucket]), strict=True):
                    tensor.copy_(summed.view_as(tensor))
        except RuntimeError as error:  # of the network, of NCCL, or of memory
            raise (PeerLostError(error) if CLOSED.search(str(error)) else SumError(error)) from error

    def wait_for_first(self) -> None:
        """Wait until the connection to the first process is closed."""
        if not self.is_first and not self._is_unheard:
            with suppress(PeerLostError):
                self._gather(None)


def _buckets(tensors: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]]:
    """Return the tensors, in order, in parts of one dtype and up to `BUCKET_BYTES`, or of one tensor."""
    starts, size = [0], 0
    for index, tensor in enumerate(tensors):
        size += tensor.nbytes
        if index > starts[-1] and (size > BUCKET_BYTES or tensor.dtype != tensors[index - 1].dtype):
            starts.append(index)
            size = tensor.nbytes
    return [tensors[start:end] for start, end in pairwise([*starts, len(tensors)]) if end > start]


@contextmanager
def joined(place: Place, num_processes: int, *, on_cpu: bool) -> Iterator[ProcessGroup]:
    """Join the other processes of a run of `num_processes`, and leave together; alone, if there are none.

    On exit each waits for all, so that none is ended by a launcher while it writes or prints.

    Raises:
        HardwareError: a launcher started another number of processes, or not all have a GPU.
        RendezvousError: they did not meet.
    """
    if place.size != num_processes:
        raise HardwareError(
            f"the launcher started {place.size} processes, and this is {num_processes}",
            setting="training.num_gpus",
            hint="Leave it out: the launcher decides.",
        )
    if place.size == 1:
        yield ALONE
        return
    if not on_cpu:
        use_own_gpu(place, os.environ, torch.cuda.device_count())
        _check_own_gpu(place)
    group = _meet(place, has_gpu=not on_cpu and torch.cuda.is_available())
    yield group
    group.exchange(None)
    group.close()
    dist.destroy_process_group()  # after a failure it might wait for others


def _check_own_gpu(place: Place) -> None:
    """Check that the processes of this machine do not share a GPU.

    Raises:
        HardwareError: they may.
    """
    if place.local_size > 1 and torch.cuda.device_count() > 1:
        raise HardwareError(
            f"process {place.rank} sees {torch.cuda.device_count()} GPUs, and can't choose its own",
            hint=f"Start each process with {VISIBLE} set to its own.",
        )


def _check_all_have(place: Place, values: dist.ProcessGroup, *, has_gpu: bool) -> None:
    """Check that either all processes have a GPU, or none.

    Raises:
        HardwareError: some have one.
    """
    found = [has_gpu] * place.size
    dist.all_gather_object(found, has_gpu, group=values)
    if len(set(found)) > 1:
        without = ", ".join(str(rank) for rank, has in enumerate(found) if not has)
        raise HardwareError(
            f"{place.size} processes were started, and no GPU is visible to PyTorch in: {without}",
            hint="Start as many on each machine as it has GPUs, and check nvidia-smi there.",
        )


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a log is not transformers' about a group of processes that it does not use: it is ours."""
    return "parallel_mode != ParallelMode.DISTRIBUTED" not in record.getMessage()


def _interface_towards(address: str, port: int) -> str | None:
    """Return the network interface by which this machine reaches an address; None if it has no name.

    gloo would take the one of the host's name, which on many machines leads nowhere, or to the machine itself.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))  # sends nothing
        own = probe.getsockname()[0]
    return next((name for name, part in _addresses() if part == own), None)


def _outer_interface() -> str | None:
    """Return an interface that leads to other machines: the first that is up, and not of containers; None without."""
    states = psutil.net_if_stats()
    return next(
        (
            name
            for name, part in _addresses()
            if states[name].isup and not part.startswith("127.") and not name.startswith(CONTAINERS)
        ),
        None,
    )


def _addresses() -> Iterator[tuple[str, str]]:
    """Yield each interface with each of its IPv4 addresses."""
    for name, parts in psutil.net_if_addrs().items():
        yield from ((name, part.address) for part in parts if part.family == socket.AF_INET)


def _meet(place: Place, *, has_gpu: bool) -> DistributedGroup:
    try:
        interface = _interface_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if interface is not None and interface.startswith("lo") and place.local_size < place.size:
            interface = _outer_interface()  # of the first machine, whose name is often that of itself alone
        if interface is not None:
            os.environ.setdefault(GLOO_INTERFACE, interface)
        store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=RENDEZVOUS))
        # On one machine torchrun keeps its store when it restarts the processes, with the addresses of those that
        # ended. Several machines count restarts apart, and get a new store.
        start = os.environ.get(RESTARTS, "0") if place.local_size == place.size else "0"
        store = PrefixStore(f"start {start}", store)
        dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=RENDEZVOUS)
        values = dist.new_group(backend="gloo", timeout=PATIENCE)
        _check_all_have(place, values, has_gpu=has_gpu)
        gradients = dist.new_group(backend="nccl" if has_gpu else "gloo", timeout=PATIENCE)
        # Now, so that its buffers are taken before it is measured what fits.
        dist.all_reduce(torch.ones(1, device="cuda" if has_gpu else "cpu"), group=gradients)
    except HardwareError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise RendezvousError(
            f"process {place.rank} did not meet the other {place.size - 1}: {str(error).splitlines()[0]}",
            hint="All must start within ten minutes, and reach MASTER_ADDR and MASTER_PORT.",
        ) from error
    logging.getLogger("transformers.training_args").addFilter(_is_news)
    return DistributedGroup(place, store, values, gradients)
