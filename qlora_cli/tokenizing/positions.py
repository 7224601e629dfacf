"""How many positions a model has, and stretching them when, and only when, it is asked for.

A row that is longer than the model's positions never changes the model: it is an error that names the flag
which would. Everything is read from, and written to, the model's config before the model is built.
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
OF_THE_MODEL = inferred_origin("the positions that the model has")
# The layers that see the whole row, in configs that keep rotary parameters for each type of layer.
FULL_ATTENTION = "full_attention"
# Switches of configs that have rotary parameters in any case: the value at which the model uses them.
# (Falcon, Granite 4 hybrid, Zamba2.)
ROTARY_SWITCHES: dict[str, object] = {"alibi": False, "position_embedding_type": "rope", "use_mem_rope": True}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A stretch of the rotary positions: `linear`, `dynamic` or `yarn`, by a factor above 1."""

    kind: str
    factor: Fraction

    @classmethod
    def parse(cls, text: str) -> "RopeScaling":
        """Read `TYPE:FACTOR`, which the settings have checked."""
        kind, _, factor = text.partition(":")
        return cls(kind=kind, factor=Fraction(factor))


def num_positions(config: PreTrainedConfig) -> int | None:
    """Return how many positions the model has, stretched as its config says; None if there is no limit.

    `max_position_embeddings` counts the stretched positions, except for `dynamic`, whose formula needs the
    original number there, and where a yarn config leaves it at the original.
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
        # Older conversions left the original number above and wrote the stretched one here.
        return max(stated, getattr(decoder, "max_sequence_length", None) or 0)
    return stated


def positions_with(config: PreTrainedConfig, rope_scaling: str | None) -> int | None:
    """Return how many positions the model has once `config` is stretched as `TYPE:FACTOR` says; None for no limit.

    Raises:
        ModelError: it can't be stretched so.
    """
    stretched = deepcopy(config)
    apply_rope_scaling(stretched, rope_scaling)
    return num_positions(stretched)


def shortened(settings: Section, positions: int | None) -> list[InferredSettings]:
    """Return that rows are no longer than the positions of the model, unless more is asked for."""
    data: DataSettings | None = getattr(settings, "data", None)
    if data is None or positions is None or data.max_length <= positions:
        return []
    return [InferredSettings(values={LENGTH: positions}, origin=OF_THE_MODEL)]


def note_length(settled: Resolved[Section], reporter: Reporter) -> None:
    """Say it if the default length was lowered to the positions of the model."""
    if settled.origin_of(LENGTH) == OF_THE_MODEL:
        length = settled.settings.data.max_length  # type: ignore[attr-defined]
        reporter.report(Noted(message=f"rows are truncated at {length:,} tokens, the positions that the model has"))


def apply_rope_scaling(config: PreTrainedConfig, text: str | None) -> str | None:
    """Stretch the rotary positions of `config` in place, as `TYPE:FACTOR` says; return a note on it.

    Sources: position interpolation (arXiv 2306.15595) for linear, NTK-aware scaling that sets in beyond the
    original length for dynamic, YaRN (arXiv 2309.00071) for yarn; computed by `modeling_rope_utils` of
    transformers.

    Raises:
        ModelError: the model has no rotary positions, or they are stretched already.
    """
    if text is None:
        return None
    scaling, decoder = RopeScaling.parse(text), _decoder(config)
    if reason := _why_not_scalable(decoder):
        raise ModelError(f"{text} can't be applied: {reason}", hint="Leave it out.", setting="model.rope_scaling")
    before = num_positions(decoder)
    assert before is not None
    after = int(before * scaling.factor)
    _write(decoder, scaling, before, after)
    scope = "" if FULL_ATTENTION not in decoder.rope_parameters else " of the full-attention layers"
    note = f"rotary positions{scope} stretched from {before:,} to {after:,} ({text})"
    return f"{note}; rows of up to {before:,} tokens are computed as before" if scaling.kind == "dynamic" else note


def check_length(config: PreTrainedConfig, max_length: int, rope_scaling: str | None) -> None:
    """Check that rows of `max_length` tokens have positions; `config` may have the scaling applied already.

    Raises:
        ModelError: they have not; the hint is the flag that would give them, where there is one.
    """
    if rope_scaling is None or _carries(config, RopeScaling.parse(rope_scaling)):
        stretched = config
    else:
        stretched = deepcopy(config)
        apply_rope_scaling(stretched, rope_scaling)
    available = num_positions(stretched)
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
    """Return the smallest factor of two decimals that makes `positions` enough."""
    hundredths = ceil(Fraction(100 * max_length, positions))
    return f"{hundredths // 100}.{hundredths % 100:02}".rstrip("0").rstrip(".")


def _decoder(config: PreTrainedConfig) -> PreTrainedConfig:
    decoder: PreTrainedConfig = config.get_text_config(decoder=True)  # itself, unless it has several parts
    return decoder


def _full_attention_rope(decoder: PreTrainedConfig) -> dict[str, Any]:
    """Return the rotary parameters of the layers that see the whole row; empty if there are none."""
    parameters: dict[str, Any] = getattr(decoder, "rope_parameters", None) or {}
    if decoder.nested_rope_parameter_keys(parameters):
        return parameters.get(FULL_ATTENTION) or {}
    return parameters


def _rope_type(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _why_not_scalable(decoder: PreTrainedConfig) -> str | None:
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
        return f"{name} runs code of its own, which may not read this setting"
    return None


def _carries(config: PreTrainedConfig, scaling: RopeScaling) -> bool:
    """Whether `scaling` was applied to `config`."""
    rope, positions = _full_attention_rope(_decoder(config)), num_positions(config)
    if _rope_type(rope) != scaling.kind or not rope.get("factor") or positions is None:
        return False
    return int(round(positions / rope["factor"]) * scaling.factor) == positions


def _write(decoder: PreTrainedConfig, scaling: RopeScaling, before: int, after: int) -> None:
    old_parameters, rope = decoder.rope_parameters, dict(_full_attention_rope(decoder))
    rope.pop("type", None)
    # Positions are whole, so the factor is that of whole ones; transformers warns when the two do not agree.
    rope |= {"rope_type": scaling.kind, "factor": after / before}
    if scaling.kind == "yarn":
        rope["original_max_position_embeddings"] = before
    nested = decoder.nested_rope_parameter_keys(old_parameters)
    decoder.rope_parameters = {**old_parameters, FULL_ATTENTION: rope} if nested else rope
    if scaling.kind != "dynamic":  # its formula needs the original number here
        decoder.max_position_embeddings = after
    if getattr(decoder, "head_dim", 0) is None:  # Mixtral; the formulas of dynamic and yarn can't bear it
        decoder.head_dim = decoder.hidden_size // decoder.num_attention_heads
    try:
        decoder.validate_rope()
    except (ValueError, TypeError, KeyError) as error:  # Phi-3 and PhiMoE take only longrope
        raise ModelError(
            f"the model ({decoder.model_type}) does not take {scaling.kind}: {error}",
            hint="Leave it out.",
            setting="model.rope_scaling",
        ) from error
