"""llama.cpp's converter: where it is looked for, the error if it is missing or fails, and that no file is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from huggingface_hub import constants

from qlora_cli.errors import ExportError, MissingDependencyError
from qlora_cli.merging.exports.llama_cpp import converter as converting
from qlora_cli.merging.exports.llama_cpp.converter import SCRIPT, VARIABLE, Converter, convert, find_converter
from qlora_cli.merging.exports.llama_cpp.source_archive import PINNED
from qlora_cli.settings.choices import GgufType
from tests.conftest import Recorder

# A converter that starts another process, as one that reads in several does; both write down their process ids.
HANGS_IN_TWO = """
import os, subprocess, sys, time
open(sys.argv[3], "w").write("half")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1] + ".pids.new", "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".pids.new", sys.argv[1] + ".pids")
time.sleep(600)
"""
CONVERTING = """
import sys
from pathlib import Path
from qlora_cli.cli.termination import signals_as_errors
from qlora_cli.errors import TerminatedError
from qlora_cli.merging.exports.llama_cpp.converter import find_converter, convert
from qlora_cli.settings.choices import GgufType
script, model, target = map(Path, sys.argv[1:])
try:
    with signals_as_errors():
        convert(find_converter(script), model, target, GgufType.AUTO)
except TerminatedError as error:
    sys.exit(error.exit_code)
"""


@pytest.fixture(autouse=True)
def _no_converter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))


def script(directory: Path, code: str = "", name: str = SCRIPT) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(code, encoding="utf-8")
    path.chmod(0o755)
    return path.resolve()


def test_it_is_found_in_the_checkout_or_as_the_named_script(tmp_path: Path) -> None:
    path = script(tmp_path / "llama.cpp")
    assert find_converter(tmp_path / "llama.cpp").script == path
    assert find_converter(path).script == path


def test_a_name_precedes_the_environment_and_that_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path, in_env, named = (script(tmp_path / name) for name in ("bin", "env", "named"))
    assert find_converter(None).script == on_path
    monkeypatch.setenv(VARIABLE, str(in_env.parent))
    assert find_converter(None).script == in_env
    assert find_converter(named.parent).script == named


def test_a_link_is_followed_because_modules_are_next_to_the_script(tmp_path: Path) -> None:
    path = script(tmp_path / "llama.cpp")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / SCRIPT).symlink_to(path)
    assert find_converter(None).script == path


def test_none_is_that_of_the_pinned_archive_or_offline_an_error_with_both_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingDependencyError, match="has to be downloaded once, and HF_HUB_OFFLINE=1") as caught:
        find_converter(None)
    assert "git clone --depth 1 https://github.com/ggml-org/llama.cpp" in str(caught.value.hint)
    assert f"Download {PINNED.url} elsewhere and give it as --llama-cpp {PINNED.name}" in str(caught.value.hint)
    assert caught.value.exit_code == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert find_converter(None) == Converter(script=PINNED.checkout / SCRIPT, is_pinned=True)


def test_a_file_of_the_archive_is_unpacked_once_it_is_needed(tmp_path: Path) -> None:
    file = tmp_path / PINNED.name
    file.write_bytes(b"something else")
    found = find_converter(file)
    assert found == Converter(script=PINNED.checkout / SCRIPT, is_pinned=True, archive=file)
    with pytest.raises(
        MissingDependencyError, match=r"python-0.3.36.tar.gz is not the pinned llama_cpp_python-0.3.36"
    ):
        found.prepare(Recorder())


def test_a_named_place_without_one_is_an_error_although_the_path_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "bin")
    with pytest.raises(MissingDependencyError, match=r"merge.llama_cpp: .*nowhere does not exist"):
        find_converter(tmp_path / "nowhere")
    with pytest.raises(MissingDependencyError, match=f"merge.llama_cpp: .* holds no {SCRIPT}"):
        find_converter(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(MissingDependencyError, match=f"{VARIABLE} .* holds no {SCRIPT}"):
        find_converter(None)


def test_a_missing_package_is_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "PACKAGES", ("gguf", "no_such_package"))
    with pytest.raises(MissingDependencyError, match=r"needs the package no_such_package$") as caught:
        find_converter(script(tmp_path))
    assert "qlora-cli[gguf]" in str(caught.value.hint)


def test_the_command_names_files_type_and_model(tmp_path: Path) -> None:
    command = Converter(script=Path("/x/c.py")).command(tmp_path, tmp_path / "my model.gguf", GgufType.Q8_0)
    assert command == [
        *(sys.executable, "/x/c.py", str(tmp_path), "--outfile", str(tmp_path / "my model.gguf")),
        *("--outtype", "q8_0", "--model-name", "my model"),
    ]


def failing(tmp_path: Path, code: str) -> ExportError:
    target = tmp_path / "a.gguf"
    with pytest.raises(ExportError) as caught:
        convert(find_converter(script(tmp_path / "c", code)), tmp_path, target, GgufType.AUTO)
    assert not target.exists()
    assert caught.value.exit_code == 1
    return caught.value


def test_a_failure_quotes_the_last_lines_and_leaves_no_file(tmp_path: Path) -> None:
    code = (
        "import sys; open(sys.argv[3], 'w').write('half'); [print('line', n) for n in range(100)]; sys.exit('no luck')"
    )
    error = failing(tmp_path, code)
    assert "exit code 1" in str(error)
    assert "| line 99\n  | no luck" in str(error)
    assert "line 50" not in str(error)
    assert "git pull" in str(error.hint)
    assert "--outtype auto" in str(error.hint)


@pytest.mark.parametrize(
    ("says", "hint"),
    [
        (
            "NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()",
            "tokenize differently from",
        ),
        ("ModuleNotFoundError: No module named 'tiktoken.core'", "pip install tiktoken"),
        ("ERROR:hf-to-gguf:Model FooForCausalLM is not supported", "does not support the architecture"),
        ("FileNotFoundError: File not found: /m/tokenizer.model", "copy it from the base"),
    ],
)
def test_common_failures_are_explained(tmp_path: Path, says: str, hint: str) -> None:
    assert hint in str(failing(tmp_path, f"import sys; sys.exit({says!r})").hint)


def test_a_converter_that_is_killed_or_writes_nothing_has_failed(tmp_path: Path) -> None:
    assert "ended by SIGKILL" in str(failing(tmp_path, "import os; os.kill(os.getpid(), 9)"))
    assert "wrote no a.gguf" in str(failing(tmp_path, "print('done')"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_all_of_it_and_leave_no_file(tmp_path: Path, number: signal.Signals, code: int) -> None:
    model, target = tmp_path / "model", tmp_path / "a.gguf"
    arguments = [script(tmp_path / "c", HANGS_IN_TWO), model, target]
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERTING, *map(str, arguments)], env={**os.environ}, stderr=subprocess.DEVNULL
    )
    pids = _wait_for(tmp_path / "model.pids", process)
    assert target.exists()
    process.send_signal(number)
    assert process.wait(timeout=300) == code
    assert not target.exists()
    assert not [pid for pid in pids if _runs(pid)]


def _wait_for(file: Path, process: subprocess.Popen[bytes]) -> list[int]:
    deadline = time.monotonic() + 60
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert file.exists(), "the converter did not start"
    return [int(pid) for pid in file.read_text(encoding="utf-8").split()]


def _runs(pid: int) -> bool:
    deadline = time.monotonic() + 5  # a process whose parent is gone is a zombie until the system reaps it
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.02)
    return False
