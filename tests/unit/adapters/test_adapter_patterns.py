"""Patterns in the config of somebody's adapter: common ones are matched, those that would go on for ever are named."""

from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from qlora_cli.adapters import patterns
from qlora_cli.adapters.patterns import check_patterns
from qlora_cli.errors import ModelError
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, AdapterConfig

NAMES = [f"model.layers.{layer}.{part}.{leaf}" for layer in range(50) for part, leaf in (("self_attn", "q_proj"),)]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj|o_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj|o_proj)))"
)
SLOW = r"(a|a|.)*(.*)*(.+)+(.+)+X$"


def config(**content: Any) -> AdapterConfig:
    return AdapterConfig.model_validate({"peft_type": "LORA", **content, "content": {}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", SLOW),
        ("exclude_modules", SLOW),
        ("rank_pattern", {SLOW: 4}),
        ("alpha_pattern", {"q_proj": 8.0, SLOW: 4.0}),
        ("layers_pattern", SLOW),
        ("layers_pattern", ["layers", SLOW]),
        ("modules_to_save", [SLOW]),
    ],
    ids=str,
)
def test_a_pattern_that_goes_on_for_ever_is_named_with_its_key_and_file(
    monkeypatch: pytest.MonkeyPatch, key: str, value: object
) -> None:
    monkeypatch.setattr(patterns, "MOST_SECONDS", 0.6)
    began = monotonic()
    with pytest.raises(ModelError) as caught:
        check_patterns(Path("of/adapter"), config(**{key: value}), NAMES)
    assert monotonic() - began < 5
    assert str(Path("of/adapter") / ADAPTER_CONFIG) in str(caught.value)
    assert f"{SLOW!r} of {key}" in str(caught.value)


@pytest.mark.parametrize("pattern", [UNSLOTH, r".*language_model.*\.(q_proj|v_proj)", r"model\.layers\.\d+\..*_proj"])
def test_patterns_of_many_parts_that_are_quick_pass(pattern: str) -> None:
    check_patterns(Path(), config(target_modules=pattern, rank_pattern={pattern: 4}), NAMES)


@pytest.mark.parametrize("pattern", ["q_proj", r".*\.(q_proj|v_proj)", r"^model\.layers\.0\.mlp$", "(q_proj|k_proj)"])
def test_a_plain_pattern_needs_no_trial(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(patterns, "TRIAL", "raise SystemExit(1)")
    check_patterns(Path(), config(target_modules=pattern, rank_pattern={pattern: 4}), NAMES)
    check_patterns(Path(), config(target_modules=["q_proj"]), NAMES)
