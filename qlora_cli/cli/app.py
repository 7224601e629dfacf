"""The command line: one table of commands, one place where errors become messages and exit codes."""

import io
import os
import sys
import warnings
from typing import Annotated

import typer

from qlora_cli import __version__
from qlora_cli.cli.root_group import RootGroup
from qlora_cli.cli.stderr import log_libraries
from qlora_cli.errors import EXIT_CODES

# Products in bf16 whose compiled kernels oneDNN keeps on a CPU. Its own limit, 1024, grows a run by more than a GiB as
# rows of ever new lengths come; the products of one length are a few dozen, however many layers there are.
CACHED_KERNELS = "64"

app = typer.Typer(
    name="qlora",
    cls=RootGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # locals may hold a token
    rich_markup_mode=None,  # plain help: whole flag names at any width, and half the time
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune language models on one GPU with QLoRA: predict, plan, train, prove.",
    epilog=f"Exit codes: {', '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qlora {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune language models on one GPU with QLoRA: predict, plan, train, prove."""


def main() -> None:
    """Run the command line on `sys.argv` and exit."""
    # TRL sends telemetry by default. tokenizers warns of forks, but none of ours uses it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # OpenMP's threads spin while they wait for one another; if another job runs, that costs more than half of the
    # speed on a CPU (measured on two cores). Passive waiting has to be requested before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", CACHED_KERNELS)
    # Deprecations inside the libraries are for their authors; we report what a user must know ourselves.
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    log_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an encoding without bars shows question marks
            stream.reconfigure(errors="replace")
    app()
