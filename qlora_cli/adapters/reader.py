"""The one reader of an adapter: its files, brought to the names and shapes of its base, and checked.

`open_adapter` maps the files into memory. `fit` puts the adapter on its base on the meta device, by PEFT's own reading
of its config: what PEFT wraps, with which rank and scale, is what the adapter was trained as. What merges it, attaches
it or predicts it goes by the result; nothing else reads adapters.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qlora_cli.adapters.decoder import WHOLE, Renaming, has_targets, on_decoder, renaming_by_config, renaming_of
from qlora_cli.adapters.keys import (
    AdapterKey,
    Names,
    beginning_of,
    in_base,
    is_of_base,
    with_ties,
    without_wrappers,
)
from qlora_cli.adapters.patterns import check_patterns, drop_unmatched
from qlora_cli.adapters.targets import BASE
from qlora_cli.errors import ModelError
from qlora_cli.model_files.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLE,
    ADAPTER_WEIGHTS,
    AdapterConfig,
    AdapterOutline,
    read_adapter_config,
)
from qlora_cli.model_files.checkpoint import read_header
from qlora_cli.model_files.finite import is_finite
from qlora_cli.model_files.model_config import ModelConfig
from qlora_cli.model_files.pickles import NAMES, check_pickle
from qlora_cli.quantization.embedding import vocabulary_modules, vocabulary_weights

EDITED = "Was adapter_config.json edited? Copy the original again."
SAME_BASE = "Was it trained on this base? adapter_config.json names the base it belongs to."
BY_PEFT = "Merge it with PEFT's own merge_and_unload()."
# Beginnings that take something out of the base, or put something in, of which the adapter's files do not tell.
CHANGES_BASE = ("corda", "loftq", "lora_ga")
BEGUN_BY_PEFT = ("pissa", "olora")  # computed from the base alone, so PEFT does it again
MOST_CHARACTERS = 300
MOST_COPIES = 4  # of its layers, that a model may be made of: who grows one that way doubles it at most
WEIGHTS_ARE = ("F64", "F32", "F16", "BF16")  # floats of 8 bits, and whole numbers, PEFT computes nothing from

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """The files of an adapter: its config, and its tensors by their keys there."""

    directory: Path
    file: Path
    config: AdapterConfig
    tensors: State


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter, fitted to its base.

    Attributes:
        directory: Where it was read.
        config: Its config as it stands in the file.
        lora: The same for PEFT, on this base.
        values: Its tensors, all that PEFT expects, by PEFT's keys on this base.
        kept: Parameters of the base that its file holds, by their names in the base: embedding and head of a grown
            vocabulary, biases that were trained.
        given: Those of them that the file itself holds; others are one with them in the base.
        trained: Those of them that train: biases, as the config says.
        renaming: What its file calls the decoder, where it was put on a model with towers.
        is_converted: Whether config and tensors were those of another layout of the model's weights.
    """

    directory: Path
    config: AdapterConfig
    lora: LoraConfig
    values: State
    kept: State
    given: frozenset[str]
    trained: frozenset[str]
    renaming: Renaming | None = None
    is_converted: bool = False


@dataclass(frozen=True, kw_only=True)
class FittedAdapter:
    """An adapter, and its base on the meta device with the adapter on it."""

    adapter: Adapter
    model: PeftModel = field(repr=False)


