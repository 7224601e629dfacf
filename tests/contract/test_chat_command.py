"""`qlora chat` from a pipe, line by line, and on a real terminal with Ctrl-C and Ctrl-D."""

import json
import os
import pty
import select
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from qlora_cli.cli.app import app
from tests.contract.test_generate_command import CPU, answered, only
from tests.contract.test_generate_command import adapter as adapter
from tests.support.models.loading import save_model
from tests.support.processes.forks import end_of, start_on_terminal


def qlora_chat(model: Path, *lines: str, flags: tuple[str, ...] = CPU) -> Result:
    """Run the command on lines from a pipe, in this process, which has imported torch already."""
    return CliRunner().invoke(app, ["chat", str(model), *flags], input="".join(f"{line}\n" for line in lines))


# ---- from a pipe


def test_each_line_of_a_pipe_is_answered_and_its_end_ends_the_chat(base_model: Path) -> None:
    done = qlora_chat(base_model, "hello", "", "/reset", "hello")
    assert done.exit_code == 0, done.output
    text = only(answered(base_model, "--prompt", "hello"))["text"]
    assert done.stdout == f"{text}\n{text}\n"
    assert "the conversation starts over" in done.stderr


@pytest.mark.parametrize("command", ["/quit", "/exit"])
def test_quit_ends_before_the_lines_that_follow(base_model: Path, command: str) -> None:
    done = qlora_chat(base_model, command, "hello")
    assert (done.exit_code, done.stdout) == (0, "")


def test_help_lists_every_command(base_model: Path) -> None:
    shown = qlora_chat(base_model, "/help").stderr
    for name in ("/help", "/reset", "/undo", "/system TEXT", "/save FILE", "/exit"):
        assert f"  {name}" in shown


def test_a_turn_is_taken_back_and_what_is_left_is_saved_as_rows_to_train_on(base_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    lines = ("/undo", "hello", "What is a list?", "/undo", f"/save {file}", "/system Be brief.", f"/save {file}")
    done = qlora_chat(base_model, *lines, f"/save {tmp_path}")
    assert done.exit_code == 0, done.output
    first, second = (json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines())
    answer = only(answered(base_model, "--prompt", "hello"))["text"]
    assert first == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    assert second == [{"role": "system", "content": "Be brief."}, *first]
    assert "there is nothing to take back" in done.stderr
    assert "taken back: What is a list?" in done.stderr
    assert f"error: {tmp_path} can't be written" in done.stderr
    again = qlora_chat(base_model, "hello", "What is a list?", "/undo", "What is a list?")
    assert again.stdout.splitlines()[-1] == again.stdout.splitlines()[1]


def test_a_system_prompt_is_set_by_flag_and_by_command_and_taken_away(base_model: Path) -> None:
    pirate = "Answer with the name of a function and nothing more, please."
    by_flag = qlora_chat(base_model, "What is a list?", flags=(*CPU, "--system", pirate, "--temperature", "1"))
    by_command = qlora_chat(base_model, f"/system {pirate}", "What is a list?", flags=(*CPU, "--temperature", "1"))
    without = qlora_chat(
        base_model, f"/system {pirate}", "/system", "What is a list?", flags=(*CPU, "--temperature", "1")
    )
    plain = qlora_chat(base_model, "What is a list?", flags=(*CPU, "--temperature", "1"))
    assert by_flag.stdout == by_command.stdout != plain.stdout
    assert without.stdout == plain.stdout
    assert "the system prompt holds from here on" in by_command.stderr


def test_an_unknown_command_is_reported_and_not_sent(base_model: Path) -> None:
    done = qlora_chat(base_model, "/restart", "/reset now")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "error: no command /restart" in done.stderr
    assert "/help lists the commands" in done.stderr
    sent = qlora_chat(base_model, " /restart")
    assert sent.stdout == only(answered(base_model, "--prompt", "/restart"))["text"] + "\n"


def test_base_and_adapter_answer_each_turn_one_below_the_other(adapter: Path) -> None:
    done = qlora_chat(adapter, "hello", flags=(*CPU, "--compare"))
    base, changed = answered(adapter, "--prompt", "hello", "--compare")["answers"][0]["answers"]
    assert done.stdout == f"base\n{base['text']}\nadapter\n{changed['text']}\n"
    assert base["text"] != changed["text"]


def test_a_full_conversation_asks_for_a_reset_and_continues(base_model: Path) -> None:
    done = qlora_chat(base_model, "word " * 600, "/reset", "hello")
    assert done.exit_code == 0, done.output
    assert "the model has 512 positions" in done.stderr
    assert "hint: /reset starts over" in done.stderr
    assert done.stdout == only(answered(base_model, "--prompt", "hello"))["text"] + "\n"


def test_a_template_that_refuses_a_turn_does_not_end_the_chat(base_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "once.jinja"
    template.write_text(
        "{% if messages | length > 1 %}{{ raise_exception('once') }}{% endif %}{{ messages[0].content }}"
    )
    done = qlora_chat(base_model, "hello", "again", "/reset", "hello", flags=(*CPU, "--chat-template", str(template)))
    assert done.exit_code == 0, done.output
    assert "the chat template refuses these messages (user, assistant, user): once" in done.stderr
    text = only(answered(base_model, "--prompt", "hello", "--chat-template", template))["text"]
    assert done.stdout == f"{text}\n{text}\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--compare",), "--compare: there is nothing to compare"),
        (("--top-p", "0.5"), "--top-p: has no effect"),
        (("--system", " "), "--system: is empty"),
    ],
)
def test_mistakes_end_with_exit_code_2(base_model: Path, flags: tuple[str, ...], expected: str) -> None:
    done = qlora_chat(base_model, "hello", flags=(*CPU, *flags))
    assert (done.exit_code, done.stdout) == (2, "")
    assert expected in done.stderr


