"""The start of `qlora` and of `python -m qlora_cli`: Ctrl-C ends it without a traceback, also during imports."""

import os
import signal
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Import the command line and run it."""
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


def _end_at_once(_: int, __: FrameType | None) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
