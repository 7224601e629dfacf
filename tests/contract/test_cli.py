"""What a shell sees at the edges: closed pipes, full disks, wrong flags, secrets in JSON."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from qlora_cli.cli.app import app
from qlora_cli.cli.without_cache import ensure_cache
from tests.conftest import RunQlora

FULL = Path("/dev/full")
# Python then holds output back until it exits, as it does for every user; some machines switch that off.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def run_without_reader(*arguments: str) -> tuple[int, str]:
    """Run with a stdout whose reader has left before the first byte; return the exit code and stderr."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qlora_cli", *arguments],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            env=BUFFERED,
            timeout=300,
            check=False,
        )
    finally:
        os.close(write_end)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "arguments", [["--version"], ["config", "show"], ["config", "show", "--json"], ["config", "schema"]]
)
def test_a_reader_that_left_ends_every_command_the_same_way(arguments: list[str]) -> None:
    assert run_without_reader(*arguments) == (141, "")


def test_a_reader_that_left_does_not_change_the_exit_code_of_an_error() -> None:
    code, errors = run_without_reader("load", "--json")
    assert code == 2
    assert "MODEL: is missing" in errors
    assert "BrokenPipe" not in errors


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["config", "show", "--json"], 1, "the disk is full"),
        (["config", "show"], 1, "the disk is full"),
        (["config", "schema"], 1, "the disk is full"),
        (["load", "--json"], 2, "MODEL: is missing"),
    ],
)
def test_a_full_disk_below_stdout_is_one_message(arguments: list[str], code: int, expected: str) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qlora_cli", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=BUFFERED,
            timeout=300,
            check=False,
        )
    assert done.returncode == code
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_ends_a_command_from_outside_is_one_object_too(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, message: str
) -> None:
    def ended(*_: object) -> None:
        raise raised

    monkeypatch.setattr("qlora_cli.settings.resolve.describe", ended)
    done = CliRunner().invoke(app, ["config", "show", "--json"])
    assert done.exit_code == code
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == code
    assert message in error["message"]


@pytest.mark.parametrize("arguments", [[], ["config"]])
def test_no_arguments_show_the_help_and_no_error(run_qlora: RunQlora, arguments: list[str]) -> None:
    done = run_qlora(*arguments)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: ")
    assert "error:" not in done.stderr
    assert "hint:" not in done.stderr


def test_a_usage_error_says_so_in_json(run_qlora: RunQlora) -> None:
    error = run_qlora("train", "--micro-batchsize", "1", "--json").json["error"]
    assert error["type"] == "UsageError"
    assert error["hint"] == "Did you mean --micro-batch-size?"
    assert error["exit_code"] == 2


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("train --lr 1e-4", "It is --learning-rate here."),
        ("train --num-epochs 3", "It is --epochs here."),
        ("train --lora-r 8", "It is --rank here."),
        ("inspect-memory m --lora_r 8", "It is --rank here."),
        ("train --load-in-4bit", "It is --quant nf4 here, the default."),
        ("train --lora-dropout 0", "It is --set lora.dropout=VALUE here."),
        (
            "train --deepspeed x",
            "Several GPUs are --num-gpus here, and a model that is sharded among them --strategy fsdp.",
        ),
        ("train run.yaml", "A settings file is given as --config run.yaml"),
        ("train a.yml more", "A settings file is given as --config a.yml"),
        ("train m rows.jsonl", "The model is given as --model, and rows as --dataset"),
        ("evaluate m rows.jsonl", "Rows are given as --dataset rows.jsonl"),
        ("generate m What is it?", "A prompt is given as --prompt 'What is it?'"),
        ("load m more", "See qlora load --help"),
        ("generate m --lr 1", "See qlora generate --help"),  # it trains nothing
        ("config show --set lr=1", "It is training.learning_rate here."),
        ("config show --set training.lr=1", "It is training.learning_rate here."),
    ],
)
def test_the_habits_of_other_tools_get_a_hint(arguments: str, hint: str) -> None:
    done = CliRunner().invoke(app, arguments.split())
    assert done.exit_code == 2
    assert f"  hint: {hint}\n" in done.stderr


