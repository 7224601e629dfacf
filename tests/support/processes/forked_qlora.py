"""A command `qlora` for scripts of the shell: each is forked by the tests' process, and so starts in milliseconds."""

import sys
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

from tests.support.processes.forks import MOST_SECONDS, end_of, start_command

# Asks for its work to be done, hands on the signals that it is sent, and ends as the forked process ends.
CLIENT = """#!{python} -IBS
import os, signal, sys
from multiprocessing.connection import Client
with Client({address!r}) as connection:
    connection.send((os.getpid(), os.getcwd(), dict(os.environ), sys.argv[1:]))
    number = connection.recv()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda received, _: os.kill(number, received))
    sys.exit(connection.recv())
"""


class ForkedQlora:
    """Answers the command that `write` writes, one at a time; Linux only."""

    def __init__(self) -> None:
        self._listener = Listener(family="AF_UNIX")
        Thread(target=self._serve, daemon=True).start()

    def write(self, path: Path) -> None:
        """Write the command."""
        path.write_text(CLIENT.format(python=sys.executable, address=self._listener.address), encoding="utf-8")
        path.chmod(0o755)

    def _serve(self) -> None:
        while True:
            with self._listener.accept() as connection:
                _answer(connection)


def _answer(connection: Connection) -> None:
    asking, directory, environment, arguments = connection.recv()
    with TemporaryDirectory() as name:
        streams = Path(name)
        for descriptor, stream in ((1, "stdout"), (2, "stderr")):
            (streams / stream).symlink_to(f"/proc/{asking}/fd/{descriptor}")
        process = start_command(arguments, environment, Path(directory), streams, has_stdin=False)
        connection.send(process.pid)
        connection.send(end_of(process, MOST_SECONDS))
