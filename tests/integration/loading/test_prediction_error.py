"""What quantization costs on text is what the plain models' own predictions differ by."""

import json
from math import exp
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from typer.testing import CliRunner

from qlora_cli.calibrating.calibration import calibrate_on
from qlora_cli.calibrating.calibration_rows import read_rows
from qlora_cli.calibrating.prediction_error import check_comparable, measure_prediction_error, predict_unquantized
from qlora_cli.cli.app import app
from qlora_cli.errors import ModelError
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.loading.loader import load_model, load_planned
from qlora_cli.loading.save import save_quantized
from qlora_cli.quantization.load_report import PredictionError
from tests.conftest import ASSETS, Recorder
from tests.support.models.loading import asked_load, load, load_settings, logits, save_model
from tests.support.models.reference_models import ROWS, load_plain

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = (f"{ASSETS / 'held_out.jsonl'}#12",)


def measured(model: Path, *, calibrate_first: bool = False, **flags: object) -> PredictionError:
    load_plan = plan_load(asked_load(model, **flags), Recorder())
    check_comparable(load_plan, "load.error_on")
    codes = calibrate_on((f"{ASSETS / 'train.jsonl'}#60",), load_plan, Recorder()) if calibrate_first else None
    loaded = load_planned(load_plan, Recorder(), calibrated=codes)
    return measure_prediction_error(loaded, predict_unquantized(load_plan, DATA, Recorder()))


@pytest.fixture(scope="module")
def plain(shallow_base: Path) -> PredictionError:
    return measured(shallow_base, model__dtype="fp32")


def test_it_is_the_divergence_of_two_models_that_are_whole_in_memory(
    shallow_base: Path, plain: PredictionError
) -> None:
    exact, quantized = load_plain(shallow_base), load(shallow_base, model__dtype="fp32").base
    rows = prepared_ids(shallow_base)
    assert (plain.num_rows, plain.num_tokens) == (len(rows), sum(map(len, rows)))
    sums = {"kl": 0.0, "one": 0.0, "two": 0.0, "targets": 0}
    for row in rows:
        one, two = (logits(model, row[None])[0] for model in (exact, quantized))
        sums["kl"] += float(kl_div(two.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="sum"))
        for key, values in (("one", one), ("two", two)):
            sums[key] += float(cross_entropy(values[:-1], row[1:], reduction="sum"))
        sums["targets"] += len(row) - 1
    assert plain.mean_kl == pytest.approx(sums["kl"] / plain.num_tokens, rel=1e-3)
    assert plain.unquantized_perplexity == pytest.approx(exp(sums["one"] / sums["targets"]), rel=1e-4)
    assert plain.perplexity == pytest.approx(exp(sums["two"] / sums["targets"]), rel=1e-4)
    assert len(plain.layers) == exact.config.num_hidden_layers
    assert all(0.005 < error < 0.5 for error in plain.layers)


def prepared_ids(model: Path) -> list[torch.Tensor]:
    """Return the rows of the data as they are trained."""
    rows = read_rows(DATA, plan_load(asked_load(model), Recorder()), 1024, Recorder()).rows
    return [row[:512] for row in rows]


def test_calibration_lowers_it_on_other_rows(shallow_base: Path, plain: PredictionError) -> None:
    calibrated = measured(shallow_base, calibrate_first=True, model__dtype="fp32")
    assert calibrated.mean_kl < 0.8 * plain.mean_kl
    assert calibrated.layers[-1] < 0.9 * plain.layers[-1]


@pytest.mark.parametrize("method", ["fp4", "int8"])
def test_each_method_has_one(shallow_base: Path, plain: PredictionError, method: str) -> None:
    error = measured(shallow_base, quantization__method=method, model__dtype="fp32")
    assert (error.mean_kl > plain.mean_kl) == (method == "fp4")


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "bamba", "mixtral"])
def test_other_families_are_compared_layer_by_layer(tmp_path: Path, family: str) -> None:
    error = measured(save_model(tmp_path / family, family, vocab_size=ROWS), model__dtype="fp32")
    assert error.mean_kl >= 0
    assert len(error.layers) >= 1


def test_where_nothing_can_be_compared_it_is_refused_before_weights_are_read(
    shallow_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="nothing is quantized"):
        measured(shallow_base, quantization__method="none")
    save_quantized(load_model(load_settings(shallow_base)), tmp_path / "stored", Recorder())
    with pytest.raises(ModelError, match="quantized already"):
        measured(tmp_path / "stored")


def test_the_command_prints_it(shallow_base: Path) -> None:
    done = CliRunner().invoke(app, ["load", str(shallow_base), "--error-on", DATA[0], "--json"])
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)["prediction_error"]
    assert printed["data"] == [*DATA]
    assert printed["mean_kl"] > 0
