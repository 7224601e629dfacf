"""Patterns in the config of an untrusted adapter: common ones are matched, endless ones are named in an error."""

import re
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from qlora_cli.adapters.patterns import MANY, check_patterns, drop_unmatched
from qlora_cli.errors import ModelError
from qlora_cli.model_files import pattern_trial
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, AdapterConfig, patterns_of
from qlora_cli.model_files.pattern_trial import PLAIN, TriedPattern, find_fault

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
def test_an_endless_pattern_is_named_with_its_key_and_file(
    monkeypatch: pytest.MonkeyPatch, key: str, value: object
) -> None:
    monkeypatch.setattr(pattern_trial, "MOST_SECONDS", 0.6)
    began = monotonic()
    with pytest.raises(ModelError) as caught:
        check_patterns(Path("of/adapter"), config(**{key: value}), NAMES)
    assert monotonic() - began < 5
    assert str(Path("of/adapter") / ADAPTER_CONFIG) in str(caught.value)
    assert f"{SLOW!r} of {key}" in str(caught.value)


@pytest.mark.parametrize("pattern", [UNSLOTH, r".*language_model.*\.(q_proj|v_proj)", r"model\.layers\.\d+\..*_proj"])
def test_fast_patterns_of_many_parts_are_accepted(pattern: str) -> None:
    check_patterns(Path(), config(target_modules=pattern, rank_pattern={pattern: 4}), NAMES)


@pytest.mark.parametrize("pattern", ["q_proj", r".*\.(q_proj|v_proj)", r"^model\.layers\.0\.mlp$", "(q_proj|k_proj)"])
def test_a_plain_pattern_needs_no_trial(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(pattern_trial, "TRIAL", "raise SystemExit(1)")
    check_patterns(Path(), config(target_modules=pattern, rank_pattern={pattern: 4}), NAMES)
    check_patterns(Path(), config(target_modules=["q_proj"]), NAMES)


LITERALS = [*"aé_. $-09", r"\.", r"\d", r"\-"]
OTHERS = [
    *(*"()[]{}*+?|^\\", "(?i)", "(?P<idx>", r"\1", r"\p", r"\A", "{2}", "{9999999999}", "[z-a]", "\0", "\ud800"),
    *("*?", "(a"),
]
KEYS = ("target_modules", "exclude_modules", "rank_pattern", "layers_pattern", "modules_to_save")


def drawn(chance: np.random.Generator) -> str:
    parts = [LITERALS if chance.random() < 0.5 else OTHERS for _ in range(chance.integers(9))]
    return "".join(part[chance.integers(len(part))] for part in parts)


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@pytest.mark.parametrize("key", KEYS)
def test_a_pattern_passes_if_and_only_if_it_compiles_as_peft_matches_it(key: str) -> None:
    """For random patterns, including plain ones, which need no trial."""
    chance = np.random.default_rng(KEYS.index(key))
    num_plain = num_passed = num_refused = 0
    for _ in range(4000):
        pattern = drawn(chance)
        values: dict[str, object] = {"rank_pattern": {pattern: 4}, "layers_pattern": [pattern]}
        values["modules_to_save"] = [pattern]
        value = values.get(key, pattern)
        (one,) = patterns_of(config(**{key: value}))
        try:
            re.compile(one.matched)
            compiles = True
        except (re.error, OverflowError, RecursionError):
            compiles = False
        if PLAIN.fullmatch(pattern):
            num_plain += 1
            assert compiles, pattern
        elif (num_passed if compiles else num_refused) < 8:  # each trial is a process
            fault = find_fault([one])
            assert (fault is None) == compiles, pattern
            num_passed, num_refused = num_passed + compiles, num_refused + (not compiles)
    assert min(num_plain, num_passed, num_refused) > 3


@pytest.mark.parametrize(
    "code", ["raise SystemExit(3)", "import os; os.abort()", "print(0); print(1, flush=True); exit(1)"]
)
def test_a_crashed_trial_is_attributed_to_the_current_pattern(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(pattern_trial, "TRIAL", code)
    asked = [TriedPattern("rank_pattern", text, text) for text in (f"a*{code}", f"b*{code}")]
    fault = find_fault(asked)
    assert fault is not None
    assert fault.pattern == asked["print" in code]
    assert fault.reason == "it crashes the process that tries it"


def test_a_pattern_that_takes_too_much_memory_or_time_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = "(?i)" + "[\0-\uffff]" * 1_900
    monkeypatch.setattr(pattern_trial, "MOST_SECONDS", 1.0)
    began = monotonic()
    fault = find_fault([TriedPattern("target_modules", sets, sets)])
    assert fault is not None
    assert fault.reason is None
    assert monotonic() - began < 15


PATTERNS = st.lists(
    st.one_of(
        st.sampled_from(NAMES),
        st.sampled_from(
            ["q_proj", "self_attn.q_proj", "self.attn.q_proj", "q_pro.", r".*\.q_proj", "(k|q)_proj", "1.q"]
        ),
        st.from_regex(r"layers\.[0-9]{1,2}\.self_attn\.(q|k)_proj", fullmatch=True),
        st.from_regex(r"[a-z_.]{1,8}", fullmatch=True),
    ),
    max_size=12,
    unique=True,
)


@given(patterns=PATTERNS, names=st.lists(st.sampled_from([*NAMES, "q_proj", "x.k_proj", "", "a..q_proj"]), max_size=9))
def test_dropping_unmatched_patterns_leaves_the_value_of_every_name(patterns: list[str], names: list[str]) -> None:
    absent = {f"nowhere.{number}.{'x' * (number % 9)}": 3 for number in range(MANY + 1)}
    before = {**dict(zip(patterns, range(50), strict=False)), **absent}
    lora = LoraConfig(rank_pattern=dict(before), alpha_pattern={"q_proj": 2})
    drop_unmatched(lora, names)
    assert lora.alpha_pattern == {"q_proj": 2}  # so few are left unchanged
    assert lora.rank_pattern.keys() <= {*patterns}
    for name in names:
        key, was = get_pattern_key(list(lora.rank_pattern), name), get_pattern_key(list(before), name)
        assert lora.rank_pattern.get(key) == before.get(was)


def test_only_matching_patterns_of_thousands_are_passed_to_peft() -> None:
    absent = {f"model.layers.{number}.self_attn.q_pro": 8 for number in range(3000)}
    lora = LoraConfig(rank_pattern={**absent, **dict.fromkeys(NAMES, 4)})
    drop_unmatched(lora, [*NAMES, *(f"{name}.weight" for name in NAMES)])
    assert lora.rank_pattern == dict.fromkeys(NAMES, 4)
