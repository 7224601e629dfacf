"""What training made of an adapter: measured as PEFT's own updates are, recorded, shown, and without an effect."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.events import StepDone
from qlora_cli.loading.loader import load_model
from qlora_cli.runs.detail import detail_of
from qlora_cli.runs.find_runs import read_run
from qlora_cli.settings.models import LoadSettings, LoraSettings, ModelSettings, QuantizationSettings
from qlora_cli.training.outcome.measured_adapter import measure_adapter
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, RunQlora, train_settings
from tests.support.models.tiny_models import tiny_model
from tests.support.runs.merging import adapted, randomize

# Layers whose weight is (out, in) or (in, out), an embedding, a rank of its own, rsLoRA, DoRA.
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "r": 4}),
    ("llama", {"target_modules": "all-linear", "r": 6, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    ("llama", {"target_modules": ["q_proj"], "r": 4, "use_dora": True}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"], "r": 4}),
]


@pytest.mark.parametrize(("family", "config"), CONFIGS)
def test_figures_are_those_of_the_updates_that_peft_adds(family: str, config: dict[str, Any]) -> None:
    model = adapted(tiny_model(family), LoraConfig(lora_alpha=12, task_type="CAUSAL_LM", **config))
    randomize(model)
    health = measure_adapter(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert health is not None
    assert len(health.modules) == len(layers) > 0
    for measured, (name, layer) in zip(health.modules, layers.items(), strict=True):
        assert name.endswith(measured.name)
        update = layer.get_delta_weight("default").detach()
        weight = layer.get_base_layer().weight.detach()
        values = torch.linalg.svdvals(update.double())
        shares = values[: measured.rank] / values.sum()
        assert measured.update_norm == pytest.approx(float(update.norm()), rel=1e-4)
        assert measured.weight_norm == pytest.approx(float(weight.norm()), rel=1e-5)
        assert measured.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-3)
        assert (measured.lost_share is None) == bool(config.get("use_dora"))
    assert health.rank == config["r"]


@pytest.mark.parametrize("method", ["nf4", "int8", "none"])
def test_measuring_changes_nothing_of_a_quantized_model(method: str, base_model: Path) -> None:
    quantization = QuantizationSettings.model_validate({"method": method})
    settings = LoadSettings(
        model=ModelSettings(name=str(base_model), dtype="bf16", device="cpu"), quantization=quantization
    )
    model, _ = attach_adapter(load_model(settings).base, LoraSettings())
    randomize(model)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(ids).logits
        health = measure_adapter(model)
        assert torch.equal(model(ids).logits, before)
    assert health is not None
    assert all(one.weight_norm for one in health.modules)
    assert 0 < health.effective_rank <= health.rank


def test_stacked_experts_are_counted_as_not_measured() -> None:
    experts = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]}
    model = adapted(tiny_model("qwen3_moe"), LoraConfig(r=2, task_type="CAUSAL_LM", **experts))
    health = measure_adapter(model)
    assert health is not None
    assert {module.name.rpartition(".")[2] for module in health.modules} == {"q_proj"}
    assert health.num_unmeasured == len(health.modules)


def test_a_new_adapter_changes_nothing_and_uses_no_rank(base_model: Path) -> None:
    settings = LoadSettings(model=ModelSettings(name=str(base_model), device="cpu"))
    health = measure_adapter(attach_adapter(load_model(settings).base, LoraSettings())[0])
    assert health is not None
    assert (health.effective_rank, health.relative_norm, health.lost_share) == (0, 0, None)


def test_a_run_records_and_shows_it(run_qlora: RunQlora, default_run: Path) -> None:
    run = read_run(default_run)
    health = detail_of(run).adapter_health
    assert health is not None
    assert len(health.modules) == len({module.name for module in health.modules}) == 14
    recorded = json.loads((default_run / "run.json").read_text())["result"]["adapter_health"]
    assert recorded["effective_rank"] == health.effective_rank
    shown = run_qlora("runs", "show", default_run)
    assert re.search(rf"^  adapter +{re.escape(health.sentence)}$", shown.stdout, re.MULTILINE)
    assert re.match(r"rank \d+ uses \d+\.\d; the update is ", health.sentence)
    detail = run_qlora("runs", "show", default_run, "--json").json
    assert detail["adapter_health"] == recorded


class Stopper(Recorder):
    """Interrupts the run after its first step."""

    def report(self, event: Any) -> None:
        super().report(event)
        if isinstance(event, StepDone) and event.step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_was_stopped_has_none(base_model: Path, rows: Path, tmp_path: Path) -> None:
    result = train(train_settings(base_model, rows, tmp_path / "run"), Stopper())
    assert result.interrupted_by == "SIGINT"
    assert result.adapter_health is None
