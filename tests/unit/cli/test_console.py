"""Results in two columns: whole lines in a pipe, wrapped at words on a terminal."""

import pytest
from rich.console import Console

from qlora_cli.cli import console as module
from qlora_cli.cli.console import print_lines, print_rows

ROWS = [
    (
        "original",
        "KL divergence 0.031 nats a token, top token the same at 89.14%, perplexity 173.3780 against 169.5927",
    ),
    ("short", "one two"),
    ("path", "/" + "directory/" * 9),
]


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_rows(ROWS)
    return capsys.readouterr().out.splitlines()


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(module, "console", lambda: Console(force_terminal=True, width=width, color_system=None))


def test_in_a_pipe_each_row_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == [f"  {name:<8}  {value}" for name, value in ROWS]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_on_a_terminal_words_are_unbroken_and_values_stay_in_their_column(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_terminal(monkeypatch, width)
    *lines, short, path = shown(capsys)
    assert len(lines) > 1
    assert all(len(line) <= width for line in lines)
    assert [line[:12] for line in lines] == ["  original  ", *[" " * 12] * (len(lines) - 1)]
    assert " ".join(line[12:] for line in lines) == ROWS[0][1]
    assert short == "  short     one two"
    assert path.endswith(ROWS[2][1])  # unbroken, so that it can be copied


def test_a_terminal_too_narrow_for_words_gets_unbroken_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_terminal(monkeypatch, 24)
    assert len(shown(capsys)) == len(ROWS)


LINES = ["  a setting  and a long note of the run, which is longer than a line", "", "    short"]


def test_lines_are_unbroken_in_a_pipe_and_wrapped_and_indented_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_lines(LINES)
    assert capsys.readouterr().out.splitlines() == LINES
    on_a_terminal(monkeypatch, 40)
    print_lines(LINES)
    *wrapped, empty, short = capsys.readouterr().out.splitlines()
    assert len(wrapped) > 1
    assert all(len(line) <= 40 for line in wrapped)
    assert all(line.startswith("    ") for line in wrapped[1:])
    assert " ".join([wrapped[0], *(line.strip() for line in wrapped[1:])]) == LINES[0]
    assert (empty, short) == ("", "    short")
