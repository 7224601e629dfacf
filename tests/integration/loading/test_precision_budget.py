"""Layers stay in 16 bit as far as a budget allows, those first whose quantization costs predictions most."""

import json
import random
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import kl_div
from torch.nn.utils.parametrize import remove_parametrizations
from typer.testing import CliRunner

from qlora_cli.calibrating.calibration import calibrate_on
from qlora_cli.calibrating.divergence_parts import LayerPart, parts_of_divergence
from qlora_cli.calibrating.precision_budget import check_budget, choose, keep_precision
from qlora_cli.calibrating.prediction_error import (
    UnquantizedPredictions,
    measure_prediction_error,
    predict_unquantized,
)
from qlora_cli.cli.app import app
from qlora_cli.errors import DataError, ModelError
from qlora_cli.events import PhaseStarted
from qlora_cli.loading.load_plan import LoadPlan, plan_load
from qlora_cli.loading.loader import LoadedModel, load_planned
from qlora_cli.loading.save import save_quantized
from tests.conftest import ASSETS, Recorder
from tests.support.models.experts import save_moe
from tests.support.models.loading import asked_load, load, logits, save_model
from tests.support.models.reference_models import ROWS

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = (f"{ASSETS / 'train.jsonl'}#60",)
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """A planned load with the predictions that layers are chosen by, and those that they are judged by."""

    load_plan: LoadPlan
    chosen_by: UnquantizedPredictions
    judged_by: UnquantizedPredictions

    @property
    def quantized_bytes(self) -> int:
        return self.load_plan.layout.inventory.total_bytes

    def load(self) -> LoadedModel:
        return load_planned(self.load_plan, Recorder())

    def kept(self, spare_bytes: int) -> LoadedModel:
        budget = self.quantized_bytes + spare_bytes
        return keep_precision(self.load(), self.load_plan, self.chosen_by, budget, Recorder())[0]

    def mean_kl(self, loaded: LoadedModel) -> float:
        return measure_prediction_error(loaded, self.judged_by).mean_kl


def case_of(model: Path, num_tokens: int = 1200, **flags: object) -> Case:
    load_plan = plan_load(asked_load(model, model__dtype="fp32", **flags), Recorder())
    one, other = predict_unquantized(load_plan, DATA, Recorder(), num_tokens=num_tokens // 2, num_halves=2).halves()
    return Case(load_plan=load_plan, chosen_by=one, judged_by=other)


@pytest.fixture(scope="module")
def demo(base_model: Path) -> Case:
    return case_of(base_model)


def test_the_parts_of_all_layers_add_up_to_the_divergence(demo: Case) -> None:
    mean_kl, parts = parts_of_divergence(demo.load(), demo.load_plan, demo.chosen_by)
    assert mean_kl == pytest.approx(measure_prediction_error(demo.load(), demo.chosen_by).mean_kl, rel=1e-3)
    assert {part.name for part in parts} == set(demo.load_plan.layout.extra_bytes)
    assert sum(part.mean_kl for part in parts) == pytest.approx(mean_kl, rel=0.15)


def test_more_memory_brings_predictions_on_other_rows_nearer(demo: Case) -> None:
    whole = sum(demo.load_plan.layout.extra_bytes.values())
    shares = (0.0, 0.2, 0.5, 0.9)
    divergences = [demo.mean_kl(demo.kept(int(share * whole))) for share in shares]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] < 0.3 * divergences[0]


def test_what_is_chosen_is_worth_more_than_as_many_bytes_of_any_layers(demo: Case) -> None:
    extra = demo.load_plan.layout.extra_bytes
    spare = sum(extra.values()) // 4
    chosen = demo.mean_kl(demo.kept(spare))
    others = []
    for seed in range(3):
        order = random.Random(seed).sample(sorted(extra), len(extra))  # noqa: S311 - any order will do
        parts = [LayerPart(name=name, mean_kl=rank + 1.0, extra_bytes=extra[name]) for rank, name in enumerate(order)]
        names = ",".join(part.name for part in choose(parts, spare))
        loaded = load(demo.load_plan.source.path, model__dtype="fp32", quantization__skip_modules=names)
        others.append(demo.mean_kl(loaded))
    assert chosen < min(others)


