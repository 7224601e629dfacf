"""Nothing steers the terminal, and no secret is printed: every text for people passes through one place."""

import ast
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.control import STRIP_CONTROL_CODES
from rich.text import Text

import qlora_cli
from qlora_cli.cli.console import TextConsole
from qlora_cli.cli.stderr import redact, sanitize
from tests.conftest import RunQlora, write_jsonl

PACKAGE = Path(qlora_cli.__file__).parent
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
CLIPBOARD, TURNED = "\x1b]52;c;ZXZpbA==\x07", "\u202egpj.exe"
# The modules that write by themselves, with the reason.
WRITERS = {
    "cli/app.py": "its own version",
    "cli/commands/chat.py": "the mark of a prompt",
    "cli/console.py": "the one console",
    "cli/failures.py": "JSON, which is ASCII only",
    "cli/json_output.py": "JSON, which is ASCII only",
    "cli/progress/plain_lines.py": "lines of plain progress",
    "cli/rendering/answer_text.py": "answers: harmless on a terminal, as they are in a pipe",
    "cli/stderr.py": "the one place for lines on stderr",
}


def writers(path: Path) -> Iterator[str]:
    """Yield the calls of a module that write to a terminal by themselves, or make a console."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in {"print", "typer.echo", "Console", "sys.stdout.write", "sys.stderr.write", "rich.print"}:
                yield name


def test_text_for_people_is_written_in_few_places() -> None:
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if any(writers(path))}
    assert modules == set(WRITERS) - {"cli/console.py"}


@pytest.mark.parametrize("bad", [CLIPBOARD, TURNED, "\r", "\x9b31m", "\u2066", "\x00", "\x08"])
def test_what_drives_a_terminal_is_shown_as_its_number(bad: str) -> None:
    number = f"[U+{ord(bad[0]):04X}]"
    assert sanitize(f"error: {bad} there") == f"error: {bad.replace(bad[0], number)} there".replace("\x07", "[U+0007]")
    for text in (f"a {bad} b", Text.assemble("a ", (bad, "bold"), " b")):
        written = printed(text)
        assert bad[0] not in written
        assert number in written or ord(bad[0]) in STRIP_CONTROL_CODES  # rich leaves a few out by itself


def test_text_of_all_languages_and_its_lines_stay() -> None:
    text = "fünf\tजलवायु 👩‍👩‍👧 فارسی\nnext line"
    assert sanitize(text) == text
    assert printed(Text(text)) == printed(text)


def test_styles_stay_next_to_escaped_characters() -> None:
    file = io.StringIO()
    console = TextConsole(file)
    console.print(Text.assemble("a\x1b", ("red", "red"), "b"))
    assert file.getvalue() == "a[U+001B]redb\n"


def test_results_show_no_login_either() -> None:
    assert printed(Text("model  https://user:pw@host/m", style="dim")) == "model  https://***@host/m\n"


def printed(text: str | Text) -> str:
    file = io.StringIO()
    TextConsole(file).print(text, soft_wrap=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pa55@host/path", "https://***@host/path"),
        ("from https://token@huggingface.co", "from https://***@huggingface.co"),
        ("socks5://a:b@127.0.0.1:1080 and http://c:d@e", "socks5://***@127.0.0.1:1080 and http://***@e"),
        ("https://host/path@1.0", "https://host/path@1.0"),
        ("http://localhost:5000/models@main", "http://localhost:5000/models@main"),
        ("postgresql://u:p@ss@host/db", "postgresql://***@host/db"),
        ("https://u:a/b@host", "https://***@host"),
        ("https://h/x?token=abc&y=1&X-Amz-Signature=d", "https://h/x?token=***&y=1&X-Amz-Signature=***"),
        ("me@example.org", "me@example.org"),
        ("hf_abcdefghijklmnop", "hf_***"),
    ],
)
def test_logins_in_addresses_are_not_printed(text: str, expected: str) -> None:
    assert redact(text) == sanitize(text) == expected


# The libraries log and warn by themselves, of names and values that are anybody's.
OF_LIBRARIES = """
import logging, sys, warnings
from qlora_cli.cli.app import main

sys.argv = ["qlora", "--version"]
try:
    main()
except SystemExit:
    pass
own = logging.getLogger("own")
own.addHandler(logging.StreamHandler())
own.propagate = False
for logger in (logging.getLogger("peft"), own):
    logger.warning("\x1b[1mbold\x1b[0m of %s at %s", "\x1b]52;c;ZQ==\x07", "https://a:b@host")
    try:
        raise ValueError("\x1b[2Jhf_abcdefghijklmnop")
    except ValueError:
        logger.exception("failed\u202e")
warnings.warn("a key \x1b]0;x\x07 of https://a:b@host")
warnings.showwarning("\x9b1m", UserWarning, "f", 1, sys.stdout)



class Full:
    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        pass


sys.stderr = Full()
warnings.warn("nobody reads this")  # which is lost, and no error
"""


def test_logs_and_warnings_of_libraries_are_sanitized_like_our_own_lines() -> None:
    ended = subprocess.run([sys.executable, "-c", OF_LIBRARIES], capture_output=True, text=True, check=True)
    assert STEERS.findall(ended.stdout + ended.stderr) == []
    for line in ("bold of [U+001B]]52;c;ZQ==[U+0007] at https://***@host", "failed[U+202E]"):
        assert ended.stderr.splitlines().count(line) == 2
    assert ended.stderr.count("ValueError: [U+001B][2Jhf_***\n") == 2
    assert "UserWarning: a key [U+001B]]0;x[U+0007] of https://***@host\n" in ended.stderr
    assert "f:1: UserWarning: [U+009B]1m\n" in ended.stdout


def test_one_is_singular_in_all_that_a_run_of_one_step_prints(
    run_qlora: RunQlora, base_model: Path, tmp_path: Path
) -> None:
    row = {"messages": [{"role": "user", "content": "Name a metal."}, {"role": "assistant", "content": "Iron."}]}
    data = write_jsonl(tmp_path / "row.jsonl", [row])
    run = tmp_path / "run"
    in_fp32 = ("--dtype", "fp32", "--device", "cpu")
    one_step = ("--max-steps", "1", "--gradient-accumulation-steps", "1")
    commands = (
        ("inspect-data", "--model", base_model, "--dataset", data),
        ("train", "--model", base_model, "--dataset", data, "--output", run, *in_fp32, *one_step),
        ("runs", "show", run),
        ("evaluate", run, "--dataset", data),
        ("merge", run, "--output", tmp_path / "merged", "--base", "original"),
        ("generate", run, "--prompt", "hello", "--max-new-tokens", "1", "--device", "cpu"),
    )
    for command in commands:
        done = run_qlora(*command)
        assert done.code == 0, done.stderr
        output = done.stdout + done.stderr
        assert "1 " in output
        words = re.findall(r"(?<![\d.,])1 [a-z-]+s\b", output)
        assert words == [], (command[0], words)
