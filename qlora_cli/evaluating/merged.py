"""The merged model that an adapter is compared with: found, and checked to read the same tokens."""

from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.evaluating.rows import HeldOut
from qlora_cli.events import Noted, Reporter, SilentReporter
from qlora_cli.loading.blueprint import Blueprint
from qlora_cli.loading.text import load_text_side
from qlora_cli.model_files.merged import merged_model_of, settings_of_merged, staleness
from qlora_cli.settings.models import EvaluationSettings, LoadSettings


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merged model, and how it is loaded: as it is stored, in the dtype of the model it was merged from."""

    path: Path
    settings: LoadSettings


def find_merged(
    request: EvaluationSettings, blueprint: Blueprint, rows: HeldOut | None, reporter: Reporter
) -> Merged | None:
    """Return the merged model that was named, or that is in the run directory; None if there is none.

    Raises:
        ModelError: it can't be used, or its tokenizer is another one, so that the tokens would mean other words.
    """
    path = request.merged or merged_model_of(blueprint.source)
    if path is None:
        return None
    if stale := staleness(path, blueprint.source):
        reporter.report(Noted(level="warning", message=stale))
    merged = Merged(path=path, settings=settings_of_merged(path, blueprint.settings.model, blueprint.dtype))
    longest = int(rows.data.lengths.max()) if rows is not None else None
    text = load_text_side(merged.settings.model, SilentReporter(), max_length=longest)
    if text.tokenizer.tokenizer.get_vocab() != blueprint.tokenizer.tokenizer.get_vocab():
        raise ModelError(
            f"the tokenizer of {path} is another one than that of {blueprint.source.name}",
            hint="Give --merged the directory that was merged from it.",
        )
    return merged
