"""Load the tokenizer of a model and count its positions, without its weights."""

from dataclasses import dataclass

from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.model_files.given_model import CONFIG
from qlora_cli.model_files.model_config import read_config
from qlora_cli.model_files.source import find_tokenizer
from qlora_cli.settings.models import ModelSettings
from qlora_cli.tokenizing.positions import apply_rope_scaling, check_length, num_positions
from qlora_cli.tokenizing.tokenizer import LoadedTokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class TextInterface:
    """The tokenizer of a model, and its positions; None if they have no limit or there is no config."""

    tokenizer: LoadedTokenizer
    num_positions: int | None


def load_text_interface(settings: ModelSettings, reporter: Reporter, *, max_length: int | None) -> TextInterface:
    """Load the tokenizer of a model as `train` does, and check `max_length`, unless None, against the positions.

    Raises:
        ModelNotFoundError: no such model.
        ModelError: it has no tokenizer that can be used, or fewer positions than `max_length`.
    """
    reporter.report(PhaseStarted(title=f"Finding {settings.name}"))
    source = find_tokenizer(settings, reporter)
    tokenizer = load_tokenizer(source, settings)
    for note in tokenizer.notes:
        reporter.report(Noted(message=note))
    if not (source.path / CONFIG).is_file():
        reporter.report(Noted(message=f"{source.path} has no {CONFIG}: its number of positions is unknown"))
        return TextInterface(tokenizer=tokenizer, num_positions=None)
    config = read_config(source, trust_remote_code=settings.trust_remote_code).config
    if max_length is not None:
        check_length(config, max_length, settings.rope_scaling)
    apply_rope_scaling(config, settings.rope_scaling)
    return TextInterface(tokenizer=tokenizer, num_positions=num_positions(config))
