"""Read an adapter's files: its config, with its kind, targets and base, and its headers. Imports no torch."""

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
# Keys that tools write into every config, and keys without an effect of their own.
WITHOUT_EFFECT = (
    *("megatron_core", "auto_mapping", "unsloth_version", "unsloth_fixed"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # only used to initialize
)
MOST_PATTERN_CHARACTERS, MOST_CHARACTERS_OF_PATTERNS = 10_000, 100_000  # of each, of all together
MOST_PATTERNS, MOST_NAMES, MOST_LAYERS = 2_000, 10_000, 2_000
# The keys of a foreign adapter's config that are used: those that define the adapter. A file must not choose modules
# to import or memory to run in, and a key that PEFT does not know has no effect.
USED_KEYS = frozenset(
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


def _check_pattern(value: str) -> str:
    if len(value) > MOST_PATTERN_CHARACTERS:
        raise PydanticCustomError("pattern", f"a pattern of at most {MOST_PATTERN_CHARACTERS:,} characters")
    return value


def _check_span(value: list[int]) -> list[int]:
    if not 0 <= value[0] < value[1]:
        raise PydanticCustomError("span", "ranges of layers, each [first, end] with first before end")
    return value


def _check_num_layers(value: list[list[int]]) -> list[list[int]]:
    if sum(end - first for first, end in value) > MOST_LAYERS:
        raise PydanticCustomError("layers", f"ranges of at most {MOST_LAYERS:,} layers in all")
    return value


def _check_num_names(value: list[str]) -> list[str]:
    if len(value) > MOST_NAMES:
        raise PydanticCustomError("names", f"at most {MOST_NAMES:,} names")
    return value


def _check_num_patterns(value: dict[str, Number]) -> dict[str, Number]:
    if len(value) > MOST_PATTERNS:
        raise PydanticCustomError("patterns", f"at most {MOST_PATTERNS:,} patterns")
    return value


Names = Annotated[list[str], AfterValidator(_check_num_names)]
Positive = Annotated[int, Field(gt=0)]
Span = Annotated[list[int], Field(min_length=2, max_length=2), AfterValidator(_check_span)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]


class AdapterConfig(BaseModel):
    """The fields of a LoRA config that define the adapter, with the types that PEFT accepts.

    There is one field for each key that is used; `content` is the whole file.
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
    layer_replication: Annotated[list[Span], AfterValidator(_check_num_layers)] | None = None
    layers_pattern: list[Pattern] | Pattern | None = None
    rank_pattern: Annotated[dict[Pattern, Positive], AfterValidator(_check_num_patterns)] = {}
    alpha_pattern: Annotated[dict[Pattern, float], AfterValidator(_check_num_patterns)] = {}
    modules_to_save: Annotated[list[Pattern], AfterValidator(_check_num_names)] | None = None
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
    def non_null(self) -> dict[str, Any]:
        """The entries of the file that are not null."""
        return {key: value for key, value in self.content.items() if value is not None}

    @property
    def used(self) -> dict[str, Any]:
        """The entries that an adapter is loaded with; when it is trained further, its file keeps the rest."""
        none = () if self.alora_invocation_tokens else ("alora_invocation_tokens",)  # PEFT indexes into an empty list
        return {key: value for key, value in self.non_null.items() if key in USED_KEYS and key not in none}

    @property
    def ignored_keys(self) -> tuple[str, ...]:
        """The keys that are set and not used to load the adapter."""
        return tuple(
            sorted(
                key
                for key, value in self.non_null.items()
                if key not in USED_KEYS and value and key not in WITHOUT_EFFECT
            )
        )


@dataclass(frozen=True, kw_only=True)
class AdapterOutline:
    """An adapter without its values: its config, and the headers of its tensors.

    `headers` is None for a pickle, which has none, and where the weights are not on this disk. `num_ids` counts the
    ids of the tokenizer next to it; the base is extended to as many rows.
    """

    directory: Path
    config: AdapterConfig
    headers: tuple[TensorHeader, ...] | None
    num_ids: int

    @property
    def description(self) -> dict[str, Any]:
        """The whole outline as plain values."""
        shapes = {header.name: header.shape for header in self.headers or ()}
        return {"config": self.config.content, "shapes": shapes, "ids": self.num_ids}

    @property
    def num_rows(self) -> int:
        """Rows that the vocabulary needs, by the tokenizer, and by the config if the weights are not on this disk."""
        rows = self.config.trainable_token_indices or ()
        indices = [row for part in rows.values() for row in part] if isinstance(rows, dict) else list(rows)
        return max(self.num_ids, max(indices, default=-1) + 1 if self.headers is None else 0)


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
    """Yield the patterns of a config, each with the regular expression that PEFT builds from it."""
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
    """Return in words what is wrong with the patterns of a config, independently of the base."""
    patterns = list(patterns_of(config))
    if (num_characters := sum(len(pattern.written) for pattern in patterns)) > MOST_CHARACTERS_OF_PATTERNS:
        most = f"{MOST_CHARACTERS_OF_PATTERNS:,} characters in all"
        return f"its patterns have {num_characters:,} characters, and should have at most {most}"
    fault = find_fault(patterns)
    if fault is None:
        return None
    key, pattern = fault.pattern.key, fault.pattern.written
    why = f"it takes more than {MOST_SECONDS:g} seconds to compile" if fault.reason is None else fault.reason
    value = _shown(config.content[key])
    return f"{key} is {value}, and should be a regular expression ({pattern[:MOST_CHARACTERS]!r}: {why})"


def notes_on_ignored_keys(adapters: Iterable[Path | None]) -> Iterator[str]:
    """Yield a sentence for each adapter directory whose config has keys that are ignored."""
    for directory in adapters:
        keys = () if directory is None else read_adapter_config(directory).ignored_keys
        if directory is not None and keys:
            yield f"{directory / ADAPTER_CONFIG}: {', '.join(keys)} ignored: not used to load an adapter"


def lora_settings_of(config: AdapterConfig) -> dict[str, object]:
    """Return an adapter's config as settings of the section `lora`; its values need not be valid settings."""
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
        "init_lora_weights": LoraInit.PISSA if is_pissa_initialization(start) else LoraInit.DEFAULT,
        "modules_to_save": tuple(sorted(config.modules_to_save)) if config.modules_to_save else None,
    }


def inferred_from_adapter(config: AdapterConfig, directory: Path) -> InferredSettings:
    """Return the settings that the adapter in `directory` fixes for a run that trains it further."""
    values = by_path("lora", lora_settings_of(config))
    return InferredSettings(
        values=values, origin=inferred_origin(directory / ADAPTER_CONFIG), is_fixed=True, is_foreign=True
    )


def is_pissa_initialization(init_lora_weights: object) -> bool:
    """Return whether an adapter holds the principal components of its base, which PEFT subtracts from the base."""
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith("pissa")


def check_unchanged(
    name: str, config: AdapterConfig, given: Mapping[str, Any], recorded: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Check that the LoRA settings `given` agree with the adapter `name`, which is to be trained further.

    `recorded` holds the settings as the adapter's run recorded them, if it has one: the same, spelled as settings.

    Raises:
        ModelError: a setting differs.
    """
    known = (lora_settings_of(config), *recorded)
    for key, value in given.items():
        if not any(key in settings and _comparable(value) == _comparable(settings[key]) for settings in known):
            raise ModelError(
                f"{name} is an adapter, which is trained further as it is: lora.{key} can't be changed",
                hint="Leave the lora settings out, or name the base model.",
            )


def _comparable(value: object) -> object:
    """Return `value` in a form that compares without regard to the order of names."""
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
    """Return what is wrong with the first invalid field, with every alternative that it allows."""
    problems = error.errors()
    key = str(problems[0]["loc"][0])
    expected = dict.fromkeys(one["msg"].removeprefix("Input should be ") for one in problems if one["loc"][0] == key)
    return f"{key} is {_shown(content[key])}, and should be {' or '.join(expected)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
