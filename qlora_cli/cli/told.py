"""What is told on stderr, and what of any text is not: secrets, and what would drive a terminal.

Names, messages of libraries, data and models may be anybody's. Every line that people read passes through here.
"""

import os
import re

import typer

from qlora_cli.visible import harmless

SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD")
TOKEN = re.compile(r"hf_[A-Za-z0-9]{10,}")
# Of an address: what stands before its host, and what signs it. A port is no password.
CREDENTIALS = re.compile(r"(?<=://)(?:(?![^\s/@:]+:\d+/)[^\s/@:]+:\S*@|[^/\s@]+@)")
SIGNED = re.compile(
    r"(?i)([?&](?:[\w-]*token|api_?key|key|password|secret|sig|signature|x-amz-[\w-]+|policy)=)[^&\s\"'<>]+"
)


def redact(text: str) -> str:
    """Return `text` without the tokens of the environment, without anything that looks like one, or like a login."""
    for name in SECRET_VARIABLES:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return SIGNED.sub(r"\1***", CREDENTIALS.sub("***@", TOKEN.sub("hf_***", text)))


def told(text: str) -> str:
    """Return `text` as people may read it: without secrets, and with nothing that drives a terminal."""
    return harmless(redact(text))


def tell(line: str) -> None:
    """Write a line to stderr."""
    typer.echo(told(line), err=True)
