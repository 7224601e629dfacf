"""Which process of a run this is, by the variables that launchers set or leave behind."""

import os

import pytest

from qlora_cli.errors import HardwareError
from qlora_cli.ranks.place import SIZES, TORCHRUN, VISIBLE, Place, place_in, use_own_gpu, without_launcher

BY_TORCHRUN = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_torchrun_says_which_process_this_is() -> None:
    assert place_in(BY_TORCHRUN) == Place(rank=3, size=4, local_rank=1, local_size=2)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", ["1", "", "x", "0"])
def test_without_a_launcher_of_several_a_process_is_the_only_one(name: str, value: str) -> None:
    assert place_in({"RANK": "0", "LOCAL_RANK": "0", name: value}) == Place()


@pytest.mark.parametrize("name", sorted({*SIZES} - {TORCHRUN}))
def test_one_of_several_processes_that_torchrun_did_not_start_is_refused(name: str) -> None:
    with pytest.raises(HardwareError, match=rf"one of 2 processes \({name} is 2\)") as caught:
        place_in({name: "2"})
    assert caught.value.exit_code == 2
    assert "--num-gpus 2" in str(caught.value.hint)
    assert f"unset {name}" in str(caught.value.hint)


@pytest.mark.parametrize("name", sorted({*BY_TORCHRUN} - {TORCHRUN}))
def test_a_variable_of_torchrun_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(HardwareError, match=f"{name} is not set"):
        place_in({other: value for other, value in BY_TORCHRUN.items() if other != name})


@pytest.mark.parametrize(
    ("given", "local_rank", "expected"),
    [(None, 1, "1"), ("4,7", 1, "7"), ("4,7", 0, "4"), ("GPU-a, GPU-b", 1, "GPU-b"), ("3", 1, "3"), ("", 1, "")],
)
def test_each_process_of_a_machine_sees_its_own_gpu(given: str | None, local_rank: int, expected: str) -> None:
    environment = {} if given is None else {VISIBLE: given}
    use_own_gpu(Place(rank=5, size=8, local_rank=local_rank, local_size=2), environment, num_gpus=2)
    assert environment[VISIBLE] == expected


def test_the_only_process_of_a_machine_sees_what_it_saw() -> None:
    environment = {VISIBLE: "0,1"}
    use_own_gpu(Place(), environment, num_gpus=2)
    assert environment == {VISIBLE: "0,1"}


def test_the_variables_of_a_launcher_are_hidden_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in BY_TORCHRUN.items():
        monkeypatch.setenv(name, text)
    with without_launcher():
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()
    assert {name: os.environ[name] for name in BY_TORCHRUN} == BY_TORCHRUN
