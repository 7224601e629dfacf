"""The files of an adapter, and its config: what kind it is, on what, and of which base. Imports no torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic_core import PydanticCustomError

from qlora_cli.errors import ModelError
from qlora_cli.model_files.adapter_variants import (
    BlockDiagonal,
    GroupSize,
    Initialization,
    Kasa,
    Monteclora,
    TokenIds,
    Velora,
)
from qlora_cli.model_files.checkpoint import TensorHeader, read_header, read_json
from qlora_cli.model_files.pattern_trial import MOST_SECONDS, TriedPattern, find_fault
from qlora_cli.model_files.vocabulary import num_ids
from qlora_cli.runs.directory import ADAPTER_CONFIG as ADAPTER_CONFIG
from qlora_cli.runs.directory import ADAPTER_PICKLE as ADAPTER_PICKLE
from qlora_cli.runs.directory import ADAPTER_WEIGHTS as ADAPTER_WEIGHTS
from qlora_cli.settings.choices import LoraInit
from qlora_cli.settings.settle import InferredSettings, by_path, inferred_origin

LORA = "LORA"
BY_HAND = "Was it edited by hand? PEFT writes it with the right types; copy the original again."
MOST_CHARACTERS = 60
NOT_NULL = ("peft_type", "r", "lora_alpha")  # a null elsewhere is how some tools write "not given"
# What tools write into every config, and what does nothing alone.
MUTE = (
    *("megatron_core", "auto_mapping", "unsloth_version", "unsloth_fixed"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of a beginning, which is past
)
MOST_PATTERN_CHARACTERS, MOST_CHARACTERS_OF_PATTERNS = 10_000, 100_000  # of each, of all together
MOST_PATTERNS, MOST_NAMES, MOST_LAYERS = 2_000, 10_000, 2_000
# What is taken from the config of somebody's adapter: what the adapter is. Modules to import and memory to run in are
# not for a file to choose, and what PEFT does not know has no effect.
TAKEN = frozenset(
    (
        *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights"),
        *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
        *("layer_replication", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
        *("bias", "lora_bias", "fan_in_fan_out", "use_dora", "use_qalora", "qalora_group_size", "use_bdlora"),
        *("arrow_config", "kasa_config", "velora_config", "monteclora_config", "alora_invocation_tokens"),
    )
)


Number = TypeVar("Number", int, float)


def _pattern(value: str) -> str:
    if len(value) > MOST_PATTERN_CHARACTERS:
        raise PydanticCustomError("pattern", f"a pattern of at most {MOST_PATTERN_CHARACTERS:,} characters")
    return value


def _span(value: list[int]) -> list[int]:
    if not 0 <= value[0] < value[1]:
        raise PydanticCustomError("span", "ranges of layers, each [first, end] with first before end")
    return value


def _few_layers(value: list[list[int]]) -> list[list[int]]:
    if sum(end - first for first, end in value) > MOST_LAYERS:
        raise PydanticCustomError("layers", f"ranges of at most {MOST_LAYERS:,} layers in all")
    return value


def _few_names(value: list[str]) -> list[str]:
    if len(value) > MOST_NAMES:
        raise PydanticCustomError("names", f"at most {MOST_NAMES:,} names")
    return value


def _few_patterns(value: dict[str, Number]) -> dict[str, Number]:
    if len(value) > MOST_PATTERNS:
        raise PydanticCustomError("patterns", f"at most {MOST_PATTERNS:,} patterns")
    return value


Names = Annotated[list[str], AfterValidator(_few_names)]
Positive = Annotated[int, Field(gt=0)]
Span = Annotated[list[int], Field(min_length=2, max_length=2), AfterValidator(_span)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class AdapterConfig(BaseModel):
    """The fields of a LoRA config that decide what the adapter is, of the types that PEFT takes.

    There is one for each key that is taken; `content` is all of the file.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    peft_type: Literal["LORA"]
    task_type: str | None = None
    peft_version: str | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Positive = 8
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)] = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Names | Pattern | None = None
    target_parameters: Names | None = None
    exclude_modules: Names | Pattern | None = None
    layers_to_transform: list[int] | int | None = None
    layer_replication: Annotated[list[Span], AfterValidator(_few_layers)] | None = None
    layers_pattern: list[Pattern] | Pattern | None = None
    rank_pattern: Annotated[dict[Pattern, Positive], AfterValidator(_few_patterns)] = {}
    alpha_pattern: Annotated[dict[Pattern, float], AfterValidator(_few_patterns)] = {}
    modules_to_save: Annotated[list[Pattern], AfterValidator(_few_names)] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | Initialization = True
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    ensure_weight_tying: bool = False
    use_qalora: bool = False
    qalora_group_size: GroupSize = 16
    use_bdlora: BlockDiagonal | None = None
    arrow_config: dict[str, JsonValue] | None = None
    kasa_config: Kasa | None = None
    velora_config: Velora | None = None
    monteclora_config: Monteclora | None = None
    alora_invocation_tokens: TokenIds | None = None
    content: dict[str, Any]

    @property
    def given(self) -> dict[str, Any]:
        """What the file says, without what it says nothing of."""
        return {key: value for key, value in self.content.items() if value is not None}

    @property
    def taken(self) -> dict[str, Any]:
        """What of it an adapter is loaded by; the file of one that trains on keeps the rest."""
        none = () if self.alora_invocation_tokens else ("alora_invocation_tokens",)  # PEFT looks for the first of none
        return {key: value for key, value in self.given.items() if key in TAKEN and key not in none}

    @property
    def left_out(self) -> tuple[str, ...]:
        """The keys that it is not loaded by although they say something."""
        return tuple(
            sorted(key for key, value in self.given.items() if key not in TAKEN and value and key not in MUTE)
        )


