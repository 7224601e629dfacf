"""A process that fails leaves word to those that wait for its weights."""

from threading import Event

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined] # given to it when it is imported

from qlora_cli.errors import OutOfMemoryError
from qlora_cli.ranks.group import Failure, PeerError, PeerLostError
from qlora_cli.ranks.weight_gather import WeightGather


def test_the_word_of_a_process_is_its_failure() -> None:
    store = HashStore()
    failing, waiting = WeightGather(store), WeightGather(store)
    waiting.check()
    failing.announce(Failure.of(OutOfMemoryError("no room", hint="Make some."), 3))
    with pytest.raises(PeerError, match=r"process 3 on .* failed: no room") as caught:
        waiting.check()
    assert caught.value.exit_code == OutOfMemoryError.exit_code
    assert caught.value.hint == "Make some."


def test_what_waits_on_a_gpu_is_aborted_at_the_word_of_another_process() -> None:
    store, aborted = HashStore(), Event()
    waiting = WeightGather(store)
    waiting.watch(aborted.set)
    assert not aborted.wait(1.5)
    WeightGather(store).announce(Failure.of(RuntimeError("the card fell off the bus"), 1))
    assert aborted.wait(60)


def test_nothing_is_aborted_after_the_end() -> None:
    store, aborted = HashStore(), Event()
    waiting = WeightGather(store)
    waiting.watch(aborted.set)
    waiting.stop_watching()
    WeightGather(store).announce(Failure.of(RuntimeError("too late"), 1))
    assert not aborted.wait(2.5)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), torch.OutOfMemoryError),
        (RuntimeError("Connection closed by peer"), PeerLostError),
    ],
    ids=["memory", "connection"],
)
def test_memory_that_runs_out_while_weights_are_gathered_is_not_taken_for_the_end_of_another_process(
    monkeypatch: pytest.MonkeyPatch, raised: RuntimeError, expected: type[Exception]
) -> None:
    def gather(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(dist, "all_gather_single", gather, raising=False)  # whose name is new in torch 2.13
    waiting, part = WeightGather(HashStore()), torch.ones(1)
    with pytest.raises(expected):
        waiting(torch.ones(2), part, group=None)  # type: ignore[arg-type]
    WeightGather(waiting._store).announce(Failure.of(RuntimeError("the card fell off the bus"), 1))
    with pytest.raises(torch.OutOfMemoryError if expected is torch.OutOfMemoryError else PeerError):
        waiting(torch.ones(2), part, group=None)  # type: ignore[arg-type]