def test_a_file_of_another_tool_is_one_problem_and_migrated(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text("base_model: m\nsequence_len: 64\nlora_r: 3\ndatasets: [{path: rows}]\nx: 1\nlr: 1\n")
    done = CliRunner().invoke(app, ["train", "--config", str(theirs), "--rank", "x"])
    assert (done.exit_code, done.stderr.count("error:")) == (2, 1)
    assert f"hint: Turn it into ours: qlora migrate {theirs} > qlora.yaml" in done.stderr
    done = CliRunner().invoke(app, ["migrate", str(theirs)])
    assert done.exit_code == 0
    assert "  rank: 3  # lora_r\n" in done.stdout
    assert "left out: x: qlora has no such setting.\n" in done.stderr
    ours = tmp_path / "ours.yaml"
    ours.write_text(done.stdout)
    shown = json.loads(CliRunner().invoke(app, ["config", "show", "--config", str(ours), "--json"]).stdout)
    assert shown["lora.rank"]["value"] == 3
    written = json.loads(CliRunner().invoke(app, ["migrate", str(theirs), "--json"]).stdout)
    assert set(written) == {"tool", "values", "sources", "left_out"}


@pytest.mark.parametrize("text", [None, "a: [", "\xff", "- 1"])
def test_a_file_that_cannot_be_read_is_the_only_problem(tmp_path: Path, text: str | None) -> None:
    config = tmp_path / "run.yaml"
    if text is not None:
        config.write_bytes(text.encode("latin-1"))
    done = CliRunner().invoke(app, ["train", "--config", str(config), "--rank", "x"])
    assert (done.exit_code, done.stderr.count("error:")) == (2, 1)
    assert str(config) in done.stderr


@pytest.mark.parametrize("arguments", [["train", "--zzz", "1"], ["--json", "train"]])
def test_no_suggestion_rather_than_a_far_one(run_qlora: RunQlora, arguments: list[str]) -> None:
    done = run_qlora(*arguments)
    assert done.code == 2
    assert "Did you mean" not in done.stderr
    assert "--help" in done.stderr


def test_several_problems_are_counted(run_qlora: RunQlora) -> None:
    assert run_qlora("config", "show", "--rank", "0", "--alpha", "x").stderr.endswith("2 problems\n")
    assert "problem" not in run_qlora("config", "show", "--rank", "0").stderr


def test_a_switch_that_is_off_is_named_as_it_was_typed(run_qlora: RunQlora) -> None:
    shown = run_qlora("config", "show", "--no-double-quant", "--json").json
    assert shown["quantization.double_quant"] == {"value": False, "origin": "--no-double-quant"}


@pytest.mark.parametrize("secret", ["exit_code", 'quo"te', "schlüssel"])
def test_redaction_neither_breaks_json_nor_misses_what_json_escapes(run_qlora: RunQlora, secret: str) -> None:
    done = run_qlora("config", "show", "--rank", secret, "--json", env={"WANDB_API_KEY": secret})
    error = done.json["error"]
    assert error["exit_code"] == 2
    assert "***" in error["message"]
    assert secret not in error["message"]


INTERRUPTED_AT = """
import os, signal, sys
from qlora_cli.__main__ import main
sys.argv = ["qlora", "inspect-memory", "qlora_cli/demo/assets/base"]
num_imports = 0
def count(event, _):
    global num_imports
    num_imports += event == "import"
    if event == "import" and num_imports == {number}:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(count)
main()
"""


# A start has 500 imports if all that it predicts is in the cache, and some thousands otherwise.
@pytest.mark.parametrize("number", [2, 10, 30, 100, 200, 400])
def test_ctrl_c_at_any_moment_of_the_start_ends_without_a_traceback(number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT.format(number=number)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in done.stderr


THREAD_ASKS_FOR_INTERPRETER = """
import atexit, sys, threading, time
from datetime import timedelta
import torch.distributed
from qlora_cli.__main__ import main

class Slow:
    sleep = staticmethod(time.sleep)
    def __del__(self):
        self.sleep(2)

def hook(event, arguments):
    if event == "import" and arguments[0] == "qlora_cli.cli.app":
        atexit.register(print, "exit function")

slow = Slow()
store = torch.distributed.HashStore()
threading.Thread(target=store.wait, args=(["never"], timedelta(seconds=1)), daemon=True).start()
sys.addaudithook(hook)
sys.argv = ["qlora", *{arguments}]
main()
"""


# As one of several processes may whose thread still waits for another. By the end that Python has, the code is -6.
@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["train", "--rank", "x"], 2)])
def test_a_thread_that_comes_back_while_a_process_ends_does_not_change_its_code(
    arguments: list[str], code: int
) -> None:
    script = THREAD_ASKS_FOR_INTERPRETER.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "exit function")
    assert "terminate called" not in done.stderr


@pytest.mark.parametrize("home", ["file", "read-only"])
def test_a_home_that_cannot_be_written_to_means_no_cache_and_a_warning(
    run_qlora: RunQlora, base_model: Path, rows: Path, tmp_path: Path, home: str
) -> None:
    folder = tmp_path / "home"
    if home == "file":
        folder.write_text("")
    elif home == "read-only":
        folder.mkdir(0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("root may write anywhere")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    without_cache = {"HOME": str(folder), "XDG_CACHE_HOME": "", "QLORA_CACHE": "", "TMPDIR": str(temporary)}
    done = run_qlora("inspect-data", "--model", base_model, "--dataset", rows, "--rows", "0", env=without_cache)
    assert done.code == 0, done.stderr
    assert done.stderr.count("can't be written to: nothing is cached") == 1
    assert not any(path.name.startswith("qlora-") for path in temporary.iterdir())


def test_a_home_that_is_missing_means_no_cache_until_the_command_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"HOME": f"{os.devnull}/home", "XDG_CACHE_HOME": "", "QLORA_CACHE": ""}.items():
        monkeypatch.setenv(name, value)
    at_its_end: list[Callable[[], None]] = []
    ensure_cache(SimpleNamespace(call_on_close=at_its_end.append))
    temporary = Path(os.environ["QLORA_CACHE"])
    assert temporary.is_dir()
    assert f"warning: {os.devnull}/home/.cache/qlora can't be written to" in capsys.readouterr().err
    (remove,) = at_its_end
    remove()
    assert not temporary.exists()
    assert "QLORA_CACHE" not in os.environ


def test_a_cache_that_is_named_and_cannot_be_written_to_is_refused(
    run_qlora: RunQlora, base_model: Path, rows: Path
) -> None:
    named = {"QLORA_CACHE": f"{os.devnull}/named"}
    refused = run_qlora("inspect-data", "--model", base_model, "--dataset", rows, env=named)
    assert (refused.code, "Set QLORA_CACHE to another directory." in refused.stderr) == (2, True)
