"""Read a model's small files, and settle the settings of a load by them, before a weight is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers.utils import logging as transformers_logging

from qlora_cli.errors import ModelError, Problem, SettingsError
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.files import as_json
from qlora_cli.model_files.adapter_files import check_unchanged, inferred_from_adapter, read_adapter_config
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.digest import base_digest
from qlora_cli.model_files.given_model import CONFIG
from qlora_cli.model_files.model_config import ModelConfig, read_config
from qlora_cli.model_files.source import ModelSource, find_model
from qlora_cli.quantization.methods import method_of
from qlora_cli.quantization.prequantized import Prequantized, check_settings, read_prequantized
from qlora_cli.runs.directory import RUN_FILE, RunDirectory
from qlora_cli.settings.models import DataSettings, LoadSettings, ModelSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.rules.conflicts import ineffective_settings
from qlora_cli.settings.settle import (
    InferredSettings,
    by_path,
    inferred_from_run,
    inferred_origin,
    loading_settings,
    settle,
)
from qlora_cli.tokenizing.positions import check_length, limit_length, note_length, positions_with

LoadT = TypeVar("LoadT", bound=LoadSettings)


@dataclass(frozen=True, kw_only=True)
class ModelOutline:
    """The small files of a model, read before its settings are settled.

    Attributes:
        base: The config, without RoPE scaling.
        prequantized: The quantization of the checkpoint, with the model's names; None if it is not quantized.
    """

    source: ModelSource
    base: ModelConfig
    prequantized: Prequantized | None

    @property
    def run_file(self) -> str:
        """The path of the record of the named run, if any."""
        return RUN_FILE if self.source.run is None else str(RunDirectory(self.source.run).run_file)


def find(settings: ModelSettings, reporter: Reporter) -> ModelOutline:
    """Find a model and read its small files, which are downloaded if they are not in the cache.

    Raises:
        ModelNotFoundError: no such model.
        ModelError: the files are not a causal language model that can be read.
    """
    transformers_logging.disable_progress_bar()  # we report the bytes ourselves, and stdout is for the result
    reporter.report(PhaseStarted(title=f"Finding {settings.name}"))
    return read_model_outline(find_model(settings, reporter), trust_remote_code=settings.trust_remote_code)


def read_model_outline(source: ModelSource, *, trust_remote_code: bool) -> ModelOutline:
    """Read the small files of a model.

    Raises:
        ModelError: they can't be read, or are not of a causal language model.
    """
    base = read_config(source, trust_remote_code=trust_remote_code)
    prequantized = read_prequantized(read_json(source.path / CONFIG), source.name)
    if prequantized is not None:
        prequantized = prequantized.renamed(base.renamed)
    return ModelOutline(source=source, base=base, prequantized=prequantized)


def settle_load(
    asked: Resolved[LoadT], model: ModelOutline, reporter: Reporter, more: Sequence[InferredSettings] = ()
) -> Resolved[LoadT]:
    """Return the settled settings of a load and of what is done with the model.

    Settings that were given apply; otherwise the base is loaded as in the training of the named run. The storage of a
    checkpoint, and an adapter that is trained further, can't be changed. `more` are inferred settings of the caller.

    Raises:
        ModelError: a given setting contradicts the files, or has no effect on them.
    """
    source = model.source
    loading = _inferred(asked, model)
    loaded = settle(asked, loading)
    check_effect(asked, loaded, source.name)
    for difference in (*_differences(asked, model), *_other_base(source)):
        reporter.report(Noted(level="warning", message=difference))
    positions = positions_with(model.base.config, loaded.settings.model.rope_scaling)
    settled = settle(asked, [*limit_length(asked.settings, positions), *loading, *more])
    _check_length(settled, model, reporter)
    return settled


def settle_base(asked: Resolved[LoadT], model: ModelOutline) -> Resolved[LoadT]:
    """Return the settings of a load as `settle_load` does, without reporting anything.

    Raises:
        ModelError: a given setting contradicts the files.
    """
    return settle(asked, _inferred(asked, model))


def _inferred(asked: Resolved[LoadT], model: ModelOutline) -> list[InferredSettings]:
    """Return the settings that are inferred from the files of a model."""
    if model.prequantized is not None:
        check_settings(model.prequantized, asked.given("quantization"), model.source.name)
    return [
        *_inferred_from_checkpoint(model),
        *_inferred_from_run_record(model),
        *_inferred_from_vocabulary(asked, model),
        *_inferred_from_adapter_files(asked, model),
    ]


def stored_facts(prequantized: Prequantized, where: object) -> list[InferredSettings]:
    """Return the settings of a quantized checkpoint's config: those that may be changed, and fixed ones."""
    free = method_of(prequantized.method).free_settings(prequantized.config)
    origin = inferred_origin(where)
    return [
        InferredSettings(values=by_path("quantization", free), origin=origin),
        InferredSettings(values=by_path("quantization", prequantized.settings), origin=origin, is_fixed=True),
    ]


