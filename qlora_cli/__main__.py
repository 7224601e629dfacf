"""The start of `qlora` and of `python -m qlora_cli`, and its end.

Ctrl-C ends it without a traceback, also during imports.
"""

import atexit
import os
import signal
import sys
from types import FrameType

from qlora_cli.platforms import WINDOWS

INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Import the command line and run it."""
    refuse_windows(sys.platform)
    exit_codes: list[int] = []
    atexit.register(_end_without_teardown, exit_codes)  # the first that is registered is the last that is called
    takes_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not under nohup, or in a script
    if takes_interrupts:
        signal.signal(signal.SIGINT, _end_at_once)  # until then there is nothing to clean up
    from qlora_cli.cli.app import main as run

    if takes_interrupts:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    except KeyboardInterrupt:  # between the places that handle it
        _end_at_once(signal.SIGINT, None)
    except SystemExit as ended:
        if isinstance(ended.code, int):
            exit_codes.append(ended.code)
        raise


def refuse_windows(system: str) -> None:
    """End where the command line can't be imported.

    Raises:
        SystemExit: on Windows.
    """
    if system == "win32":
        os.write(2, f"error: qlora does not run on {WINDOWS.name} itself\n  hint: {WINDOWS.advice}\n".encode())
        sys.exit(2)


def _end_without_teardown(exit_codes: list[int]) -> None:
    """End this process with the code that `SystemExit` gave, if it did, after all other functions of its exit.

    A thread of gloo, or one that waits for another process, would end it with SIGABRT if it asked for the interpreter
    while that is taken down (before Python 3.14).
    """
    if not exit_codes:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # Python tells of it, and chooses the code
        return
    os._exit(exit_codes[0])


def _end_at_once(_: int, __: FrameType | None) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
