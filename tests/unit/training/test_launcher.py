"""Variables that launchers of several processes leave in the environment."""

import os

import pytest

from qlora_cli.errors import HardwareError
from qlora_cli.training.launcher import SIZES, single_process


@pytest.mark.parametrize("name", SIZES)
def test_one_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(HardwareError, match=rf"one of 2 processes \({name} is 2\)") as caught, single_process():
        raise AssertionError("entered")
    assert caught.value.exit_code == 2
    assert f"unset {name}" in str(caught.value.hint)
    assert os.environ[name] == "2"


@pytest.mark.parametrize("value", ["1", "", "x"])
def test_the_variables_of_a_single_process_are_hidden_and_restored(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    left = {"RANK": "0", "WORLD_SIZE": value, "LOCAL_RANK": "0"}
    for name, text in left.items():
        monkeypatch.setenv(name, text)
    with single_process():
        assert not left.keys() & os.environ.keys()
    assert {name: os.environ[name] for name in left} == left