def open_adapter(directory: Path, *, allow_pickle: bool) -> StoredAdapter:
    """Return the adapter in `directory`, its tensors mapped into memory.

    Raises:
        ModelError: its files are no LoRA adapter, are damaged, or hold what is no number.
    """
    config = read_adapter_config(directory)
    _check_whole(directory, config)
    file = directory / ADAPTER_WEIGHTS
    if file.is_file():
        tensors = read_tensors(file)
    else:
        assert allow_pickle, "refused when it was found"
        file = directory / ADAPTER_PICKLE
        check_pickle(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        if others := [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]:
            raise ModelError(f"{file} holds {others[0]}, which is no tensor", hint="Save the adapter again with PEFT.")
        _check_numbers(file, tensors)
    _check_dtypes(file, {key: NAMES.get(tensor.dtype, str(tensor.dtype)) for key, tensor in tensors.items()})
    return StoredAdapter(directory=directory, file=file, config=config, tensors=tensors)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in the file of an adapter, mapped into memory.

    Raises:
        ModelError: it is damaged, or holds what is no number.
    """
    read_header(file.parent, file.name)
    tensors = load_file(file)
    _check_numbers(file, tensors)
    return tensors


def _check_numbers(file: Path, tensors: State) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ModelError(
                f"the adapter in {file.parent} is broken: {key} in {file.name} holds NaN or infinite values",
                hint="Take an earlier checkpoint of the run.",
            )


def fit_outline(outline: AdapterOutline, model: PreTrainedModel, base: ModelConfig) -> Adapter:
    """Return an adapter fitted to `model`, by shapes alone; by its config alone where the shapes are not known.

    Raises:
        ModelError: it does not fit.
    """
    stored = without_values(outline)
    if outline.headers is not None:
        return fit(stored, model, base).adapter
    nothing: dict[str, torch.Tensor] = {}
    lora = _for_peft(stored, _names_in(model))
    renaming = renaming_by_config(lora, model) if base.text_only else None
    if renaming is not None:
        on_decoder(lora, model, renaming)
    return Adapter(
        directory=outline.directory,
        config=outline.config,
        lora=lora,
        values=nothing,
        kept=nothing,
        given=frozenset(),
        trained=frozenset(),
    )


def without_values(outline: AdapterOutline) -> StoredAdapter:
    """Return an adapter with tensors on the meta device."""
    _check_whole(outline.directory, outline.config)
    file = outline.directory / ADAPTER_WEIGHTS
    _check_dtypes(file, {one.name: one.dtype for one in outline.headers or ()})
    tensors = {one.name: torch.empty(one.shape, device="meta") for one in outline.headers or ()}
    return StoredAdapter(directory=outline.directory, file=file, config=outline.config, tensors=tensors)


def _check_dtypes(file: Path, dtypes: Mapping[str, str]) -> None:
    """Check that all but copies of the base's own values are of a dtype that adapters are computed in."""
    for key, dtype in dtypes.items():
        if dtype not in WEIGHTS_ARE and not is_of_base(key):
            raise ModelError(
                f"{file} can't be used: {key} is of dtype {dtype.removeprefix('torch.')}, and weights of an adapter "
                f"are one of {', '.join(WEIGHTS_ARE)}",
                hint="Save the adapter again in 16 or 32 bits.",
            )


def _check_whole(directory: Path, config: AdapterConfig) -> None:
    """Check that an adapter is all there with its files and its base."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(CHANGES_BASE):
        raise changed_base(directory, init)
    if config.non_null.get("arrow_config") is not None:
        raise ModelError(
            f"the adapter in {directory} can't be used: it chooses among other adapters, token by token "
            "(arrow_config), and those are not in its files",
            hint="Name one of the adapters that it chooses among.",
        )


def changed_base(directory: Path, init: str) -> ModelError:
    """Return the error for an adapter that began by changing its base, and is needed with the base as it was."""
    return ModelError(
        f"the adapter in {directory} can't be used: it began by {init}, which changed its base, and says nothing of "
        "the base as it was",
        hint="Of a run, take its adapter/, which was converted when it ended; if it has none, give the same qlora "
        "train command again, which writes it at its end, or when it is stopped by Ctrl-C. Else save it with "
        "path_initial_model_for_weight_conversion.",
    )


def rows_of(stored: StoredAdapter, model: PreTrainedModel, base: ModelConfig) -> int:
    """Return how many rows the vocabulary had that an adapter was trained with, as far as it tells; 0 if it does not.

    Other tools give a vocabulary more rows than their tokenizer has ids, up to a multiple of 32 or 64.
    """
    names, ends = Names(model, base), vocabulary_weights(model)
    modules = vocabulary_modules(model).keys()
    rows = [0]
    for key, tensor in stored.tensors.items():
        found = names.read(key)
        if found is None or in_base(found.module) not in modules or not tensor.ndim:
            continue
        if in_base(found.name) in ends:
            rows.append(tensor.shape[0])
        elif found.tail == "lora_embedding_A":
            rows.append(tensor.shape[1])
        elif found.tail == "lora_B.weight":
            rows.append(tensor.shape[0])
    return max(rows)


def fit(stored: StoredAdapter, model: PreTrainedModel, base: ModelConfig) -> FittedAdapter:
    """Put an adapter on `model`, which is on the meta device, and bring its tensors to the names there.

    Raises:
        ModelError: it does not fit.
    """
    names = Names(model, base)
    keys = _keys(stored, names, base)
    renaming = renaming_of([key for key, _ in keys.values()])
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tied = dict(model.all_tied_weights_keys or {})
    config = _for_peft(stored, _names_in(model))
    if renaming is not None:
        on_decoder(config, model, renaming)
    lora = deepcopy(config)
    config.init_lora_weights = True  # there are no values that an adapter could begin with here
    with torch.device("meta"):  # whatever rank the config says, which the file's shapes are checked against below
        adapted = put_on(model, config, stored.directory)
    state = {f"{BASE}{name}": tensor for name, (_, tensor) in keys.items()}
    expected = expected_state(adapted)
    is_converted = _lora_keys(state) != _lora_keys(expected)
    if is_converted:
        state = dict(convert_peft_adapter_state_dict_for_transformers(adapted, config, state))
    state = {key: value for key, value in state.items() if not key.startswith(_followers(adapted))}
    of_base = _parameters_in(state, expected, adapted, parameters)
    _check(stored, state, expected, of_base, parameters)
    kept = {name: state[key] for key, name in of_base.items()}
    ties = with_ties(kept, tied)
    adapter = Adapter(
        directory=stored.directory,
        config=stored.config,
        lora=lora,
        values={key: state[key] for key in expected if key not in of_base},
        kept={name: kept[stored] for name, stored in ties.items()},
        given=frozenset(kept),
        trained=frozenset(name for key, name in of_base.items() if key in expected),
        renaming=renaming,
        is_converted=is_converted,
    )
    return FittedAdapter(adapter=adapter, model=adapted)


def _names_in(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names that patterns are matched with: those of modules and parameters, also in a model with towers."""
    own = f"{model.base_model_prefix}."
    for name, _ in (*model.named_modules(), *model.named_parameters()):
        yield name
        if name.startswith(own):
            yield from (f"{whole}{name.removeprefix(own)}" for whole in WHOLE)


def put_on(model: PreTrainedModel, config: LoraConfig, directory: Path) -> PeftModel:
    """Return `model` with an adapter of `config`, whose values are still to be set.

    Raises:
        ModelError: the model has nothing that the config names, or can't be adapted so.
    """
    file = directory / ADAPTER_CONFIG
    _check_in_range(model, config, file)
    try:
        with without_warnings():
            return get_peft_model(model, config)
    except ImportError as error:
        raise ModelError(
            f"the adapter in {directory} can't be put on its base: {file} needs the package {error.name}",
            hint="If its layers are those of the base, take the key out of the file.",
        ) from error
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, AttributeError, re.error) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"the adapter in {directory} can't be put on its base, as {file.name} says: {_first_line(error)}",
            hint=EDITED if has_targets(config, model) else SAME_BASE,
        ) from error


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}…"