def test_a_model_without_a_template_can_generate_but_not_chat(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    done = qlora_chat(base, "hello")
    assert done.exit_code == 2
    assert "has no chat template, which a chat needs" in done.stderr
    assert "--chat-template chatml" in done.stderr


def test_stray_bytes_in_a_pipe_are_a_mistake(base_model: Path) -> None:
    done = CliRunner().invoke(app, ["chat", str(base_model), *CPU], input=b"a\xff\n")
    assert done.exit_code == 2
    assert "not UTF-8" in done.stderr


# ---- on a terminal


class Terminal:
    """A `qlora chat` on a pseudo-terminal, as a user runs it."""

    def __init__(self, *arguments: str | Path) -> None:
        self._master, self._slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb"}  # no colours, and nothing that is redrawn
        self._process = start_on_terminal(["chat", *map(str, arguments)], environment, os.ttyname(self._slave))
        self._seen = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        os.close(self._master)
        os.close(self._slave)

    def type(self, keys: str) -> None:
        """Press keys; `\\x03` is Ctrl-C and `\\x04` Ctrl-D."""
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, *, pressing: str = "") -> str:
        """Return what was shown since the last call, including `text`; press `pressing` again while nothing comes."""
        deadline = time.monotonic() + 300
        self.type(pressing)
        while text not in self._seen:
            assert time.monotonic() < deadline, f"{text!r} was not shown: {self._seen}"
            if select.select([self._master], [], [], 3)[0]:
                self._seen += os.read(self._master, 4096).decode(errors="replace")
            else:
                self.type(pressing)
        before, _, self._seen = self._seen.partition(text)
        return before + text

    def exit_code(self) -> int:
        """Wait for the process to end; what it still writes fits into the terminal's buffer."""
        return end_of(self._process, seconds=120)


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_chat(base_model: Path, tmp_path: Path) -> None:
    endless = shutil.copytree(base_model, tmp_path / "endless")  # has positions for minutes
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10**6}))
    with Terminal(endless, "--device", "cpu", "--max-new-tokens", "100000") as terminal:
        terminal.wait_for("> ")
        terminal.type("hello\n")
        terminal.wait_for("def ")
        terminal.type("\x03")
        terminal.wait_for("stopped; the answer so far stays in the conversation")
        terminal.wait_for("> ")
        terminal.type("/reset\n")
        terminal.wait_for("the conversation starts over")
        terminal.wait_for("> ")
        # Between showing the prompt and waiting for keys, Python notes a signal but does not look.
        terminal.wait_for("interrupted", pressing="\x03")
        assert terminal.exit_code() == 130


def test_ctrl_d_ends_the_chat(base_model: Path) -> None:
    with Terminal(base_model, "--device", "cpu", "--max-new-tokens", "4") as terminal:
        assert "/exit or Ctrl-D ends" in terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0
