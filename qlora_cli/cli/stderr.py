"""What is told on stderr, and what of any text is not: secrets, and what would drive a terminal.

Names, messages of libraries, data and models may be anybody's. Every line that people read passes through here, what
libraries log and warn of by themselves as well.
"""

import logging
import os
import re
import sys
import traceback
import warnings
from typing import Any, TextIO

import typer

from qlora_cli.cli.lasting_stream import LastingStream
from qlora_cli.visible import escape_controls

SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD")
TOKEN = re.compile(r"hf_[A-Za-z0-9]{10,}")
# Of an address: what stands before its host, and what signs it. A port is no password.
CREDENTIALS = re.compile(r"(?<=://)(?:(?![^\s/@:]+:\d+/)[^\s/@:]+:\S*@|[^/\s@]+@)")
SIGNED = re.compile(
    r"(?i)([?&](?:[\w-]*token|api_?key|key|password|secret|sig|signature|x-amz-[\w-]+|policy)=)[^&\s\"'<>]+"
)

COLOURS = re.compile(r"\x1b\[[\d;]*m")  # which libraries put around their own words


def redact(text: str) -> str:
    """Return `text` without the tokens of the environment, without anything that looks like one, or like a login."""
    for name in SECRET_VARIABLES:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return SIGNED.sub(r"\1***", CREDENTIALS.sub("***@", TOKEN.sub("hf_***", text)))


def sanitized(text: str) -> str:
    """Return `text` as people may read it: without secrets, and with nothing that drives a terminal."""
    return escape_controls(redact(text))


def print_line(line: str) -> None:
    """Write a line to stderr."""
    typer.echo(sanitized(line), err=True)


def log_libraries() -> None:
    """Have what any library logs or warns of, from now on, told as our own lines are."""
    logging.setLogRecordFactory(_ToldRecord)
    warnings.showwarning = _tell_warning


class _ToldRecord(logging.LogRecord):
    """What is logged, as people may read it, whichever handler writes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:  # which a formatter takes before it makes its own
            self.exc_text = sanitized("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))

    def getMessage(self) -> str:  # noqa: N802 - the name that logging has for it
        """Return the message."""
        return sanitized(COLOURS.sub("", super().getMessage()))


def _tell_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    stream = sys.stderr if file is None else file
    if stream is not None:  # as Python does, which loses a warning that can't be written
        text = COLOURS.sub("", warnings.formatwarning(message, category, filename, lineno, line))
        LastingStream(stream).write(sanitized(text))
