"""A copy of the package, to which a recipe of CONTRIBUTING.md is applied, and the output of its commands."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conftest import ASSETS
from tests.support.models.shallow_model import save_shallow
from tests.support.processes.plain_python import PlainPython

PACKAGE = Path(__file__).parent.parent.parent / "qlora_cli"


def ask_copy(
    plain_python: PlainPython,
    directory: Path,
    *,
    edits: Mapping[str, Mapping[str, str]],
    files: Mapping[str, str],
    script: str,
) -> Any:
    """Return the JSON that `script` prints in its last line, run on a copy of the package in `directory`.

    `edits` are lines to insert before a text that occurs once in a file; `files` are new files. The script gets two
    layers of the bundled base, a file of a few rows, and `directory`.
    """
    package = directory / "qlora_cli"
    shutil.copytree(PACKAGE, package)  # with what is compiled already: files keep their times
    for name, added in edits.items():
        source = (package / name).read_text(encoding="utf-8")
        for before, line in added.items():
            assert source.count(before) == 1
            source = source.replace(before, line + before)
        (package / name).write_text(source, encoding="utf-8")
    for name, text in files.items():
        (package / name).write_text(text, encoding="utf-8")
    rows = directory / "rows.jsonl"
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    importing = (
        f"import os, sys\nsys.path.insert(0, {str(directory)!r})\nos.environ['PYTHONPATH'] = {str(directory)!r}\n"
    )
    done = plain_python(importing + script, save_shallow(directory / "base"), rows, directory, directory=directory)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
