"""Processes that do not all start: those that did say so after a time, instead of waiting forever."""

import socket
from datetime import timedelta

import pytest

from qlora_cli.ranks import distributed_group
from qlora_cli.ranks.distributed_group import RendezvousError, joined
from qlora_cli.ranks.place import Place


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_meets_no_other_names_itself_and_ends(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(distributed_group, "RENDEZVOUS", timedelta(seconds=1))
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # else it is set for the tests after this one, too
    place = Place(rank=rank, size=2, local_rank=rank, local_size=2)
    message = f"process {rank} did not meet the other 1: "
    with pytest.raises(RendezvousError, match=message) as raised, joined(place, 2, on_cpu=True):
        pytest.fail("they did not meet")
    assert "within ten minutes" in (raised.value.hint or "")
