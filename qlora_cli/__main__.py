"""The start of `qlora` and of `python -m qlora_cli`: Ctrl-C ends it without a traceback, also during imports."""

import os
import signal
import sys
from types import FrameType

from qlora_cli.platforms import WINDOWS

INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Import the command line and run it."""
    refuse_windows(sys.platform)
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


def refuse_windows(system: str) -> None:
    """End where the command line can't be imported.

    Raises:
        SystemExit: on Windows.
    """
    if system == "win32":
        os.write(2, f"error: qlora does not run on {WINDOWS.name} itself\n  hint: {WINDOWS.advice}\n".encode())
        sys.exit(2)


def _end_at_once(_: int, __: FrameType | None) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
