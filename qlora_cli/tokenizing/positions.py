"""Count the positions of a model, and scale its RoPE only if the user asks for it.

A row that is longer than the model's positions never changes the model: it is an error that names the flag to
use. All of it is read from and written to the model's config before the model is built.
"""

from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from transformers import PreTrainedConfig

from qlora_cli.errors import ModelError
from qlora_cli.events import Noted, Reporter
from qlora_cli.settings.models import DataSettings, Section
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import InferredSettings, inferred_origin

LENGTH = "data.max_length"
FROM_MODEL = inferred_origin("the positions that the model has")
# The layers that attend to the whole row, in configs with RoPE parameters per layer type.
FULL_ATTENTION = "full_attention"
# Options of configs that always have RoPE parameters: the value with which the model uses them.
# (Falcon, Granite 4 hybrid, Zamba2.)
ROTARY_SWITCHES: dict[str, object] = {"alibi": False, "position_embedding_type": "rope", "use_mem_rope": True}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A scaling of RoPE: `linear`, `dynamic` or `yarn`, by a factor above 1."""

    kind: str
    factor: Fraction

    @classmethod
    def parse(cls, text: str) -> "RopeScaling":
        """Parse `TYPE:FACTOR`, which the settings have validated."""
        kind, _, factor = text.partition(":")
        return cls(kind=kind, factor=Fraction(factor))


def num_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions of the model, with the RoPE scaling of its config; None if there is no limit.

    `max_position_embeddings` counts the scaled positions, except for `dynamic`, whose formula needs the
    original number there, and where a yarn config keeps the original.
    """
    decoder = _decoder(config)
    stated = getattr(decoder, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1 or getattr(decoder, "alibi", False):
        return None
    rope = _full_attention_rope(decoder)
    kind, factor = _rope_type(rope), Fraction(str(rope.get("factor") or 1))
    if kind == "dynamic":
        return round(stated * factor)
    if kind == "yarn":
        return max(stated, round((rope.get("original_max_position_embeddings") or 0) * factor))
    if kind == "linear":
        # Older conversions kept the original number above and wrote the scaled one here.
        return max(stated, getattr(decoder, "max_sequence_length", None) or 0)
    return stated


def positions_with(config: PreTrainedConfig, rope_scaling: str | None) -> int | None:
    """Return the number of positions of the model with `rope_scaling` (`TYPE:FACTOR`) applied; None for no limit.

    Raises:
        ModelError: the scaling can't be applied.
    """
    scaled = deepcopy(config)
    apply_rope_scaling(scaled, rope_scaling)
    return num_positions(scaled)


def limit_length(settings: Section, positions: int | None) -> list[InferredSettings]:
    """Return the fact that limits rows to the model's positions, if the default length exceeds them."""
    data: DataSettings | None = getattr(settings, "data", None)
    if data is None or positions is None or data.max_length <= positions:
        return []
    return [InferredSettings(values={LENGTH: positions}, origin=FROM_MODEL)]


def note_length(settled: Resolved[Section], reporter: Reporter) -> None:
    """Report it if the default length was lowered to the positions of the model."""
    if settled.origin_of(LENGTH) == FROM_MODEL:
        length = settled.settings.data.max_length  # type: ignore[attr-defined]
        reporter.report(Noted(message=f"rows are truncated at {length:,} tokens, the positions that the model has"))


def apply_rope_scaling(config: PreTrainedConfig, text: str | None) -> str | None:
    """Apply RoPE scaling (`TYPE:FACTOR`) to `config` in place; return a note on it.

    Sources: position interpolation (arXiv 2306.15595) for linear, NTK-aware scaling beyond the
    original length for dynamic, YaRN (arXiv 2309.00071) for yarn; computed by `modeling_rope_utils` of
    transformers.

    Raises:
        ModelError: the model has no rotary positions, or they are scaled already.
    """
    if text is None:
        return None
    scaling, decoder = RopeScaling.parse(text), _decoder(config)
    if reason := _scaling_problem(decoder):
        raise ModelError(f"{text} can't be applied: {reason}", hint="Leave it out.", setting="model.rope_scaling")
    before = num_positions(decoder)
    assert before is not None
    after = int(before * scaling.factor)
    _write(decoder, scaling, before, after)
    scope = "" if FULL_ATTENTION not in decoder.rope_parameters else " of the full-attention layers"
    note = f"rotary positions{scope} stretched from {before:,} to {after:,} ({text})"
    return f"{note}; rows of up to {before:,} tokens are computed as before" if scaling.kind == "dynamic" else note


def check_length(config: PreTrainedConfig, max_length: int, rope_scaling: str | None) -> None:
    """Check that rows of `max_length` tokens fit the positions; `config` may have the scaling applied already.

    Raises:
        ModelError: they don't; the hint names the flag that would help, if there is one.
    """
    if rope_scaling is None or _has_scaling(config, RopeScaling.parse(rope_scaling)):
        scaled = config
    else:
        scaled = deepcopy(config)
        apply_rope_scaling(scaled, rope_scaling)
    available = num_positions(scaled)
    if available is not None and max_length > available:
        decoder = _decoder(config)
        raise ModelError(
            f"{max_length} is more than the {available} positions of the model ({decoder.model_type})",
            hint=_length_hint(decoder, available, max_length, rope_scaling),
            setting="data.max_length",
        )


def _length_hint(decoder: PreTrainedConfig, available: int, max_length: int, rope_scaling: str | None) -> str:
    lower = f"--max-length {available}"
    if rope_scaling is not None:
        scaling = RopeScaling.parse(rope_scaling)
        factor = _smallest_factor(ceil(available / scaling.factor), max_length)
        return f"Use --rope-scaling {scaling.kind}:{factor}, or {lower}."
    wider = f"yarn:{_smallest_factor(available, max_length)}"
    try:
        apply_rope_scaling(deepcopy(decoder), wider)
    except ModelError:
        return f"Use {lower}: its positions can't be stretched."
    return f"Use {lower}, or stretch the rotary positions: --rope-scaling {wider}"


def _smallest_factor(positions: int, max_length: int) -> str:
    """Return the smallest factor, to two decimals, with which `positions` suffice."""
    hundredths = ceil(Fraction(100 * max_length, positions))
    return f"{hundredths // 100}.{hundredths % 100:02}".rstrip("0").rstrip(".")


def _decoder(config: PreTrainedConfig) -> PreTrainedConfig:
    decoder: PreTrainedConfig = config.get_text_config(decoder=True)  # itself, unless it has several parts
    return decoder


def _full_attention_rope(decoder: PreTrainedConfig) -> dict[str, Any]:
    """Return the RoPE parameters of the layers that attend to the whole row; empty if there are none."""
    parameters: dict[str, Any] = getattr(decoder, "rope_parameters", None) or {}
    if decoder.nested_rope_parameter_keys(parameters):
        return parameters.get(FULL_ATTENTION) or {}
    return parameters


def _rope_type(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _scaling_problem(decoder: PreTrainedConfig) -> str | None:
    name = f"the model ({decoder.model_type})"
    rope = _full_attention_rope(decoder)
    switched_off = any(getattr(decoder, key, value) != value for key, value in ROTARY_SWITCHES.items())
    if switched_off or not getattr(decoder, "rope_parameters", None):
        return f"{name} has no rotary positions"
    if not rope:
        return f"{name} has no rotary positions in its full-attention layers"
    if _rope_type(rope) != "default":
        factor = f" by {rope['factor']:g}" if rope.get("factor") else ""
        return f"the rotary positions of {name} are of another type already ({_rope_type(rope)}{factor})"
    if num_positions(decoder) is None:
        return f"{name} has no limit to its positions"
    if type(decoder).__module__.startswith("transformers_modules"):
        return f"{name} runs its own code, which may not read this setting"
    return None


def _has_scaling(config: PreTrainedConfig, scaling: RopeScaling) -> bool:
    """Return whether `scaling` was applied to `config`."""
    rope, positions = _full_attention_rope(_decoder(config)), num_positions(config)
    if _rope_type(rope) != scaling.kind or not rope.get("factor") or positions is None:
        return False
    return int(round(positions / rope["factor"]) * scaling.factor) == positions


def _write(decoder: PreTrainedConfig, scaling: RopeScaling, before: int, after: int) -> None:
    old_parameters, rope = decoder.rope_parameters, dict(_full_attention_rope(decoder))
    rope.pop("type", None)
    # Positions are integers, so the factor is the ratio of integers; transformers warns if the two disagree.
    rope |= {"rope_type": scaling.kind, "factor": after / before}
    if scaling.kind == "yarn":
        rope["original_max_position_embeddings"] = before
    nested = decoder.nested_rope_parameter_keys(old_parameters)
    decoder.rope_parameters = {**old_parameters, FULL_ATTENTION: rope} if nested else rope
    if scaling.kind != "dynamic":  # its formula needs the original number here
        decoder.max_position_embeddings = after
    if getattr(decoder, "head_dim", 0) is None:  # Mixtral; the formulas of dynamic and yarn fail on None
        decoder.head_dim = decoder.hidden_size // decoder.num_attention_heads
    try:
        decoder.validate_rope()
    except (ValueError, TypeError, KeyError) as error:  # Phi-3 and PhiMoE take only longrope
        raise ModelError(
            f"the model ({decoder.model_type}) does not take {scaling.kind}: {error}",
            hint="Leave it out.",
            setting="model.rope_scaling",
        ) from error
