"""Processes forked from one that has imported everything: a command starts in milliseconds, not in seconds.

Python forks such a process for `multiprocessing`; nothing has been computed in it, so that no thread of OpenMP is
missing in what it forks. Tests whose subject is how a process starts and exits (what it imports, what Python itself
does about closed pipes and full disks) start Python themselves.
"""

import fcntl
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from markupsafe import Markup

from qlora_cli.runs.report import run_page
from qlora_cli.runs.report.step_chart import Labels

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.processes.imported_early"])
# What variables are called that are read by an import, or by Python as it starts.
READ_BY_IMPORTS = ("HF_", "HOME", "HUGGING_FACE_", "LANG", "LC_", "OMP_", "PYTHON", "TRANSFORMERS_", "XDG_")
MOST_SECONDS = 300.0
GPU_DRIVER = Path("/proc/driver/nvidia")
ENCODING = "PYTHONIOENCODING"  # of the streams, which are opened again in a fork
WITHOUT_CHARTS = "QLORA_TESTS_WITHOUT_CHARTS"  # set where the pages of runs are not looked at
READ_WHEN_USED = frozenset({"HF_TOKEN", ENCODING})
# Read by the client of the hub when it is imported; a command that is to see others reads them again.
READ_AGAIN = frozenset({"HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_XET", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_OFFLINE"})
_environment: dict[str, str] = {}


def prepare_environment() -> None:
    """Remember the environment of the session as the one to import in."""
    _environment.update(os.environ)


def start_process(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start a function in a process of its own; what it exits with is the exit code.

    The process to fork from is started by the first, in the environment of the session and not that of a test.
    Hangups end it as they end a command in a terminal, also where `nohup` runs the tests.
    """
    process = FORKS.Process(target=_as_started, args=(WITHOUT_CHARTS in os.environ, target, *arguments))
    of_test = dict(os.environ)
    _set_environment(_environment)
    try:
        process.start()
    finally:
        _set_environment(of_test)
    return process


def is_forkable(environment: Mapping[str, str]) -> bool:
    """Whether an environment differs from that of the session in nothing that only an import reads.

    On a machine with a GPU none is: imports look for GPUs, and after that CUDA can't be used in a fork.
    """
    if GPU_DRIVER.exists():
        return False
    names = (environment.keys() | _environment.keys()) - READ_WHEN_USED - READ_AGAIN
    changed = [name for name in names if environment.get(name) != _environment.get(name)]
    return not any(name.startswith(READ_BY_IMPORTS) for name in changed)


def start_command(
    arguments: list[str],
    environment: Mapping[str, str],
    directory: Path,
    streams: Path,
    module: str = "qlora_cli",
    *,
    has_stdin: bool = True,
    descriptors: Mapping[int, int] | None = None,
) -> BaseProcess:
    """Start `python -m MODULE`, `qlora` if none is named, in a directory.

    It writes to `stdout` and `stderr` in the folder `streams`, and reads from the null device if it `has_stdin`.
    `descriptors`: those of this process that take the place of its own.
    """
    passed = {own: Connection(os.dup(ours)) for own, ours in (descriptors or {}).items()}
    return start_process(_command, module, arguments, dict(environment), directory, streams, has_stdin, passed)


def start_on_terminal(
    arguments: list[str], environment: Mapping[str, str], terminal: str, *, ignores_hangups: bool = False
) -> BaseProcess:
    """Start `qlora` in a session of its own on a terminal, whose name is that of a file, as a shell starts it."""
    return start_process(_command_on_terminal, arguments, dict(environment), terminal, ignores_hangups)


def output_of(
    arguments: list[str],
    environment: Mapping[str, str],
    directory: Path | None = None,
    *,
    module: str = "qlora_cli",
    is_forked: bool = True,
    descriptors: Mapping[int, int] | None = None,
) -> tuple[int, str, str]:
    """Run `python -m MODULE` to its end, forked if it can be; return exit code, stdout and stderr.

    `descriptors`: those of this process that take the place of its own; what it writes to them is not returned.
    """
    given = descriptors or {}
    if not (is_forked and is_forkable(environment)):
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            stdout=given.get(1, subprocess.PIPE),
            stderr=given.get(2, subprocess.PIPE),
            text=True,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=directory,
            timeout=MOST_SECONDS,
            check=False,
        )
        return done.returncode, done.stdout or "", done.stderr or ""
    with TemporaryDirectory() as name:
        streams = Path(name)
        folder = directory or Path.cwd()
        process = start_command(arguments, environment, folder, streams, module, descriptors=given)
        code = end_of(process, MOST_SECONDS)
        stdout, stderr = ((streams / stream).read_text(encoding="utf-8") for stream in ("stdout", "stderr"))
        return code, stdout, stderr


@contextmanager
def pipe_without_reader() -> Iterator[int]:
    """Yield the end to write to of a pipe whose reader left before the first byte."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        yield write_end
    finally:
        os.close(write_end)


def cpu_seconds_of(process: BaseProcess) -> float:
    """Return the seconds of the CPU that a process has taken; on a busy machine it does as much in them."""
    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def redirect(stdout: Path, stderr: Path) -> None:
    """Append all that this process writes from now on to these files."""
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)


def wait_for_line(process: BaseProcess, stream: Path, beginning: str) -> None:
    """Wait until a process has written a line that begins so."""
    deadline = time.monotonic() + MOST_SECONDS
    while not (stream.exists() and f"\n{beginning}" in f"\n{stream.read_text(encoding='utf-8')}"):
        assert process.is_alive(), "it ended before"
        assert time.monotonic() < deadline, f"{beginning} did not come"
        time.sleep(0.02)


def end_of(process: BaseProcess, seconds: float) -> int:
    """Wait for a process, which is killed if it takes longer, and return its exit code."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"a process took more than {seconds} seconds")
    return process.exitcode


def _as_started(leaves_out_charts: bool, target: Callable[..., None], *arguments: object) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if leaves_out_charts:
        run_page.drawn_charts = _no_charts
    target(*arguments)


def _no_charts(charts: object) -> list[tuple[Labels, Markup]]:
    del charts  # named as in what it replaces
    return []


def _command(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    directory: Path,
    streams: Path,
    has_stdin: bool,
    descriptors: Mapping[int, Connection],
) -> None:
    if not has_stdin:  # as Python finds it where the descriptor is closed
        os.close(0)
        sys.stdin = None
    redirect(streams / "stdout", streams / "stderr")
    for own, connection in descriptors.items():
        os.dup2(connection.fileno(), own)
        connection.close()
    _open_streams_again(environment.get(ENCODING, "utf-8"))
    os.chdir(directory)
    try:
        _run_module(module, arguments, environment)
    finally:
        try:
            sys.stderr.flush()
        except BrokenPipeError:  # at the exit of a process Python ignores it; that of a fork would fail
            sys.stderr = None


def _command_on_terminal(
    arguments: list[str], environment: dict[str, str], terminal: str, ignores_hangups: bool
) -> None:
    if ignores_hangups:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.setsid()
    opened = os.open(terminal, os.O_RDWR)
    fcntl.ioctl(opened, termios.TIOCSCTTY, 0)
    for descriptor in range(3):
        os.dup2(opened, descriptor)
    os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - open until the end
    _open_streams_again(environment.get(ENCODING, "utf-8"))
    _run_module("qlora_cli", arguments, environment)


def _run_module(module: str, arguments: list[str], environment: dict[str, str]) -> None:
    of_imports = dict(os.environ)
    _set_environment(environment)
    if any(environment.get(name) != of_imports.get(name) for name in READ_AGAIN):
        _read_environment_again()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _open_streams_again(encoding: str) -> None:
    # Python's own remember whether they are a terminal, and whether they can be positioned.
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115 - open until the end
    sys.stderr = open(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115


def _read_environment_again() -> None:
    # Their other modules ask these two for every value, each time that they need it.
    for name in ("huggingface_hub.constants", "datasets.config"):
        importlib.reload(sys.modules[name])


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
