"""Rotary positions: scaled by the formula of each type, only if asked, and compared with lengths."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.tokenizing.positions import apply_rope_scaling, check_length, num_positions
from tests.support.models.tiny_models import tiny_config

POSITIONS = 128  # of the tiny models
# Rotary on the whole head, a part of it, the rotary part of a latent head, and on some layers only.
ROTARY = ["llama", "qwen2", "mistral", "mixtral", "gpt_neox", "phi", "stablelm", "glm4", "deepseek_v3", "smollm3"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model whose weights depend on the seed alone."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    return model


def rotary(config: PreTrainedConfig) -> Any:
    """Return the rotary module of the model that `config` builds."""
    (module,) = [module for name, module in build(config).named_modules() if name.endswith("rotary_emb")]
    return module


def scaled(family: str, text: str, **changes: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = tiny_config(family, **changes)
    apply_rope_scaling(config, text)
    return config


def theta(config: PreTrainedConfig) -> float:
    return float(config.rope_parameters["rope_theta"])


@pytest.mark.parametrize("family", [*ROTARY, "gemma3_text", "gpt2", "mamba2", "bloom"])
def test_without_the_flag_the_config_is_unchanged(family: str) -> None:
    config = tiny_config(family)
    before = config.to_dict()
    assert apply_rope_scaling(config, None) is None
    assert config.to_dict() == before


@pytest.mark.parametrize("family", ROTARY)
def test_linear_divides_every_frequency_by_the_factor(family: str) -> None:
    plain, stretched = rotary(tiny_config(family)), rotary(scaled(family, "linear:4"))
    torch.testing.assert_close(stretched.inv_freq, plain.inv_freq / 4)
    assert stretched.attention_scaling == 1


@pytest.mark.parametrize("family", ROTARY)
def test_yarn_leaves_fast_frequencies_divides_slow_ones_and_scales_attention(family: str) -> None:
    config = tiny_config(family)
    plain, stretched = rotary(config).inv_freq, rotary(scaled(family, "yarn:4"))
    num = len(plain)

    def index_of(num_rotations: float) -> float:
        """The dimension that rotates this many times within the original positions (YaRN, section 3.2)."""
        return num * math.log(POSITIONS / (num_rotations * 2 * math.pi)) / math.log(theta(config))

    low, high = max(math.floor(index_of(32)), 0), min(math.ceil(index_of(1)), 2 * num - 1)
    ramp = ((torch.arange(num) - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(stretched.inv_freq, (1 - ramp) * plain + ramp * plain / 4)
    assert stretched.inv_freq[0] == plain[0]
    assert stretched.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("family", ROTARY)
def test_dynamic_raises_the_base_with_lengths_beyond_the_original(family: str) -> None:
    config = scaled(family, "dynamic:4")
    plain, module = rotary(tiny_config(family)), rotary(config)
    dim, states = 2 * len(plain.inv_freq), torch.zeros(1, 1, 1)
    module(states, torch.arange(POSITIONS)[None])
    torch.testing.assert_close(module.inv_freq, plain.inv_freq)
    module(states, torch.arange(4 * POSITIONS)[None])
    base = theta(config) * (4 * 4 - 3) ** (dim / (dim - 2))
    torch.testing.assert_close(module.inv_freq, base ** (-torch.arange(0, dim, 2) / dim))


@pytest.mark.parametrize(("text", "num_tokens"), [("linear:2", 64), ("yarn:2", 64), ("dynamic:2", 200)])
def test_logits_change_with_the_scaling(text: str, num_tokens: int) -> None:
    ids = torch.randint(0, POSITIONS, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = build(tiny_config("llama"))(ids).logits
        stretched = build(scaled("llama", text))(ids).logits
    torch.testing.assert_close(stretched[:, 0], plain[:, 0])  # a single token has no distances
    assert (stretched - plain)[:, 1:].abs().amax() > 1e-4


def test_dynamic_does_not_change_rows_within_the_original_positions() -> None:
    ids = torch.randint(0, 128, (1, POSITIONS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            build(scaled("llama", "dynamic:2"))(ids).logits, build(tiny_config("llama"))(ids).logits
        )


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_only_full_attention_is_scaled_if_layer_types_have_their_own_rope(kind: str) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    config = tiny_config("gemma3_text", **layers)
    plain = rotary(tiny_config("gemma3_text", **layers))
    note = apply_rope_scaling(config, f"{kind}:4")
    assert note is not None
    assert "of the full-attention layers stretched from 128 to 512" in note
    module = rotary(config)
    for layer_type in layers["layer_types"]:
        module(torch.zeros(1, 1, 1), torch.arange(4 * POSITIONS)[None], layer_type)
    assert torch.equal(module.sliding_attention_inv_freq, plain.sliding_attention_inv_freq)
    assert not torch.allclose(module.full_attention_inv_freq, plain.full_attention_inv_freq)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_saved_config_is_loaded_with_the_same_scaling(tmp_path: Path, family: str, kind: str) -> None:
    config = scaled(family, f"{kind}:4")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters
    assert num_positions(again) == num_positions(config) == 4 * POSITIONS


def test_a_nested_text_config_is_scaled_in_place() -> None:
    config = AutoConfig.for_model("gemma3")
    before = num_positions(config)
    apply_rope_scaling(config, "yarn:2")
    assert config.text_config.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert before is not None
    assert num_positions(config) == 2 * before


def test_a_config_without_a_head_size_can_be_scaled() -> None:
    config = scaled("mixtral", "yarn:4", head_dim=None)
    assert config.head_dim == 16
    assert rotary(config).attention_scaling > 1


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gpt2", {}, "has no rotary positions"),
        ("mamba2", {}, "has no rotary positions"),
        ("bloom", {}, "has no rotary positions"),
        ("falcon", {"alibi": True}, "has no rotary positions"),
        ("granitemoehybrid", {}, "has no rotary positions"),
        ("zamba2", {}, "has no rotary positions"),
        ("deepseek_v4", {}, "no rotary positions in its full-attention layers"),
        ("llama", {"rope_parameters": LLAMA3}, r"of another type already \(llama3 by 8\)"),
        ("gpt_oss", {}, r"of another type already \(yarn by 32\)"),
        ("recurrent_gemma", {}, "has no limit to its positions"),
        ("phi3", {}, "does not take yarn"),
        ("phimoe", {}, "does not take yarn"),
    ],
)
def test_a_config_that_cannot_be_scaled_is_refused_with_the_reason(
    family: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        apply_rope_scaling(AutoConfig.for_model(family, **changes), "yarn:4")
    assert caught.value.hint


def test_a_model_with_its_own_code_is_refused() -> None:
    config: Any = type(tiny_config("llama"))
    own = type("Own", (config,), {"__module__": "transformers_modules.own"})
    with pytest.raises(ModelError, match="its own code"):
        apply_rope_scaling(own(), "yarn:4")


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, 128),
        ("gpt2", {}, 128),
        ("mistral", {"sliding_window": 32}, 128),
        ("falcon", {}, 128),
        ("falcon", {"alibi": True}, None),
        ("bloom", {"max_position_embeddings": None}, None),
        ("mamba2", {"max_position_embeddings": None}, None),
        ("llama", {"rope_parameters": LLAMA3}, 128),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 256),
        # Qwen stores the original number at the top level, GPT-OSS the scaled one.
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, 512),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 32,
                }
            },
            128,
        ),
        # As DeepSeek Coder, and as Vicuna 16k.
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 128),
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
                "max_sequence_length": 512,
            },
            512,
        ),
    ],
)
def test_the_number_of_positions_is_that_intended_by_the_config(
    family: str, changes: dict[str, Any], expected: int | None
) -> None:
    assert num_positions(tiny_config(family, **changes)) == expected


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("text", ["1.01", "1.03", "1.47", "1.3333", "31.99"])
def test_a_factor_is_rounded_to_a_whole_number_of_positions(
    kind: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config("llama", max_position_embeddings=99)
    apply_rope_scaling(config, f"{kind}:{text}")
    whole = int(99 * float(text))
    assert num_positions(config) == whole
    check_length(config, whole, f"{kind}:{text}")
    config.validate_rope()
    assert "does not match" not in caplog.text


@pytest.mark.parametrize("max_length", [129, 200, 256, 300, 1000, 4096])
def test_the_hint_names_the_smallest_factor_that_suffices(max_length: int) -> None:
    config = tiny_config("llama")
    check_length(config, POSITIONS, None)
    with pytest.raises(ModelError, match=f"data.max_length: {max_length} is more than the 128 positions") as caught:
        check_length(config, max_length, None)
    assert caught.value.exit_code == 2
    (factor,) = re.findall(r"--rope-scaling yarn:([\d.]+)", str(caught.value.hint))
    check_length(config, max_length, f"yarn:{factor}")
    smaller = f"{float(factor) - 0.01:.2f}"
    if float(smaller) > 1:
        with pytest.raises(ModelError, match="more than") as caught:
            check_length(config, max_length, f"yarn:{smaller}")
        assert f"--rope-scaling yarn:{factor}," in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_length_is_compared_with_the_scaled_positions_before_and_after_scaling(kind: str) -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    for _ in range(2):
        check_length(config, 256, f"{kind}:2")
        with pytest.raises(ModelError, match="the 256 positions") as caught:
            check_length(config, 257, f"{kind}:2")
        assert f"{kind}:2.01" in str(caught.value.hint)
        if config.to_dict() == before:  # a check changes nothing
            apply_rope_scaling(config, f"{kind}:2")
    assert config.to_dict() != before
    check_length(config, 256, None)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj", "phi3", "gpt_oss"])
def test_a_model_that_cannot_be_scaled_gets_no_rope_hint(family: str) -> None:
    config = tiny_config(family)
    positions = num_positions(config)
    assert positions is not None
    check_length(config, positions, None)
    with pytest.raises(ModelError) as caught:
        check_length(config, positions + 1, None)
    assert f"Use --max-length {positions}:" in str(caught.value.hint)
    assert "rope" not in str(caught.value.hint)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mamba2", {"max_position_embeddings": None}),
        ("bloom", {"max_position_embeddings": None}),
        ("falcon", {"alibi": True}),
    ],
)
def test_models_without_a_limit_accept_any_length(family: str, changes: dict[str, Any]) -> None:
    check_length(tiny_config(family, **changes), 10**6, None)


def test_a_sliding_window_is_not_a_limit() -> None:
    check_length(tiny_config("mistral", sliding_window=32), POSITIONS, None)
