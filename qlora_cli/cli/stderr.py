"""Write to stderr, and sanitize all text for people: no secrets, no control characters.

Names, messages of libraries, data and models are untrusted. All lines for people pass through here, including logs and
warnings of libraries.
"""

import logging
import os
import re
import sys
import traceback
import warnings
from typing import Any, TextIO

import typer

from qlora_cli.cli.robust_stream import RobustStream
from qlora_cli.visible import escape_controls

SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "COMET_API_KEY",
    "SWANLAB_API_KEY",
)
TOKEN = re.compile(r"hf_[A-Za-z0-9]{10,}")
# In an address: credentials before its host, and signatures. A port is not a password.
CREDENTIALS = re.compile(r"(?<=://)(?:(?![^\s/@:]+:\d+/)[^\s/@:]+:\S*@|[^/\s@]+@)")
SIGNED = re.compile(
    r"(?i)([?&](?:[\w-]*token|api_?key|key|password|secret|sig|signature|x-amz-[\w-]+|policy)=)[^&\s\"'<>]+"
)

COLOURS = re.compile(r"\x1b\[[\d;]*m")  # escape codes in messages of libraries


def redact(text: str) -> str:
    """Return `text` without secrets of the environment, and without anything that looks like a token or a login."""
    for name in SECRET_VARIABLES:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return SIGNED.sub(r"\1***", CREDENTIALS.sub("***@", TOKEN.sub("hf_***", text)))


def sanitize(text: str) -> str:
    """Return `text` without secrets, and with control characters escaped."""
    return escape_controls(redact(text))


def print_line(line: str) -> None:
    """Write a line to stderr."""
    typer.echo(sanitize(line), err=True)


def log_libraries() -> None:
    """Sanitize all logs and warnings of libraries from now on, like our own lines."""
    logging.setLogRecordFactory(_SanitizedRecord)
    warnings.showwarning = _print_warning


class _SanitizedRecord(logging.LogRecord):
    """A log record with a sanitized message, whichever handler writes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:  # a formatter uses `exc_text` if it is set
            self.exc_text = sanitize("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))

    def getMessage(self) -> str:  # noqa: N802 - the name that logging has for it
        """Return the message."""
        return sanitize(COLOURS.sub("", super().getMessage()))


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    stream = sys.stderr if file is None else file
    if stream is not None:  # like Python, drop a warning that can't be written
        text = COLOURS.sub("", warnings.formatwarning(message, category, filename, lineno, line))
        RobustStream(stream).write(sanitize(text))