def check_effect(asked: Resolved[LoadT], settled: Resolved[LoadT], name: str) -> None:
    """Check that every given quantization setting has an effect with the settled method.

    Raises:
        ModelError: one has none, and the method is that of a checkpoint or a run.
        SettingsError: one has none with the default method.
    """
    quantization = settled.settings.quantization
    wrong = [one for one in ineffective_settings("quantization", quantization) if asked.is_given(one[0])]
    if wrong and settled.origin_of("quantization.method").kind == "inferred":
        raise ModelError(
            f"has no effect: {name} is stored in {quantization.method.value}",
            hint="Leave it out.",
            setting=wrong[0][0],
        )
    if wrong:
        raise SettingsError([Problem(where=asked.where_of(path), message=why, hint=hint) for path, why, hint in wrong])


def _inferred_from_run_record(model: ModelOutline) -> Iterator[InferredSettings]:
    source = model.source
    if source.run_model is not None and source.run_quantization is not None:
        yield inferred_from_run({"model": source.run_model, "quantization": source.run_quantization}, model.run_file)


def _inferred_from_checkpoint(model: ModelOutline) -> Iterator[InferredSettings]:
    if model.prequantized is not None:
        yield from stored_facts(model.prequantized, model.source.path / CONFIG)


def _inferred_from_vocabulary(asked: Resolved[LoadT], model: ModelOutline) -> Iterator[InferredSettings]:
    """Yield that no tokens are added to an adapter, whose run has already added them."""
    source, tokens = model.source, asked.settings.model.new_tokens
    if source.adapter is None or not tokens:
        return
    recorded = () if source.record is None else source.record.recorded_settings("model")
    if not any(list(tokens) == said.get("new_tokens") for said in recorded):
        raise ModelError(
            f"{source.name} is an adapter: the rows of --new-tokens {','.join(tokens)} would not be trained",
            hint="Leave --new-tokens out, or name the base model.",
        )
    yield InferredSettings(values={"model.new_tokens": None}, origin=inferred_origin(source.adapter), is_fixed=True)


def _inferred_from_adapter_files(asked: Resolved[LoadT], model: ModelOutline) -> Iterator[InferredSettings]:
    """Yield the settings of an adapter that is trained further."""
    directory = model.source.adapter
    if directory is None or "lora" not in type(asked.settings).model_fields:
        return
    config, record = read_adapter_config(directory), model.source.record
    recorded = () if record is None else record.recorded_settings("lora")
    check_unchanged(model.source.name, config, asked.given("lora"), recorded)
    yield inferred_from_adapter(config, directory)


def _differences(asked: Resolved[LoadT], model: ModelOutline) -> Iterator[str]:
    """Yield a description of each given setting that differs from the training of the named run."""
    recorded = {"model": model.source.run_model, "quantization": model.source.run_quantization}
    for section, values in recorded.items():
        given, then = asked.given(section), loading_settings(section, values or {})
        for key in sorted(given.keys() & then.keys()):
            if as_json(given[key]) != then[key]:
                yield f"{section}.{key} is {given[key]} as asked; {model.source.name} was trained with {then[key]}"


def _other_base(source: ModelSource) -> list[str]:
    """Return a warning if the base is not the one that the run was trained on, by samples of its bytes.

    A base from the hub is not checked: it is loaded by its commit.
    """
    known = None if source.record is None or source.commit is not None else source.record.base_model_digest
    if known is None or known == base_digest(source.path):
        return []
    return [f"{source.path} is not the base that {source.name} was trained on: its weights differ"]


def _check_length(settled: Resolved[LoadT], model: ModelOutline, reporter: Reporter) -> None:
    data: DataSettings | None = getattr(settled.settings, "data", None)
    if data is not None:
        check_length(model.base.config, data.max_length, settled.settings.model.rope_scaling)
        note_length(settled, reporter)