def test_the_model_is_the_one_that_is_loaded_with_these_layers_skipped(demo: Case, tmp_path: Path) -> None:
    spare = sum(demo.load_plan.layout.extra_bytes.values()) // 4
    budget = demo.quantized_bytes + spare
    kept, figures = keep_precision(demo.load(), demo.load_plan, demo.chosen_by, budget, Recorder())
    assert 0 < figures.extra_bytes <= spare
    assert figures.extra_bytes == kept.inventory.total_bytes - demo.quantized_bytes
    assert figures.expected_kl < figures.mean_kl_quantized
    skipped = ",".join(figures.modules)
    loaded = load(demo.load_plan.source.path, model__dtype="fp32", quantization__skip_modules=skipped)
    assert loaded.inventory == kept.inventory
    assert loaded.layout.unquantized == kept.layout.unquantized
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(logits(kept.base, ids), logits(loaded.base, ids), rtol=0, atol=0)
    save_quantized(kept, tmp_path / "stored", Recorder())
    stored = load(tmp_path / "stored", model__dtype="fp32")
    assert stored.layout.unquantized.keys() == kept.layout.unquantized.keys()
    torch.testing.assert_close(logits(stored.base, ids), logits(kept.base, ids), rtol=0, atol=0)


def test_the_codes_of_a_calibration_stay_in_the_other_layers(base_model: Path) -> None:
    load_plan = plan_load(asked_load(base_model, model__dtype="fp32"), Recorder())
    codes = calibrate_on(DATA, load_plan, Recorder(), num_tokens=2000)
    loaded = load_planned(load_plan, Recorder(), calibrated=codes)
    one, other = predict_unquantized(load_plan, DATA, Recorder(), num_tokens=400, num_halves=2).halves()
    before = {name: held(loaded, name) for name in load_plan.layout.extra_bytes}
    without = measure_prediction_error(loaded, other).mean_kl
    budget = load_plan.layout.inventory.total_bytes + 2 * MIB
    kept, figures = keep_precision(loaded, load_plan, one, budget, Recorder())
    assert 0 < len(figures.modules) < len(before)
    for name in before.keys() - set(figures.modules):
        torch.testing.assert_close(held(kept, name), before[name], rtol=0, atol=0)
    assert measure_prediction_error(kept, other).mean_kl < without


def held(loaded: LoadedModel, name: str) -> torch.Tensor:
    weight = loaded.layout.method.held_weight(loaded.base.get_submodule(name))
    assert weight is not None
    return weight


