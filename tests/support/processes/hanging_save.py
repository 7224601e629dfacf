"""`qlora load --save` in a process that hangs between the weights and the tokenizer, to be killed there."""

import os
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from qlora_cli.cli.app import main
from tests.support.processes.forks import redirect, start_process


def start_hanging_save(arguments: list[str], marker: Path) -> BaseProcess:
    """Start `qlora` with these arguments; when it hangs, `marker` holds the directory that it writes to."""
    return start_process(_save, arguments, marker)


def _save(arguments: list[str], marker: Path) -> None:
    def hang(_: PreTrainedTokenizerBase, directory: Path, **__: object) -> None:
        aside = marker.with_suffix(".aside")
        aside.write_text(str(directory), encoding="utf-8")
        aside.replace(marker)
        time.sleep(600)

    redirect(Path(os.devnull), Path(os.devnull))
    sys.argv = ["qlora", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", hang)
        main()
