"""A process that fails leaves word to those that wait for its weights."""

from threading import Event

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined] # given to it when it is imported

from qlora_cli.errors import OutOfMemoryError
from qlora_cli.ranks.group import Failure, PeerError
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