@pytest.mark.parametrize(
    ("family", "method"), [("gpt2", "nf4"), ("qwen2", "nf4"), ("mixtral", "nf4"), ("qwen2", "int8"), ("gemma2", "fp4")]
)
def test_other_families_and_methods_keep_layers_as_they_were(tmp_path: Path, family: str, method: str) -> None:
    base = save_model(tmp_path / family, family, vocab_size=ROWS)
    case = case_of(base, 300, quantization__method=method)
    extra = case.load_plan.layout.extra_bytes
    kept = case.kept(sum(extra.values()) // 2)
    exact = load(base, model__dtype="fp32", quantization__method="none").base
    names = [name for name in extra if kept.layout.unquantized.get(name) == "as asked"]
    assert 0 < len(names) < len(extra)
    for name in names:
        layer, same = (attrgetter(name)(model) for model in (kept.base, exact))
        assert type(layer) is type(same)
        for (key, value), (one, other) in zip(state_of(same).items(), state_of(layer).items(), strict=True):
            assert key == one
            torch.testing.assert_close(other, value, rtol=0, atol=0)
    assert kept.inventory.total_bytes <= case.quantized_bytes + sum(extra.values()) // 2
    assert not any(module.training for module in kept.base.modules() if isinstance(module, nn.Linear))


def state_of(layer: nn.Module | nn.Parameter) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer, or of the fused weight of experts."""
    return layer.state_dict() if isinstance(layer, nn.Module) else {"": layer}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_part_of_experts_is_that_of_their_gradient(tmp_path: Path, family: str) -> None:
    case = case_of(save_moe(tmp_path / family, family), 300)
    exact, experts = case.chosen_by, case.load_plan.layout.experts
    parts = {part.name: part.mean_kl for part in parts_of_divergence(case.load(), case.load_plan, exact)[1]}
    assert parts.keys() == set(case.load_plan.layout.extra_bytes) > set(experts)
    loaded = case.load()
    for name in experts:  # as plain trainable weights, whose gradients PyTorch accumulates
        owner, _, leaf = name.rpartition(".")
        module = loaded.base.get_submodule(owner)
        held = getattr(module, leaf).clone()
        remove_parametrizations(module, leaf, leave_parametrized=False)
        setattr(module, leaf, nn.Parameter(held))
    reference, predicted = exact.logits.log_softmax(1), exact.logits_of(loaded.base).log_softmax(1)
    mean_kl = kl_div(predicted, reference, reduction="sum", log_target=True) / len(reference)
    mean_kl.backward()  # type: ignore[no-untyped-call]
    for name in experts:
        weight = attrgetter(name)(loaded.base)
        expected = -0.5 * float((weight.grad * (exact.read(name) - weight.detach())).sum())
        assert parts[name] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_experts_of_single_layers_stay_unquantized_as_if_loaded_so(tmp_path: Path) -> None:
    base = save_moe(tmp_path / "qwen3_moe", "qwen3_moe")
    case = case_of(base, 300)
    extra, experts = case.load_plan.layout.extra_bytes, case.load_plan.layout.experts
    smallest = min(extra[name] for name in experts)
    kept = case.kept(smallest + sum(size for name, size in extra.items() if name not in experts))
    assert 0 < len(set(experts) & kept.layout.unquantized.keys()) < len(experts)
    names = ",".join(name for name in extra if name in kept.layout.unquantized)
    loaded = load(base, model__dtype="fp32", quantization__skip_modules=names)
    assert loaded.layout.experts == kept.layout.experts
    assert loaded.inventory.total_bytes == kept.inventory.total_bytes
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(logits(kept.base, ids), logits(loaded.base, ids), rtol=0, atol=0)
    save_quantized(kept, tmp_path / "stored", Recorder())
    stored = load(tmp_path / "stored", model__dtype="fp32")
    assert set(stored.layout.experts) == set(kept.layout.experts)
    torch.testing.assert_close(logits(stored.base, ids), logits(kept.base, ids), rtol=0, atol=0)


sizes = st.integers(min_value=1, max_value=1000)
a_part = st.builds(
    LayerPart, name=st.uuids().map(str), mean_kl=st.floats(min_value=-1, max_value=1), extra_bytes=sizes
)


@given(parts=st.lists(a_part, max_size=30, unique_by=lambda part: part.name), spare=st.integers(0, 5000))
def test_a_choice_fits_and_leaves_nothing_out_that_would(parts: list[LayerPart], spare: int) -> None:
    chosen = choose(parts, spare)
    left = spare - sum(part.extra_bytes for part in chosen)
    assert left >= 0
    assert all(part.mean_kl > 0 for part in chosen)
    assert all(part in chosen or part.mean_kl <= 0 or part.extra_bytes > left for part in parts)
    assert chosen == choose(list(reversed(parts)), spare)


def test_a_budget_that_leaves_no_choice_is_refused_before_weights_are_read(demo: Case) -> None:
    whole = demo.quantized_bytes + sum(demo.load_plan.layout.extra_bytes.values())
    with pytest.raises(ModelError, match="takes with every layer quantized"):
        check_budget(demo.quantized_bytes - 1, demo.load_plan)
    with pytest.raises(ModelError, match="suffice for every layer"):
        check_budget(whole, demo.load_plan)
    for budget in (demo.quantized_bytes, whole - 1):
        check_budget(budget, demo.load_plan)


def test_one_row_is_not_enough(base_model: Path) -> None:
    load_plan = plan_load(asked_load(base_model), Recorder())
    recorder = Recorder()
    with pytest.raises(DataError, match="has one row"):
        predict_unquantized(load_plan, (f"{ASSETS / 'train.jsonl'}#1",), recorder, num_halves=2)
    assert not any("Comparing" in event.title for event in recorder.events if isinstance(event, PhaseStarted))


def test_the_command_shows_the_layers(base_model: Path, tmp_path: Path) -> None:
    asked = ["load", str(base_model), "--error-on", DATA[0], "--memory-budget", "6MiB"]
    done = CliRunner().invoke(app, [*asked, "--error", "--save", str(tmp_path / "stored"), "--json"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    kept = report["kept"]
    assert (kept["budget_bytes"], kept["num_layers"]) == (6 * MIB, 28)
    assert report["total_bytes"] <= kept["budget_bytes"]
    of_others = {error["name"].removesuffix(".weight") for error in report["errors"]}
    assert len(of_others) == kept["num_layers"] - len(kept["modules"])
    assert not of_others & set(kept["modules"])
    config = json.loads((tmp_path / "stored" / "config.json").read_text())
    assert set(kept["modules"]) <= set(config["quantization_config"]["llm_int8_skip_modules"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory-budget", "6MiB"], "is spent by what quantization costs on data"),
        (["--error-on", DATA[0], "--memory-budget", "much"], "expected a size such as 6GiB"),
        (["--error-on", DATA[0], "--memory-budget", "0"], "greater than 0"),
        (["--error-on", DATA[0], "--memory-budget", "1GiB"], "use --quant none"),
        (["--error-on", DATA[0], "--memory-budget", "6MiB", "--quant", "none"], "nothing is quantized"),
    ],
    ids=["no data", "no size", "nothing", "too much", "nothing quantized"],
)
def test_wrong_input_is_one_message(base_model: Path, flags: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["load", str(base_model), *flags])
    assert done.exit_code == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""
