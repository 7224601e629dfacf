"""Read an adapter: map its files to the names and shapes of its base, and check them.

`open_adapter` memory-maps the files. `fit` attaches the adapter to its base on the meta device with PEFT: the modules
that PEFT wraps, and their ranks and scales, are those that the adapter was trained with. Merging, attaching and
predicting use the result; nothing else reads adapters.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
from transformers.initialization import no_init_weights

from qlora_cli.adapters.decoder import (
    WHOLE_PREFIXES,
    Renaming,
    convert_to_decoder,
    has_targets,
    renaming_by_config,
    renaming_of,
)
from qlora_cli.adapters.keys import (
    AdapterKey,
    KeyParser,
    describe_prefix,
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
# Initializations that change the base in a way that the adapter's files do not record.
CHANGES_BASE = ("corda", "loftq", "lora_ga")
INITIALIZED_BY_PEFT = ("pissa", "olora")  # computed from the base alone, so PEFT repeats it
MOST_CHARACTERS = 300
MOST_COPIES = 4  # limit on the copies of the layers; in practice they are doubled at most
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")  # PEFT can't compute with 8-bit floats and integers

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """The files of an adapter: its config, and its tensors by their keys in the file."""

    directory: Path
    file: Path
    config: AdapterConfig
    tensors: State


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter, fitted to its base.

    Attributes:
        directory: The directory that it was read from.
        config: Its config as in the file.
        lora: Its config for PEFT on this base.
        values: All its tensors that PEFT expects, by PEFT's keys on this base.
        base_parameters: Parameters of the base that its file holds, and those tied to them, by their names in the
            base: embedding and head of an extended vocabulary, trained biases.
        in_file: The names of the base parameters in the file itself, without tied ones.
        trained: The names of the base parameters that are trained: biases, by the config.
        renaming: How its file names the decoder, if it was trained on a model with towers.
        is_converted: Whether config and tensors were converted from another layout of the model's weights.
    """

    directory: Path
    config: AdapterConfig
    lora: LoraConfig
    values: State
    base_parameters: State
    in_file: frozenset[str]
    trained: frozenset[str]
    renaming: Renaming | None = None
    is_converted: bool = False


@dataclass(frozen=True, kw_only=True)
class FittedAdapter:
    """An adapter, and its base on the meta device with the adapter attached."""

    adapter: Adapter
    model: PeftModel = field(repr=False)


