"""A shell completes values, by typer's own protocol, without torch: choices, cards, models, settings, runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_cli.memory.catalogue import catalogue
from qlora_cli.memory.gpus import GPUS
from qlora_cli.settings.choices import Schedule

# `_QLORA_COMPLETE` is what typer's scripts for shells set; words and the index of the last are as bash gives them.
ASK = """
import os, sys
sys.argv = ["qlora"]
os.environ.update(_QLORA_COMPLETE="complete_bash", COMP_WORDS={line!r}, COMP_CWORD="{last}")
from qlora_cli.cli.app import main
try:
    main()
except SystemExit:
    pass
assert not {{"torch", "transformers", "matplotlib"}} & set(sys.modules)
"""


def offered(line: str, directory: Path) -> list[str]:
    code = ASK.format(line=line, last=len(line.split(" ")) - 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=directory, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for name in ("runs/first", "runs/second", "alone", "deep/er/still"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qlora train --schedule ", [one.value for one in Schedule]),
        ("qlora train --set training.schedule=constant_w", ["training.schedule=constant_with_warmup"]),
        ("qlora train --set lora.alpha_", ["lora.alpha_pattern="]),
        ("qlora train --set data.packing=", ["data.packing=true", "data.packing=false"]),
        ("qlora train --set no.such=", []),
        ("qlora inspect-memory llama-3.1-8b --gpu RTX", [one.name for one in GPUS if one.name.startswith("RTX")]),
        ("qlora inspect-memory smollm3", ["smollm3-3b"]),
        ("qlora train --model Qwen/Qwen3-4B-Ins", ["Qwen/Qwen3-4B-Instruct-2507"]),
        ("qlora merge ", ["alone", "runs/first", "runs/second"]),
        ("qlora merge runs/s", ["runs/second"]),
        ("qlora merge deep/", ["deep/er/still"]),
        ("qlora merge nowhere/", []),
        ("qlora chat alo", ["alone"]),
        ("qlora runs show runs/f", ["runs/first"]),
    ],
)
def test_a_shell_is_offered(line: str, expected: list[str], work: Path) -> None:
    assert sorted(offered(line, work)) == sorted(expected)
    assert expected or "no.such" in line or "nowhere" in line


def test_every_model_of_the_catalogue_is_offered(tmp_path: Path) -> None:
    names = set(offered("qlora inspect-memory ", tmp_path))
    assert {one.name for one in catalogue()} | {one.hub_id for one in catalogue()} <= names
