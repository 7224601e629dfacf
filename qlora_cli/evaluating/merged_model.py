"""Find the merged model to compare an adapter with, and check that it has the same tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.evaluating.rows import HeldOutRows
from qlora_cli.events import Noted, Reporter
from qlora_cli.loading.load_plan import LoadPlan, plan_load
from qlora_cli.loading.loader import check_weights
from qlora_cli.model_files.merged import merged_model_of, settings_of_merged, staleness_problem
from qlora_cli.settings.models import EvaluationSettings
from qlora_cli.settings.settle import resolved_in_code
from qlora_cli.tokenizing.positions import check_length


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merged model, and the plan to load it: as it is stored, in the dtype of the adapter's model."""

    path: Path
    load_plan: LoadPlan

    def check_rows(self, rows: HeldOutRows) -> None:
        """Check that it has enough positions for `rows`.

        Raises:
            ModelError: it has not.
        """
        scaling = self.load_plan.settings.model.rope_scaling
        check_length(self.load_plan.base.config, int(rows.data.lengths.max()), scaling)


def find_merged(request: EvaluationSettings, load_plan: LoadPlan, reporter: Reporter) -> Merged | None:
    """Return the merged model that was named, or that is in the run directory; None if there is none.

    Raises:
        ModelError: it can't be used, or its tokenizer differs.
        OutOfMemoryError: it does not fit on the device.
    """
    path = request.merged or merged_model_of(load_plan.source)
    if path is None:
        return None
    if stale := staleness_problem(path, load_plan.source):
        reporter.report(Noted(level="warning", message=stale))
    settings = settings_of_merged(path, load_plan.settings.model, load_plan.dtype)
    merged = Merged(path=path, load_plan=plan_load(resolved_in_code(settings), reporter))
    if merged.load_plan.tokenizer.tokenizer.get_vocab() != load_plan.tokenizer.tokenizer.get_vocab():
        raise ModelError(
            f"the tokenizer of {path} differs from that of {load_plan.source.name}",
            hint="Give --merged the directory that was merged from it.",
        )
    check_weights(merged.load_plan, reporter)
    return merged