@dataclass(frozen=True, kw_only=True)
class AdapterOutline:
    """An adapter without its values: its config, and the headers of its tensors.

    `headers` is None of a pickle, which has none, and where the weights are not here. `num_ids` are those of the
    tokenizer next to it, for which the base is given rows.
    """

    directory: Path
    config: AdapterConfig
    headers: tuple[TensorHeader, ...] | None
    num_ids: int

    @property
    def description(self) -> dict[str, Any]:
        """All of it, in plain values."""
        shapes = {one.name: one.shape for one in self.headers or ()}
        return {"config": self.config.content, "shapes": shapes, "ids": self.num_ids}

    @property
    def num_rows(self) -> int:
        """How many rows the vocabulary needs, as the tokenizer says; the config says it if no weights are here."""
        rows = self.config.trainable_token_indices or ()
        named = [row for some in rows.values() for row in some] if isinstance(rows, dict) else list(rows)
        return max(self.num_ids, max(named, default=-1) + 1 if self.headers is None else 0)


def read_outline(directory: Path) -> AdapterOutline:
    """Return the outline of the LoRA adapter in `directory`.

    Raises:
        ModelError: its config can't be used, or its file of tensors is damaged.
    """
    config = read_adapter_config(directory)
    file = directory / ADAPTER_WEIGHTS
    has_header = file.exists() or file.is_symlink()  # a link to nothing is reported as such
    headers = tuple(read_header(directory, ADAPTER_WEIGHTS)) if has_header else None
    return AdapterOutline(directory=directory, config=config, headers=headers, num_ids=num_ids(directory))


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Return the config of the LoRA adapter in `directory`.

    Raises:
        ModelError: it can't be read, is of another kind of adapter, or holds a value of another type.
    """
    file = directory / ADAPTER_CONFIG
    content = read_json(file)
    given = {key: value for key, value in content.items() if value is not None or key in NOT_NULL}
    _check_kind(file, given)
    try:
        config = AdapterConfig.model_validate({**given, "content": content})
    except ValidationError as error:
        raise ModelError(f"{file} can't be used: {_reason(error, given)}", hint=BY_HAND) from error
    if fault := _pattern_fault(config):
        raise ModelError(f"{file} can't be used: {fault}", hint=BY_HAND)
    return config


def patterns_of(config: AdapterConfig) -> Iterator[TriedPattern]:
    """Yield the patterns of a config, with what PEFT makes of each."""
    for key, whole in (("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules)):
        if isinstance(whole, str):
            yield TriedPattern(key, whole, whole, "fullmatch")
    for key, ends in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for end in ends:
            yield TriedPattern(key, end, rf"(.*\.)?({end})$")
    lists = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for layers in lists or ():
        yield TriedPattern("layers_pattern", layers, rf"(?:^|.*?\.){layers}\.(?P<idx>\d+)\.")
    for module in config.modules_to_save or ():
        yield TriedPattern("modules_to_save", module, rf"(^|.*\.){module}($|\..*)")


def _pattern_fault(config: AdapterConfig) -> str | None:
    """Return in words what is wrong with the patterns of a config, whatever base they are matched with."""
    patterns = list(patterns_of(config))
    if (found := sum(len(one.written) for one in patterns)) > MOST_CHARACTERS_OF_PATTERNS:
        most = f"{MOST_CHARACTERS_OF_PATTERNS:,} characters in all"
        return f"its patterns have {found:,} characters, and should have at most {most}"
    fault = find_fault(patterns)
    if fault is None:
        return None
    key, pattern = fault.pattern.key, fault.pattern.written
    why = f"it takes more than {MOST_SECONDS:g} seconds to compile" if fault.reason is None else fault.reason
    value = _shown(config.content[key])
    return f"{key} is {value}, and should be a regular expression ({pattern[:MOST_CHARACTERS]!r}: {why})"


def notes_on_left_out(adapters: Iterable[Path | None]) -> Iterator[str]:
    """Yield for each folder of an adapter which keys of its config it is not loaded by, in a sentence."""
    for directory in adapters:
        keys = () if directory is None else read_adapter_config(directory).left_out
        if directory is not None and keys:
            yield f"{directory / ADAPTER_CONFIG}: {', '.join(keys)} left out, which an adapter is not loaded by here"


def lora_settings_of(config: AdapterConfig) -> dict[str, object]:
    """Return an adapter's config as the settings of the section `lora`; values may be such as nobody can ask for."""
    modules, parameters, start = config.target_modules, config.target_parameters, config.init_lora_weights
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "target_modules": (modules,) if isinstance(modules, str) else tuple(sorted(modules or ())),
        "target_parameters": tuple(sorted(parameters)) if parameters else None,
        "rank_pattern": config.rank_pattern or None,
        "alpha_pattern": config.alpha_pattern or None,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": LoraInit.PISSA if begins_by_pissa(start) else LoraInit.DEFAULT,
        "modules_to_save": tuple(sorted(config.modules_to_save)) if config.modules_to_save else None,
    }


