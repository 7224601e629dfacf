"""Commands that compile nothing start without PyTorch's compiler."""

import os
from pathlib import Path

import pytest

import qlora_cli.cli.commands
from qlora_cli.cli.without_compiler import VARIABLE, leave_out_compiler
from qlora_cli.settings.choices import Attention

COMMANDS = Path(qlora_cli.cli.commands.__file__).parent


@pytest.mark.parametrize(
    ("attention", "compiles_layers", "expected"),
    [
        (Attention.AUTO, False, "1"),
        (Attention.FLEX_ATTENTION, False, None),
        (Attention.SDPA, True, None),
    ],
)
def test_it_is_left_out_unless_something_is_compiled(
    monkeypatch: pytest.MonkeyPatch, attention: Attention, compiles_layers: bool, expected: str | None
) -> None:
    monkeypatch.setenv(VARIABLE, "")  # restored afterwards
    monkeypatch.delenv(VARIABLE)
    leave_out_compiler(attention, compiles_layers=compiles_layers)
    assert os.environ.get(VARIABLE) == expected


def test_what_the_user_has_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    leave_out_compiler()
    assert os.environ[VARIABLE] == "0"


def test_every_command_that_imports_torch_decides_it() -> None:
    importing = {}
    for file in COMMANDS.glob("*.py"):
        code = file.read_text(encoding="utf-8")
        if "importing(reporter)" in code:
            importing[file.stem] = "leave_out_compiler(" in code
    assert {"train", "load", "merge", "generate", "evaluate", "tune"} <= importing.keys()
    assert [name for name, decides in importing.items() if not decides] == []
