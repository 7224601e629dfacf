"""`qlora migrate FILE`: the configuration of another tool as a settings file of ours."""

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.stderr import print_line
from qlora_cli.cli.volume import Quiet, print_next, quiet_or_normal

AFTER_MIGRATION = ("save it as qlora.yaml, then qlora train --config qlora.yaml --dry-run",)
Source = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="YAML or JSON of axolotl, LLaMA-Factory or TRL, or a command with its arguments."
    ),
]


def migrate(file: Source, quiet: Quiet = False, json: options.Json = False) -> None:
    """Turn a configuration of axolotl, LLaMA-Factory or TRL into a settings file, on stdout.

    What has no counterpart is named, and stands in the file as a comment. Values that the other tool has by default,
    where ours differ, are written out.
    """
    from qlora_cli.settings.migration import as_yaml  # YAML: not for the help
    from qlora_cli.settings.migration import migrate as read_foreign

    migration = read_foreign(file)
    if json:
        print_json(migration)
    else:
        from qlora_cli.cli.console import console  # rich: only once the file is read

        console().print(as_yaml(migration, file), soft_wrap=True, end="")
    for entry in migration.left_out:
        if not entry.is_needless:
            print_line(f"left out: {entry.key}: {entry.reason}")
    needless = [entry.key for entry in migration.left_out if entry.is_needless]
    if needless:
        print_line(f"not needed here: {', '.join(needless)}")
    print_next(AFTER_MIGRATION, quiet_or_normal(quiet))
