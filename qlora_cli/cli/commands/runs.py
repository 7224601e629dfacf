"""`qlora runs`: list runs with their state in a table, or show one in detail or as a page."""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from qlora_cli.cli import options
from qlora_cli.cli.completion import complete_run
from qlora_cli.cli.help_page import HelpfulCommand, HelpfulGroup
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.stderr import print_line
from qlora_cli.cli.volume import Quiet, print_next, quiet_or_normal
from qlora_cli.errors import Problem, RunNotFoundError, SettingsError
from qlora_cli.runs.ordering import Order, ordered, selected

DEFAULT_COMMAND = "list"


class RunsGroup(HelpfulGroup):
    """Lists runs unless another command is named: `qlora runs DIR` is `qlora runs list DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the group."""
        named = args[0] if args else ""
        if named not in self.commands and named not in ctx.help_option_names:
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


runs_app = typer.Typer(
    name="runs",
    cls=RunsGroup,
    rich_markup_mode=None,
    help="List runs and what became of them, or show one. Without a command: list.",
    epilog="A directory called list or show is given as ./list or ./show.",
)


@runs_app.command(DEFAULT_COMMAND, cls=HelpfulCommand)
def list_runs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory that holds runs, at any depth.")] = Path(
        "runs"
    ),
    sort: Annotated[
        Order, typer.Option("--sort", help="What comes first, such as the lowest loss or the fastest run.")
    ] = (Order.STARTED),
    words: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="TEXT",
            help="Only runs with this text in their name, state, model or data; may be repeated.",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
    json: options.Json = False,
) -> None:
    """List the runs in a directory, the oldest first; more about each where the window is wide enough."""
    _check_directory(directory, "Name the directory that your runs are in: qlora runs DIR")
    from qlora_cli.cli.rendering.next_steps import after_list
    from qlora_cli.cli.rendering.run_table import render_runs
    from qlora_cli.runs.find_runs import find_runs

    runs = ordered(selected(find_runs(directory), words or ()), sort)
    print_json({"runs": runs}) if json else render_runs(runs, directory)
    print_next(after_list(runs, sort), quiet_or_normal(quiet), as_json=json)


@runs_app.command(cls=HelpfulCommand)
def show(
    run: Annotated[Path, typer.Argument(help="Run directory.", show_default=False, autocompletion=complete_run)],
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write all of it as a web page, in one file.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    json: options.Json = False,
) -> None:
    """Show one run in detail, and write it as a web page with --html."""
    _check_directory(run, _nearest_run(run))
    from qlora_cli.cli.rendering.next_steps import after_show
    from qlora_cli.cli.rendering.run_text import render_run
    from qlora_cli.data.showing.page_file import check_page
    from qlora_cli.runs.detail import detail_of
    from qlora_cli.runs.directory import METRICS_FILE, RUN_FILE
    from qlora_cli.runs.find_runs import is_run, read_run

    if not is_run(run):
        raise RunNotFoundError(
            f"{run} is no run directory: it holds neither {RUN_FILE} nor {METRICS_FILE}",
            hint=f"List the runs in it: qlora runs {run}",
        )
    if html is not None and (problem := check_page(html)):
        raise SettingsError([Problem(where="--html", message=problem.message, hint=problem.hint)])
    loaded = read_run(run)
    if html is not None:
        from qlora_cli.runs.report.run_page import write_page

        write_page(html, loaded)
        print_line(f"the page is in {html}")
    detail = detail_of(loaded)
    print_json(detail.as_json()) if json else render_run(detail, loaded.history)
    print_next(after_show(loaded.summary), quiet_or_normal(quiet), as_json=json)


def _check_directory(directory: Path, hint: str) -> None:
    try:
        is_there = directory.is_dir()
    except (OSError, ValueError):  # too long, or not to be looked at
        is_there = False
    if not is_there:
        raise RunNotFoundError(f"there is no directory {directory}", hint=hint)


def _nearest_run(run: Path) -> str:
    """Return a hint for a missing run: one with a similar name, next to it or in `runs`."""
    for folder in (run.parent, Path("runs")):
        siblings = {path.name: path for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else {}
        if matches := get_close_matches(run.name, siblings, n=1):
            return f"Did you mean {siblings[matches[0]]}?"
    return "List the runs: qlora runs DIR"
