"""The state that a run saves to be resumed: read back as written, and any other content is refused with its file."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from qlora_cli.errors import OutputDirectoryError
from qlora_cli.training.resuming.loop_state import LoopState, Progress, check_state, generator_states

STATE = LoopState(
    step=3,
    summed_loss=0.5,
    total_loss=float("nan"),
    reported_step=3,
    num_tokens=9,
    means={"entropy": [1.0, 2.0]},
    never_used=["layer"],
    progress=Progress(eval_losses={2: 1.5, 3: float("inf")}),
)


GROUP = {"lr": 0.1, "params": [0]}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a checkpoint with everything that a run is resumed from."""
    folder = tmp_path / "step-3"
    folder.mkdir()
    STATE.write(folder)
    trainer = {"global_step": 3, "max_steps": 5, "num_train_epochs": 1, "epoch": 0.5}
    (folder / "trainer_state.json").write_text(json.dumps(trainer))
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [GROUP]}, folder / "optimizer.pt")
    torch.save({"last_epoch": 3}, folder / "scheduler.pt")
    torch.save(generator_states(), folder / "rng_state.pth")
    return folder


def test_the_state_is_read_back_as_written(checkpoint: Path) -> None:
    check_state(checkpoint)
    assert repr(LoopState.read(checkpoint)) == repr(STATE)


LOOP = json.loads(json.dumps({"step": 3, "summed_loss": 0, "total_loss": 0, "reported_step": 3, "num_tokens": 9}))
ODD: list[tuple[str, object]] = [
    ("loop_state.json", []),
    ("loop_state.json", 5),
    ("loop_state.json", {}),
    ("loop_state.json", {**LOOP, "means": [], "never_used": [], "progress": {"eval_losses": {}}}),
    ("loop_state.json", {**LOOP, "means": {}, "never_used": "x", "progress": {"eval_losses": {}}}),
    ("loop_state.json", {**LOOP, "means": {}, "never_used": [], "progress": {"eval_losses": {"x": 1}}}),
    ("loop_state.json", {**LOOP, "step": "x", "means": {}, "never_used": [], "progress": {"eval_losses": {}}}),
    ("trainer_state.json", []),
    ("trainer_state.json", {"global_step": "x", "max_steps": 5, "num_train_epochs": 1}),
    ("trainer_state.json", {"global_step": 4, "max_steps": 5, "num_train_epochs": 1}),
    ("trainer_state.json", {"global_step": 3, "max_steps": 5, "num_train_epochs": 1, "log_history": 5}),
]


@pytest.mark.parametrize(("name", "content"), ODD, ids=str)
def test_json_of_other_types_is_refused_with_its_file(checkpoint: Path, name: str, content: object) -> None:
    (checkpoint / name).write_text(json.dumps(content))
    with pytest.raises(OutputDirectoryError) as caught:
        check_state(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint / name} is not what a run saves: ")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\ufeff{}"], ids=["empty", "cut", "deep", "mark"])
def test_invalid_json_is_refused_with_its_file(checkpoint: Path, text: str) -> None:
    (checkpoint / "loop_state.json").write_text(text)
    with pytest.raises(OutputDirectoryError, match=r"loop_state\.json is not what a run saves"):
        check_state(checkpoint)


class Code:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Return the call that unpickling makes."""
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_pickle_of_a_checkpoint_is_refused_and_not_run(
    checkpoint: Path, tmp_path: Path, name: str, is_zip: bool
) -> None:
    torch.save({"state": Code(tmp_path / "ran")}, checkpoint / name, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(OutputDirectoryError, match="holds more than values, or is damaged") as caught:
        check_state(checkpoint)
    assert str(checkpoint / name) in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("content", [[], {"a": 1}, 5, torch.ones(1)], ids=str)
def test_a_pickle_of_something_else_is_refused(checkpoint: Path, name: str, content: object) -> None:
    torch.save(content, checkpoint / name)
    with pytest.raises(OutputDirectoryError, match="does not hold"):
        check_state(checkpoint)


GOOD = generator_states()
CUT = (*GOOD["numpy"][:2], 999, *GOOD["numpy"][3:])
BAD_GROUPS: tuple[object, ...] = ([], "y", 5, [5], [{}], {"a": 1})
BAD_STATES: tuple[object, ...] = ([], {0: 5}, {0: {"step": "x"}}, {0: {"wrapped": {"state1": "x"}}})
OTHERWISE: list[tuple[str, object]] = [
    ("rng_state.pth", {"python": 1, "numpy": 2, "cpu": 3}),
    *(("rng_state.pth", {**GOOD, name: value}) for name in ("python", "numpy", "cpu") for value in ("x", (), None, 5)),
    ("rng_state.pth", {**GOOD, "python": (3, (2**40,) * 625, None)}),
    ("rng_state.pth", {**GOOD, "numpy": CUT}),
    ("rng_state.pth", {**GOOD, "cpu": torch.ones(3)}),
    ("rng_state.pth", {**GOOD, "cuda": "x"}),
    *(("optimizer.pt", {"state": {}, "param_groups": groups}) for groups in BAD_GROUPS),
    *(("optimizer.pt", {"state": {}, "param_groups": [{**GROUP, "lr": rate}]}) for rate in ("x", None, [0.1])),
    *(("optimizer.pt", {"state": {}, "param_groups": [{**GROUP, "params": ones}]}) for ones in ("x", ["x"], None)),
    *(("optimizer.pt", {"state": state, "param_groups": [GROUP]}) for state in BAD_STATES),
    *(("scheduler.pt", {"last_epoch": last}) for last in ("x", None, -1, 1.5, True)),
    *(("scheduler.pt", {"last_epoch": 3, "base_lrs": rates}) for rates in ("x", ["x"], 5)),
    ("scaler.pt", {"scale": "x"}),
    ("scaler.pt", []),
]


@pytest.mark.parametrize(
    ("name", "content"), OTHERWISE, ids=[f"{place}-{name}" for place, (name, _) in enumerate(OTHERWISE)]
)
def test_a_pickle_of_values_of_other_types_is_refused_with_its_file(
    checkpoint: Path, name: str, content: object
) -> None:
    torch.save(content, checkpoint / name)
    with pytest.raises(OutputDirectoryError) as caught:
        check_state(checkpoint)
    assert str(caught.value).startswith(f"{checkpoint / name} is not what a run saves: ")


def test_wrapped_states_of_bitsandbytes_are_accepted(checkpoint: Path) -> None:
    state = {0: {"step": 1, "wrapped": {"state1": torch.ones(2), "unorm_vec": None}}}
    torch.save({"state": state, "param_groups": [GROUP]}, checkpoint / "optimizer.pt")
    check_state(checkpoint)


@pytest.mark.parametrize("size", [0, 10, 400])
def test_a_truncated_pickle_is_refused(checkpoint: Path, size: int) -> None:
    os.truncate(checkpoint / "optimizer.pt", size)
    with pytest.raises(OutputDirectoryError, match=r"optimizer\.pt is not what a run saves"):
        check_state(checkpoint)


class Huge:
    """An object that takes 2 GiB when it is unpickled, without foreign code."""

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return bytearray, (2**31 - 1,)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_a_pickle_that_takes_far_more_memory_than_its_size_is_refused(checkpoint: Path) -> None:
    for as_zip in (True, False):
        torch.save({"last_epoch": Huge()}, checkpoint / "scheduler.pt", _use_new_zipfile_serialization=as_zip)
        with pytest.raises(OutputDirectoryError, match=r"scheduler\.pt is not what a run saves: it takes far more"):
            check_state(checkpoint)