def _check_in_range(model: PreTrainedModel, config: LoraConfig, file: Path) -> None:
    """Check that layers and rows that a config names by number are in the model."""
    rows = config.trainable_token_indices or ()
    named = [row for some in rows.values() for row in some] if isinstance(rows, dict) else list(rows)
    spans, tokens = config.layer_replication or (), config.alora_invocation_tokens or ()
    layers = [number for pair in spans for number in pair]
    num_layers = model.config.get_text_config().num_hidden_layers
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    num_rows = embedding.shape[0]
    beyond = {
        "layer_replication": ([one for one in layers if not 0 <= one <= num_layers], f"{num_layers} layers"),
        "trainable_token_indices": ([one for one in named if not 0 <= one < num_rows], f"{num_rows:,} rows"),
        "alora_invocation_tokens": ([one for one in tokens if one >= num_rows], f"{num_rows:,} rows"),
    }
    for key, (numbers, size) in beyond.items():
        if numbers:
            raise ModelError(
                f"{file} can't be used: {key} names {numbers[0]}, and the base has {size}", hint=SAME_BASE
            )
    if (repeated := sum(end - first for first, end in spans)) > MOST_COPIES * num_layers:
        raise ModelError(
            f"{file} can't be used: layer_replication makes {repeated:,} layers, and the base has {num_layers:,}, of "
            f"which at most {MOST_COPIES} times as many are made",
            hint=EDITED,
        )


