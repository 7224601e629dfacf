"""Commands that are to end before torch is imported, and what they did import.

Each is forked from a process that has imported the modules of all commands, and nothing else.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

# Reads a command a line, and answers with its exit code and the modules that it has imported, a line each.
SERVER = """
import json, os, sys
from qlora_cli.cli.app import main
from qlora_cli.cli.command_list import LazyCommands

dict(LazyCommands().items())

HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "matplotlib"}

class Blocked:
    def __init__(self, modules):
        self.modules = modules

    def find_spec(self, name, path=None, target=None):
        if name in self.modules:
            raise ImportError(f"{name} is blocked", name=name)

def run(arguments, directory, streams, blocked):
    sys.meta_path.insert(0, Blocked(blocked))
    os.chdir(directory)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(streams, name), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["qlora", *arguments]
    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    with open(os.path.join(streams, "outcome"), "w", encoding="utf-8") as file:
        json.dump({"code": code, "heavy": sorted(HEAVY & set(sys.modules))}, file)

for line in sys.stdin:
    process = os.fork()
    if process == 0:
        try:
            run(*json.loads(line))
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(process, 0)
    print("done", flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class LightOutcome:
    """How a command ended: `heavy` are the libraries that it imported of those that take long."""

    code: int
    heavy: list[str]
    stdout: str
    stderr: str


class LightQlora:
    """Runs `qlora`, one command at a time."""

    def __init__(self, server: "subprocess.Popen[str]") -> None:
        self._server = server

    def __call__(self, *arguments: str, directory: Path | None = None, blocked: Sequence[str] = ()) -> LightOutcome:
        """Run a command in a directory, the working directory if none is named; it can't import what is `blocked`."""
        with TemporaryDirectory() as streams:
            return self._run(Path(streams), arguments, str(directory or Path.cwd()), streams, blocked)

    def _run(self, streams: Path, *request: object) -> LightOutcome:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{json.dumps(request)}\n")
        self._server.stdin.flush()
        assert self._server.stdout.readline() == "done\n"
        stdout, stderr = ((streams / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        outcome = streams / "outcome"
        assert outcome.exists(), stderr
        return LightOutcome(**json.loads(outcome.read_text(encoding="utf-8")), stdout=stdout, stderr=stderr)


@contextmanager
def light_commands() -> Iterator[LightQlora]:
    """Start the process that commands are forked from, and end it afterwards."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield LightQlora(server)