def inferred_from_adapter(config: AdapterConfig, directory: Path) -> InferredSettings:
    """Return what the adapter in `directory` says of the settings of a run that trains it on."""
    values = by_path("lora", lora_settings_of(config))
    return InferredSettings(
        values=values, origin=inferred_origin(directory / ADAPTER_CONFIG), is_fixed=True, is_foreign=True
    )


def begins_by_pissa(init_lora_weights: object) -> bool:
    """Whether an adapter whose config says so holds the principal parts of its base, which PEFT takes out of that."""
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith("pissa")


def check_unchanged(
    name: str, config: AdapterConfig, given: Mapping[str, Any], recorded: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Check that the settings `given` of a new adapter are those of the one that is called `name` and trains on.

    `recorded` are what its run says of them, if it is of one: the same in other words.

    Raises:
        ModelError: one is another.
    """
    known = (lora_settings_of(config), *recorded)
    for key, value in given.items():
        if not any(key in said and _plain(value) == _plain(said[key]) for said in known):
            raise ModelError(
                f"{name} is an adapter, which trains on as it is: lora.{key} can't be changed",
                hint="Leave the lora settings out, or name the base model.",
            )


def _plain(value: object) -> object:
    """Return a value to compare, in which the order of names has no meaning."""
    return sorted(map(str, value)) if isinstance(value, list | tuple) else value


def _check_kind(file: Path, content: Mapping[str, Any]) -> None:
    kind = content.get("peft_type")
    if kind is None:
        raise ModelError(
            f"{file} has no peft_type, so it does not say what kind of adapter this is",
            hint=f'If it is LoRA, add "peft_type": "{LORA}" to it.',
        )
    if kind != LORA:
        raise ModelError(
            f"the adapter in {file.parent} is {kind}, not LoRA",
            hint="Only LoRA adapters are used here; merge it into its base with PEFT, and name the result.",
        )


def _reason(error: ValidationError, content: Mapping[str, Any]) -> str:
    """Return what is wrong with the first field that is: every alternative that its value is none of."""
    problems = error.errors()
    key = str(problems[0]["loc"][0])
    wanted = dict.fromkeys(one["msg"].removeprefix("Input should be ") for one in problems if one["loc"][0] == key)
    return f"{key} is {_shown(content[key])}, and should be {' or '.join(wanted)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
