"""Scripts that use plain PyTorch, transformers and, if they import it, PEFT, as a user without this package does.

Each runs in a process of its own, forked from one that has imported PyTorch and transformers, has computed nothing,
and knows nothing of this package.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

# Reads a script a line, with its arguments, and answers with its exit code.
SERVER = """
import gc, json, os, sys, traceback
import bitsandbytes, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.llama import modeling_llama

assert not {"peft", "qlora_cli"} & set(sys.modules)
gc.collect()
gc.freeze()

def run(script, arguments, directory, streams):
    os.chdir(directory)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(streams, name), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})

for line in sys.stdin:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            run(*json.loads(line))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class PlainPython:
    """Runs scripts, one at a time."""

    def __init__(self, server: "subprocess.Popen[str]") -> None:
        self._server = server

    def __call__(
        self, script: str, *arguments: str | int | Path, directory: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a script in a directory, the working directory if none is named; an exception is exit code 1."""
        with TemporaryDirectory() as streams:
            return self._run([script, [*map(str, arguments)], str(directory or Path.cwd()), streams], Path(streams))

    def _run(self, request: list[object], streams: Path) -> "subprocess.CompletedProcess[str]":
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{json.dumps(request)}\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        stdout, stderr = ((streams / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess("python", code, stdout, stderr)


@contextmanager
def plain_python() -> Iterator[PlainPython]:
    """Start the process that scripts are forked from, and end it afterwards."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield PlainPython(server)
