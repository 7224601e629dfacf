"""What commands import when they run, imported before: torch, transformers, TRL, PEFT, datasets and matplotlib.

Tables and parsers that are made when they are first used are made here, too: half a second of each command.
"""

import gc

from matplotlib import figure
from matplotlib.backends import backend_svg
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.llama import modeling_llama
from typer.testing import CliRunner

from qlora_cli.answering import answer_prompts, conversation, open_model
from qlora_cli.cli.app import app
from qlora_cli.cli.command_list import LazyCommands
from qlora_cli.cli.progress import reporters
from qlora_cli.data.showing import inspection
from qlora_cli.demo import demonstration
from qlora_cli.doctor import all_checks
from qlora_cli.evaluating import evaluation
from qlora_cli.loading import load_plan, loader, save
from qlora_cli.memory import memory_report
from qlora_cli.merging import merge_run
from qlora_cli.training import train_run
from tests.support.processes import merge_process, training_process

MODULES = (
    *(answer_prompts, conversation, open_model, inspection, demonstration, all_checks, evaluation),
    *(load_plan, loader, save, memory_report, merge_run, train_run, merge_process, training_process),
    *(figure, backend_svg, modeling_llama, reporters),
)
get_checkpoint_conversion_mapping("llama")
dict(LazyCommands().items())
CliRunner().invoke(app, ["config", "show"])
# No cycle is searched for in what is imported: a forked command would copy all of it, page by page, to do so.
gc.collect()
gc.freeze()
