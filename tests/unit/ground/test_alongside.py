"""What is computed in a forked process is as if it were computed here, and the fork ends with its context."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from qlora_cli.alongside import alongside

IS_FORKED = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1


def process_of(file: Path) -> int:
    return int(file.read_text(encoding="utf-8"))


def is_running(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def noting(file: Path, then: Callable[[], object]) -> Callable[[], object]:
    """Return what notes the process that computes `then`."""

    def compute() -> object:
        file.write_text(str(os.getpid()), encoding="utf-8")
        return then()

    return compute


@pytest.fixture(params=[True, False], ids=["two cores", "one core"])
def forks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param and IS_FORKED:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    return request.param and IS_FORKED


@pytest.mark.parametrize("value", [None, 0, "text", {"a": (1, 2)}, b"x" * 1_000_000], ids=lambda value: str(value)[:5])
def test_the_result_is_that_of_the_call(value: object, forks: bool, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with alongside(noting(file, lambda: value)) as result:
        assert result() == value
    assert (process_of(file) != os.getpid()) == forks
    assert not forks or not is_running(process_of(file))


@pytest.mark.usefixtures("forks")
def test_an_exception_is_raised_where_the_result_is_asked_for() -> None:
    def fail() -> None:
        raise ValueError("wrong")

    with alongside(fail):
        pass
    with alongside(fail) as result, pytest.raises(ValueError, match="wrong"):
        result()


def test_a_fork_that_dies_is_replaced_by_this_process(tmp_path: Path) -> None:
    here = os.getpid()

    def dies_elsewhere() -> int:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return 7

    with alongside(noting(tmp_path / "pid", dies_elsewhere)) as result:
        assert result() == 7
    assert process_of(tmp_path / "pid") == here


@pytest.mark.skipif(not IS_FORKED, reason="one core")
@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError])
def test_the_fork_ends_with_the_context(raised: type[BaseException]) -> None:
    receiving, sending = os.pipe()
    forks: list[int] = []

    def waits() -> None:
        os.write(sending, b"%d" % os.getpid())
        signal.pause()

    def interrupted() -> None:
        with alongside(waits):
            forks.append(int(os.read(receiving, 20)))
            assert is_running(forks[0])
            raise raised

    with pytest.raises(raised):
        interrupted()
    assert not is_running(forks[0])
    os.close(receiving)
    os.close(sending)
