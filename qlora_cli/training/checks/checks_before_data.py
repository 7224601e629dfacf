"""Faults that can be known before a row is tokenized or a weight is read, all reported together.

It shows from the config and the tokenizer of the model, the headers of its weights, the first rows of each data set
and the space on the disk.
"""

from functools import partial

from qlora_cli.data.opening.first_rows import first_rows_errors, on_this_disk
from qlora_cli.data.tokenizing.encode import TextTokenizer, try_rows
from qlora_cli.data.tokenizing.store import check_writable
from qlora_cli.errors import QloraError
from qlora_cli.events import Reporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loading.loader import check_weights
from qlora_cli.settings.error_collector import INPUT_IS_WRONG, ErrorCollector
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.checks.adapter_outline import outline, sizes_of
from qlora_cli.training.liger import check_liger

MODEL, TARGETS, OUTPUT, DATASET = "model.name", "lora.target_modules", "output.directory", "data.dataset"


def with_data_errors(error: QloraError, asked: Resolved[TrainSettings]) -> QloraError:
    """Return `error`, a fault of the model, together with the faults of the data.

    That the model does not fit in memory is reported after the faults of the data.
    """
    wrong = ErrorCollector(asked.where_of)
    if error.exit_code == INPUT_IS_WRONG:
        wrong.add(MODEL, error)
    wrong.extend(first_rows_errors(asked.settings.data, asked.settings.training.seed, include=on_this_disk))
    return wrong.error or error


def check_before_data(resolved: Resolved[TrainSettings], load_plan: LoadPlan, reporter: Reporter) -> None:
    """Check the data on this disk, the adapter, the weights and the space for the files of the run.

    Raises:
        QloraError: of the kind that fits what is wrong; a `SettingsError` if several things are.
    """
    settings, wrong = resolved.settings, ErrorCollector(resolved.where_of)
    text = TextTokenizer(
        tokenizer=load_plan.tokenizer.tokenizer, end_ids=load_plan.tokenizer.end_ids, reporter=reporter
    )
    look = partial(try_rows, settings=settings.data, text=text)
    wrong.extend(first_rows_errors(settings.data, settings.training.seed, include=on_this_disk, check_rows=look))
    with wrong.collecting(TARGETS if load_plan.adapter is None else MODEL):
        adapted = outline(load_plan, settings.lora)
        with wrong.collecting(OUTPUT):
            sizes_of(adapted, settings.training.optimizer).check_space(settings)
    if settings.training.use_liger_kernel:
        with wrong.collecting("training.use_liger_kernel"):
            check_liger(load_plan.base.config.model_type)
    with wrong.collecting(MODEL):
        check_weights(load_plan, reporter)
    with wrong.collecting(DATASET):
        check_writable()
    wrong.raise_collected()