def open_adapter(directory: Path, *, allow_pickle: bool) -> StoredAdapter:
    """Return the adapter in `directory`, with memory-mapped tensors.

    Raises:
        ModelError: its files are not a LoRA adapter, are damaged, or hold NaN or infinity.
    """
    config = read_adapter_config(directory)
    _check_self_contained(directory, config)
    file = directory / ADAPTER_WEIGHTS
    if file.is_file():
        tensors = read_tensors(file)
    else:
        assert allow_pickle, "refused earlier"
        file = directory / ADAPTER_PICKLE
        check_pickle(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        if invalid := [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]:
            raise ModelError(
                f"{file} holds {invalid[0]}, which is not a tensor", hint="Save the adapter again with PEFT."
            )
        _check_numbers(file, tensors)
    _check_dtypes(file, {key: NAMES.get(tensor.dtype, str(tensor.dtype)) for key, tensor in tensors.items()})
    return StoredAdapter(directory=directory, file=file, config=config, tensors=tensors)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the memory-mapped tensors in the file of an adapter.

    Raises:
        ModelError: it is damaged, or holds NaN or infinity.
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
    """Return an adapter fitted to `model` by shapes alone, or by its config alone if the shapes are not known.

    Raises:
        ModelError: it does not fit.
    """
    stored = without_values(outline)
    if outline.headers is not None:
        return fit(stored, model, base).adapter
    nothing: dict[str, torch.Tensor] = {}
    lora = _peft_config(stored, _names_in(model))
    renaming = renaming_by_config(lora, model) if base.text_only else None
    if renaming is not None:
        convert_to_decoder(lora, model, renaming)
    return Adapter(
        directory=outline.directory,
        config=outline.config,
        lora=lora,
        values=nothing,
        base_parameters=nothing,
        in_file=frozenset(),
        trained=frozenset(),
    )


def without_values(outline: AdapterOutline) -> StoredAdapter:
    """Return an adapter with its tensors on the meta device."""
    _check_self_contained(outline.directory, outline.config)
    file = outline.directory / ADAPTER_WEIGHTS
    _check_dtypes(file, {one.name: one.dtype for one in outline.headers or ()})
    tensors = {one.name: torch.empty(one.shape, device="meta") for one in outline.headers or ()}
    return StoredAdapter(directory=outline.directory, file=file, config=outline.config, tensors=tensors)


def _check_dtypes(file: Path, dtypes: Mapping[str, str]) -> None:
    """Check the dtypes of an adapter's tensors, except copies of the base's own values."""
    for key, dtype in dtypes.items():
        if dtype not in WEIGHT_DTYPES and not is_of_base(key):
            raise ModelError(
                f"{file} can't be used: {key} is of dtype {dtype.removeprefix('torch.')}, and weights of an adapter "
                f"are one of {', '.join(WEIGHT_DTYPES)}",
                hint="Save the adapter again in 16 or 32 bits.",
            )


def _check_self_contained(directory: Path, config: AdapterConfig) -> None:
    """Check that an adapter is fully defined by its files and its base."""
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
    """Return the error for an adapter whose initialization changed its base, and is used with the original base."""
    return ModelError(
        f"the adapter in {directory} can't be used: it was initialized by {init}, which changed its base, and does "
        "not record the original base",
        hint="For a run, use its adapter/, which was converted at the end; if it has none, give the same qlora "
        "train command again, which writes it at its end, or when it is stopped by Ctrl-C. Otherwise save it with "
        "path_initial_model_for_weight_conversion.",
    )


def num_vocabulary_rows(stored: StoredAdapter, model: PreTrainedModel, base: ModelConfig) -> int:
    """Return the rows of the vocabulary that an adapter was trained with, by its shapes; 0 if they don't tell.

    Other tools pad a vocabulary to a multiple of 32 or 64 rows, more than their tokenizer has ids.
    """
    parser, weights = KeyParser(model, base), vocabulary_weights(model)
    modules = vocabulary_modules(model).keys()
    rows = [0]
    for key, tensor in stored.tensors.items():
        parsed = parser.parse(key)
        if parsed is None or in_base(parsed.module) not in modules or not tensor.ndim:
            continue
        if in_base(parsed.name) in weights:
            rows.append(tensor.shape[0])
        elif parsed.tail == "lora_embedding_A":
            rows.append(tensor.shape[1])
        elif parsed.tail == "lora_B.weight":
            rows.append(tensor.shape[0])
    return max(rows)


def fit(stored: StoredAdapter, model: PreTrainedModel, base: ModelConfig) -> FittedAdapter:
    """Attach an adapter to `model`, which is on the meta device, and map its tensors to the names there.

    Raises:
        ModelError: it does not fit.
    """
    keys = _parse_keys(stored, KeyParser(model, base), base)
    renaming = renaming_of([key for key, _ in keys.values()])
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tied = dict(model.all_tied_weights_keys or {})
    config = _peft_config(stored, _names_in(model))
    if renaming is not None:
        convert_to_decoder(config, model, renaming)
    lora = deepcopy(config)
    config.init_lora_weights = True  # meta tensors have no values to initialize from
    with torch.device("meta"):  # any rank: it is checked with the file's shapes below
        adapted = attach(model, config, stored.directory)
    state = {f"{BASE}{name}": tensor for name, (_, tensor) in keys.items()}
    expected = expected_state(adapted)
    is_converted = _lora_keys(state) != _lora_keys(expected)
    if is_converted:
        state = dict(convert_peft_adapter_state_dict_for_transformers(adapted, config, state))
    tied_heads = _tied_heads(adapted)
    state = {key: value for key, value in state.items() if not key.startswith(tied_heads)}
    of_base = _parameters_in(state, expected, adapted, parameters)
    _check(stored, state, expected, of_base, parameters)
    held = {name: state[key] for key, name in of_base.items()}
    ties = with_ties(held, tied)
    adapter = Adapter(
        directory=stored.directory,
        config=stored.config,
        lora=lora,
        values={key: state[key] for key in expected if key not in of_base},
        base_parameters={name: held[tied_to] for name, tied_to in ties.items()},
        in_file=frozenset(held),
        trained=frozenset(name for key, name in of_base.items() if key in expected),
        renaming=renaming,
        is_converted=is_converted,
    )
    return FittedAdapter(adapter=adapter, model=adapted)


def _names_in(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names to match patterns with: of modules and parameters, also as in a model with towers."""
    own = f"{model.base_model_prefix}."
    for name, _ in (*model.named_modules(), *model.named_parameters()):
        yield name
        if name.startswith(own):
            yield from (f"{whole}{name.removeprefix(own)}" for whole in WHOLE_PREFIXES)


def attach(model: PreTrainedModel, config: LoraConfig, directory: Path) -> PeftModel:
    """Attach an adapter of `config` to `model`, without its values yet.

    Raises:
        ModelError: the model has nothing that the config names, or can't be adapted so.
    """
    file = directory / ADAPTER_CONFIG
    _check_in_range(model, config, file)
    # On the meta device there is nothing to initialize, and PyTorch takes long to do it.
    initializing = no_init_weights() if model.device.type == "meta" else nullcontext()
    try:
        with without_warnings(), initializing:
            return get_peft_model(model, config)
    except ImportError as error:
        raise ModelError(
            f"the adapter in {directory} can't be attached to its base: {file} needs the package {error.name}",
            hint="If its layers are those of the base, remove the key from the file.",
        ) from error
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, AttributeError, re.error) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"the adapter in {directory} can't be attached to its base, as {file.name} says: {_first_line(error)}",
            hint=EDITED if has_targets(config, model) else SAME_BASE,
        ) from error


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}…"


def _check_in_range(model: PreTrainedModel, config: LoraConfig, file: Path) -> None:
    """Check that the model has the layers and rows that a config names by number."""
    rows = config.trainable_token_indices or ()
    indices = [row for part in rows.values() for row in part] if isinstance(rows, dict) else list(rows)
    spans, tokens = config.layer_replication or (), config.alora_invocation_tokens or ()
    layers = [number for pair in spans for number in pair]
    num_layers = model.config.get_text_config().num_hidden_layers
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    num_rows = embedding.shape[0]
    out_of_range = {
        "layer_replication": ([one for one in layers if not 0 <= one <= num_layers], f"{num_layers} layers"),
        "trainable_token_indices": ([one for one in indices if not 0 <= one < num_rows], f"{num_rows:,} rows"),
        "alora_invocation_tokens": ([one for one in tokens if one >= num_rows], f"{num_rows:,} rows"),
    }
    for key, (numbers, size) in out_of_range.items():
        if numbers:
            raise ModelError(
                f"{file} can't be used: {key} names {numbers[0]}, and the base has {size}", hint=SAME_BASE
            )
    if (repeated := sum(end - first for first, end in spans)) > MOST_COPIES * num_layers:
        raise ModelError(
            f"{file} can't be used: layer_replication makes {repeated:,} layers, and the base has {num_layers:,}; "
            f"at most {MOST_COPIES} times as many are supported",
            hint=EDITED,
        )


def expected_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the tensors of the adapter on `model`, as PEFT would save them."""
    # With an explicit state, PEFT does not mistake the biases of LoRA layers for shards.
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
    return state


@contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress PEFT's warnings that are unfounded or handled here: on tied weights, stored orders, patterns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _peft_config(stored: StoredAdapter, names: Iterator[str]) -> LoraConfig:
    """Return the config for PEFT, after its patterns were tried on `names`, those of the base."""
    base_names = list(names)
    check_patterns(stored.directory, stored.config, base_names)
    content: dict[str, Any] = stored.config.used
    init = stored.config.init_lora_weights
    if not (isinstance(init, str) and init.lower().startswith(INITIALIZED_BY_PEFT)):
        # It is already initialized; PEFT would require the means to do it again, such as scipy for LoftQ.
        content |= {"init_lora_weights": True}
    try:
        with without_warnings():
            config = PeftConfig.from_peft_type(**content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = "PEFT can't parse it" if isinstance(error, RecursionError) else _first_line(error)
        raise ModelError(f"{stored.directory / ADAPTER_CONFIG} can't be used: {reason}", hint=EDITED) from error
    assert isinstance(config, LoraConfig), "its type was checked"
    drop_unmatched(config, base_names)
    return config


def _parse_keys(
    stored: StoredAdapter, parser: KeyParser, base: ModelConfig
) -> dict[str, tuple[AdapterKey, torch.Tensor]]:
    """Return the tensors by their names in the base, each with its parsed key; omit those of towers."""
    parsed_tensors: dict[str, tuple[AdapterKey, torch.Tensor]] = {}
    adapters: set[str] = set()
    for key, tensor in stored.tensors.items():
        if base.is_in_tower(key):
            _check_tower(stored, key, tensor)
            continue
        parsed = parser.parse(key)
        if parsed is None or (parsed.is_copy and parsed.name in parsed_tensors):
            continue
        if parsed.adapter is not None:
            adapters.add(parsed.adapter)
        previous = parsed_tensors.get(parsed.name)
        if previous is not None and not previous[0].is_copy and not _are_equal(previous[1], tensor):
            listed = f": {', '.join(sorted(adapters))}" if len(adapters) > 1 else ""
            raise ModelError(
                f"{stored.file} holds more than one adapter{listed}: {parsed.name} occurs twice",
                hint="Save only the one that you need: PEFT's save_pretrained(…, selected_adapters=[…]).",
            )
        parsed_tensors[parsed.name] = (parsed, tensor)
    return parsed_tensors


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape if one.is_meta else torch.equal(one, other)


def _check_tower(stored: StoredAdapter, key: str, tensor: torch.Tensor) -> None:
    """Check that a tensor on a tower, which is not loaded, has no effect: training on text alone leaves it zero."""
    if "lora_A" not in key and not tensor.is_meta and tensor.any():
        raise ModelError(
            f"the adapter in {stored.directory} changes more than the text decoder: {without_wrappers(key)}",
            hint=BY_PEFT,
        )


def _layer_of(key: str) -> str:
    """Return the layer of a LoRA weight, by its key."""
    return key.partition(".lora_")[0]


def _lora_keys(state: State) -> set[str]:
    return {key for key in state if ".lora_" in key}


def _tied_heads(adapted: PeftModel) -> tuple[str, ...]:
    """Return the prefixes of tied heads that share trained rows with the embedding; PEFT may save those twice."""
    return tuple(
        f"{path}."
        for path, module in adapted.named_modules()
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is not None
    )


def _parameters_in(
    state: State, expected: State, adapted: PeftModel, parameters: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Return the keys of parameters of the base, except in modules trained whole, with their names in the base."""
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
    """Check that the tensors are exactly the expected ones, with the right shapes."""
    if unknown := sorted(state.keys() - expected.keys() - of_base.keys()):
        names = [without_wrappers(key) for key in unknown]
        raise ModelError(
            f"the adapter in {stored.directory} has {len(unknown)} weights that don't fit the base, such as "
            f"{unknown[0][:MOST_CHARACTERS]}; "
            f"they begin with {describe_prefix(names)[:MOST_CHARACTERS]}, and the base's "
            f"with {describe_prefix(list(parameters))}",
            hint=SAME_BASE,
        )
    if missing := sorted(expected.keys() - state.keys()):
        layers = {_layer_of(key) for key in state}
        raise ModelError(
            f"the adapter in {stored.directory} lacks {len(missing)} of its weights, such as {missing[0]}",
            hint=EDITED if all(_layer_of(key) in layers for key in missing) else SAME_BASE,
        )
    for key, value in state.items():
        target = parameters[of_base[key]] if key in of_base else expected[key]
        if value.shape != target.shape:
            raise ModelError(
                f"the adapter in {stored.directory}: {key} is {tuple(value.shape)}, and the base needs "
                f"{tuple(target.shape)}",
                hint=SAME_BASE,
            )