def expected_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the tensors of the adapter on `model`, as it would save them."""
    # Given the state, PEFT does not take the biases of LoRA layers for shards of something.
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
    return found


@contextmanager
def without_warnings() -> Iterator[None]:
    """Leave out what PEFT warns of without cause, or what is seen to here: tied weights, stored orders, patterns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _for_peft(stored: StoredAdapter, names: Iterator[str]) -> LoraConfig:
    """Return the config as PEFT takes it; its patterns are matched with the `names` in the base first."""
    base_names = list(names)
    check_patterns(stored.directory, stored.config, base_names)
    content: dict[str, Any] = stored.config.used
    init = stored.config.init_lora_weights
    if not (isinstance(init, str) and init.lower().startswith(BEGUN_BY_PEFT)):
        # How it began is past; PEFT would want what it began with, such as scipy for LoftQ.
        content |= {"init_lora_weights": True}
    try:
        with without_warnings():
            config = PeftConfig.from_peft_type(**content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = "PEFT makes nothing of it" if isinstance(error, RecursionError) else _first_line(error)
        raise ModelError(f"{stored.directory / ADAPTER_CONFIG} can't be used: {reason}", hint=EDITED) from error
    assert isinstance(config, LoraConfig), "its type was checked"
    drop_unmatched(config, base_names)
    return config


def _keys(stored: StoredAdapter, names: Names, base: ModelConfig) -> dict[str, tuple[AdapterKey, torch.Tensor]]:
    """Return the tensors by their names in the base, each with its key, taken apart; towers are left out."""
    found: dict[str, tuple[AdapterKey, torch.Tensor]] = {}
    adapters: set[str] = set()
    for key, tensor in stored.tensors.items():
        if base.is_in_tower(key):
            _check_tower(stored, key, tensor)
            continue
        read = names.read(key)
        if read is None or (read.is_copy and read.name in found):
            continue
        if read.adapter is not None:
            adapters.add(read.adapter)
        before = found.get(read.name)
        if before is not None and not before[0].is_copy and not _are_equal(before[1], tensor):
            many = f": {', '.join(sorted(adapters))}" if len(adapters) > 1 else ""
            raise ModelError(
                f"{stored.file} holds more than one adapter{many}: {read.name} is in it twice",
                hint="Save the one that is meant alone: PEFT's save_pretrained(…, selected_adapters=[…]).",
            )
        found[read.name] = (read, tensor)
    return found


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape if one.is_meta else torch.equal(one, other)


def _check_tower(stored: StoredAdapter, key: str, tensor: torch.Tensor) -> None:
    """Check that a tensor on a tower, which is not loaded, does nothing: training on text alone leaves it so."""
    if "lora_A" not in key and not tensor.is_meta and tensor.any():
        raise ModelError(
            f"the adapter in {stored.directory} changes more than the text decoder: {without_wrappers(key)}",
            hint=BY_PEFT,
        )


def _layer_of(key: str) -> str:
    """Return the layer that a weight of LoRA is on, as its key says."""
    return key.partition(".lora_")[0]


def _lora_keys(state: State) -> set[str]:
    return {key for key in state if ".lora_" in key}


def _followers(adapted: PeftModel) -> tuple[str, ...]:
    """Return where the names of tied heads begin whose rows are those of the embedding; PEFT may save them twice."""
    return tuple(
        f"{path}."
        for path, module in adapted.named_modules()
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is not None
    )


def _parameters_in(
    state: State, expected: State, adapted: PeftModel, parameters: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Return the keys of what are parameters of the base, by which no module trains whole, and their names there."""
    whole = tuple(f"{path}." for path, module in adapted.named_modules() if isinstance(module, ModulesToSaveWrapper))
    keys = dict.fromkeys([*expected, *state])
    return {key: in_base(key) for key in keys if in_base(key) in parameters and not key.startswith(whole)}


def _check(
    stored: StoredAdapter,
    state: State,
    expected: State,
    of_base: Mapping[str, str],
    parameters: Mapping[str, torch.Tensor],
) -> None:
    """Check that the tensors are all that are expected, of the right shapes, and no others."""
    if unknown := sorted(state.keys() - expected.keys() - of_base.keys()):
        names = [without_wrappers(key) for key in unknown]
        raise ModelError(
            f"the adapter in {stored.directory} has {len(unknown)} weights that the base has no place for, such as "
            f"{unknown[0][:MOST_CHARACTERS]}; they begin with {beginning_of(names)[:MOST_CHARACTERS]}, and the base's "
            f"with {beginning_of(list(parameters))}",
            hint=SAME_BASE,
        )
    if missing := sorted(expected.keys() - state.keys()):
        there = {_layer_of(key) for key in state}
        raise ModelError(
            f"the adapter in {stored.directory} lacks {len(missing)} of its weights, such as {missing[0]}",
            hint=EDITED if all(_layer_of(key) in there for key in missing) else SAME_BASE,
        )
    for key, value in state.items():
        wanted = parameters[of_base[key]] if key in of_base else expected[key]
        if value.shape != wanted.shape:
            raise ModelError(
                f"the adapter in {stored.directory}: {key} is {tuple(value.shape)}, and the base asks for "
                f"{tuple(wanted.shape)}",
                hint=SAME_BASE,
            )
