"""Find problems before a row is tokenized or a weight is read, and report them together.

The sources are the config and the tokenizer of the model, the headers of its weights, the first rows of each data set
and the free disk space.
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
from qlora_cli.training.checks.adapter_outline import check_space, outline, sizes_of
from qlora_cli.training.liger import check_liger

MODEL, TARGETS, OUTPUT, DATASET = "model.name", "lora.target_modules", "output.directory", "data.dataset"


def with_data_errors(error: QloraError, asked: Resolved[TrainSettings]) -> QloraError:
    """Return `error`, a problem of the model, together with the problems of the data.

    That the model does not fit in memory is reported only if the data has none.
    """
    collector = ErrorCollector(asked.where_of)
    if error.exit_code == INPUT_IS_WRONG:
        collector.add(MODEL, error)
    collector.extend(first_rows_errors(asked.settings.data, asked.settings.training.seed, include=on_this_disk))
    return collector.error or error


def check_before_data(resolved: Resolved[TrainSettings], load_plan: LoadPlan, reporter: Reporter) -> None:
    """Check the data on this disk, the adapter, the weights and the space for the files of the run.

    Raises:
        QloraError: of the type of the problem; a `SettingsError` for several.
    """
    settings, collector = resolved.settings, ErrorCollector(resolved.where_of)
    text = TextTokenizer(
        tokenizer=load_plan.tokenizer.tokenizer, end_ids=load_plan.tokenizer.end_ids, reporter=reporter
    )
    check_rows = partial(try_rows, settings=settings.data, text=text)
    collector.extend(
        first_rows_errors(settings.data, settings.training.seed, include=on_this_disk, check_rows=check_rows)
    )
    with collector.collecting(TARGETS if load_plan.adapter is None else MODEL):
        adapted = outline(load_plan, settings.lora)
        with collector.collecting(OUTPUT):
            check_space(sizes_of(adapted, settings.training.optimizer), settings)
    if settings.training.use_liger_kernel:
        with collector.collecting("training.use_liger_kernel"):
            check_liger(load_plan.base.config.model_type)
    with collector.collecting(MODEL):
        check_weights(load_plan, reporter)
    with collector.collecting(DATASET):
        check_writable()
    collector.raise_collected()
