"""The effect of adapter settings on a prediction; `test_memory_real_tensors` shows that real tensors agree."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.adapters.writer import save_adapter
from qlora_cli.errors import ModelError, OutOfMemoryError
from qlora_cli.events import SilentReporter
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.replaying.replay import Peaks
from qlora_cli.memory.traced_run import TracedRun
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.training.checks.predicted_memory import check_memory
from tests.conftest import Recorder, train_settings
from tests.integration.memory.test_memory_before_training import card
from tests.support.models.adapters import adapt, settings_of
from tests.support.models.loading import save_model
from tests.support.models.tracing import UncountedStep, deep_config

pytestmark = pytest.mark.usefixtures("one_thread")

A100 = find_gpu("A100 40GB")
NUM_LAYERS = 6
CHOICES: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "ranks": {"rank_pattern": {"down_proj": 32}},
    "ranks of one layer": {"rank_pattern": {"layers.3.mlp.down_proj": 32}},
    "head": {"modules_to_save": ("lm_head",)},
    "embedding": {"modules_to_save": ("embed_tokens",)},
    "norms": {"modules_to_save": ("input_layernorm",)},
    "all": {"use_dora": True, "rank_pattern": {"q_proj": 4}, "modules_to_save": ("lm_head", "norm")},
}


def estimated(family: str, lora: dict[str, Any], *, whole: bool = False) -> tuple[Peaks, TracedRun]:
    """Return the prediction for a model of six layers."""
    return _estimated(family, json.dumps(lora, sort_keys=True), whole)


@cache
def _estimated(family: str, lora: str, whole: bool) -> tuple[Peaks, TracedRun]:
    facts = ModelFacts(name=family, content=deep_config(family, NUM_LAYERS).to_dict())
    settings = EstimateSettings.model_validate(
        {
            "model": {"name": family},
            "lora": {"rank": 8, **json.loads(lora)},
            "data": {"max_length": 16},
            "training": {"gradient_accumulation_steps": 4},
        }
    )
    estimator = Estimator(facts, whole=whole, loop=UncountedStep)
    return estimator.peaks(settings, A100), estimator.traced(settings, A100)


@pytest.mark.parametrize(
    ("family", "choice"),
    [
        *(("llama", choice) for choice in CHOICES),
        ("gemma3_text", "all"),
        ("gemma3_text", "DoRA"),
        ("qwen3_moe", "DoRA"),
    ],
)
def test_each_choice_changes_the_prediction_and_few_layers_represent_all(family: str, choice: str) -> None:
    plain, _ = estimated(family, {})
    few, _ = estimated(family, CHOICES[choice])
    whole, _ = estimated(family, CHOICES[choice], whole=True)
    assert few == whole
    assert few.by_label["adapters"] > plain.by_label["adapters"]
    assert few.allocated_bytes > plain.allocated_bytes


def test_trained_parameters_are_counted() -> None:
    config = deep_config("llama", NUM_LAYERS)
    hidden, inner, words = config.hidden_size, config.intermediate_size, config.vocab_size
    plain = estimated("llama", {})[1].num_trained

    def more(**lora: object) -> int:
        return estimated("llama", lora)[1].num_trained - plain

    assert more(rank_pattern={"down_proj": 32}) == NUM_LAYERS * (32 - 8) * (hidden + inner)
    assert more(rank_pattern={"layers.3.mlp.down_proj": 32}) == (32 - 8) * (hidden + inner)
    assert more(modules_to_save=("lm_head",)) == hidden * words
    assert more(modules_to_save=("input_layernorm", "norm")) == (NUM_LAYERS + 1) * hidden
    kv = hidden // 2  # two heads of keys and values for four of queries
    assert more(use_dora=True) == NUM_LAYERS * (2 * hidden + 2 * kv + 2 * inner + hidden)
    assert more(use_rslora=True, alpha=1, init_lora_weights="loftq") == 0


def test_the_initialization_of_an_adapter_changes_nothing() -> None:
    plain, _ = estimated("llama", {})
    for init in ("gaussian", "orthogonal", "loftq"):
        assert estimated("llama", {"init_lora_weights": init})[0] == plain


def test_a_name_that_matches_nothing_is_refused_here_too() -> None:
    with pytest.raises(ModelError, match="'c_attn' matches no adapted layer"):
        estimated("llama", {"rank_pattern": {"c_attn": 4}})
    with pytest.raises(ModelError, match="'classifier' matches no module"):
        estimated("llama", {"modules_to_save": ("classifier",)})


def test_an_adapter_that_continues_to_train_is_predicted_from_its_config(tmp_path: Path, rows: Path) -> None:
    """From its adapter_config.json, before its weights are read."""
    base = save_model(tmp_path / "base", max_position_embeddings=256)
    sizes = []
    adapters: dict[str, dict[str, Any]] = {
        "plain": {},
        "dora": {"use_dora": True},
        "ranks": {"rank_pattern": {"down_proj": 64}, "alpha_pattern": {"q_proj": 1}},
        "head": {"modules_to_save": ("lm_head",)},
    }
    for name, lora in adapters.items():
        save_adapter(adapt(base, settings_of(**lora)), tmp_path / name)
        asked = train_settings(tmp_path / name, rows, tmp_path / "run", training__gradient_checkpointing="on")
        load_plan = plan_load(asked, SilentReporter())
        settings = asked.settings
        reporter = Recorder()
        with pytest.raises(OutOfMemoryError):
            check_memory(settings, load_plan, card(1 << 20), reporter, longest_row_tokens=64, force=False)
        outlook = check_memory(settings, load_plan, card(1 << 34), reporter, longest_row_tokens=64, force=False)
        assert outlook is not None
        assert reporter.events == []
        sizes.append(outlook.predicted.allocated_bytes)
    assert sizes[0] < min(sizes[1:])
    assert len(set(sizes)) == 4
