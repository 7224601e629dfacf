"""A run that calibrates its base owns it: resume, merge and all the rest use that very base, also after a move."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.calibrating.calibration import calibrate_on
from qlora_cli.errors import ModelError, OutputDirectoryError, SettingsError
from qlora_cli.evaluating.evaluation import evaluate
from qlora_cli.events import Noted, StepDone
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.loading.loader import load_model, load_planned
from qlora_cli.loading.save import save_quantized
from qlora_cli.settings.models import EvaluateSettings, TrainSettings
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.train_run import train
from tests.conftest import ASSETS, Recorder, short_settings
from tests.support.models.loading import asked_load, load_settings, logits
from tests.support.runs.merge_command import merged

ROWS = ASSETS / "train.jsonl"
NUM_TOKENS = 300


def asked(model: Path, output: Path, dataset: str = f"{ROWS}#40", **flags: Any) -> Resolved[TrainSettings]:
    given: dict[str, Any] = {
        "training.calibrate": True,
        "training.calibration_tokens": NUM_TOKENS,
        "training.save_steps": 1,
        **flags,
    }
    return short_settings(model, Path(dataset), output, **given)


def losses(recorder: Recorder) -> list[float]:
    return [event.loss for event in recorder.events if isinstance(event, StepDone)]


def trained(settings: Resolved[TrainSettings]) -> Recorder:
    recorder = Recorder()
    train(settings, recorder)
    return recorder


@pytest.fixture(scope="module")
def run(shallow_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    trained(asked(shallow_base, output))
    return output


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the run, as of one that was moved: the path of its base in its record is no more."""
    copied = Path(shutil.copytree(run, tmp_path / "moved"))
    record = json.loads((copied / "run.json").read_text())
    for key, value in record.items():
        if isinstance(value, str) and value.startswith(str(run)):
            record[key] = value.replace(str(run), "/nowhere")
    record["base_model"]["base_model"] = "/nowhere/base"
    (copied / "run.json").write_text(json.dumps(record))
    config = copied / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(run), "/nowhere"))
    return copied


def test_the_run_has_a_base_of_its_own_and_says_so(run: Path, shallow_base: Path) -> None:
    config = json.loads((run / "base" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    calibration = json.loads((run / "base" / "qlora.json").read_text())["calibration"]
    assert NUM_TOKENS <= calibration["num_tokens"] < 2 * NUM_TOKENS
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(run / "base")
    plain = load_model(load_settings(shallow_base))
    own = load_model(load_settings(run / "base"))
    assert not torch.equal(logits(plain.base), logits(own.base))


def test_it_trains_as_on_the_base_that_load_calibrates_on_the_same_rows(shallow_base: Path, tmp_path: Path) -> None:
    """On so few rows that both calibrate on all of them."""
    dataset = f"{ROWS}#4"
    load_plan = plan_load(asked_load(shallow_base), Recorder())
    codes = calibrate_on((dataset,), load_plan, Recorder(), num_tokens=10**6)
    save_quantized(load_planned(load_plan, Recorder(), calibrated=codes), tmp_path / "base", Recorder())
    separate = trained(short_settings(tmp_path / "base", Path(dataset), tmp_path / "separate"))
    own = trained(asked(shallow_base, tmp_path / "own", dataset, **{"training.calibration_tokens": 10**6}))
    plain = trained(short_settings(shallow_base, Path(dataset), tmp_path / "plain"))
    assert losses(own) == losses(separate)
    assert losses(own) != losses(plain)


def test_the_same_command_resumes_on_that_base(shallow_base: Path, tmp_path: Path) -> None:
    constant: dict[str, Any] = {"training.schedule": "constant"}
    whole = trained(asked(shallow_base, tmp_path / "whole", training__max_steps=4, **constant))
    first = trained(asked(shallow_base, tmp_path / "cut", **constant))
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "base").iterdir()}
    second = trained(asked(shallow_base, tmp_path / "cut", training__max_steps=4, **constant))
    assert losses(first) + losses(second) == losses(whole)
    assert written == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "base").iterdir()}


def test_what_its_base_lost_is_measured_against_the_one_that_it_was_made_from(run: Path) -> None:
    values = {"model.name": str(run), "data.dataset": f"{ROWS}#4", "evaluate.with_unquantized": True}
    sources = Sources(flags={path: (path, value) for path, value in values.items()})
    evaluation = evaluate(resolve(sources, EvaluateSettings), Recorder())
    quantization = {source.source: source.quantization for source in evaluation.sources}
    assert quantization == {"base": "nf4", "adapter": "nf4", "unquantized": "none"}
    assert evaluation.quantization_cost is not None
    assert 0 < (evaluation.quantization_cost.mean_kl or 0) < 0.1


def test_a_run_that_was_moved_finds_its_base(copy: Path) -> None:
    loaded = load_model(load_settings(copy))
    assert loaded.source.path == (copy / "base").resolve()
    report = merged(copy, "--output", copy.parent / "merged", "--base", "dequantized")
    assert report["verification"]["unrounded"]["median_kl"] < 1e-6


def test_a_base_that_was_made_before_is_used_again_and_only_for_the_same(shallow_base: Path, tmp_path: Path) -> None:
    """As after an end between the two: whatever stopped the run, the calibration is not lost."""
    output = tmp_path / "run"
    trained(asked(shallow_base, output))
    base = tmp_path / "again" / "base"
    shutil.copytree(output / "base", base)
    again = trained(asked(shallow_base, base.parent))
    assert any("made before" in event.message for event in again.events if isinstance(event, Noted))
    shutil.copytree(output / "base", tmp_path / "other" / "base")
    others: list[tuple[dict[str, Any], str]] = [
        ({"dataset": f"{ROWS}#30"}, "rows"),
        ({"training.calibration_tokens": 900}, "rows"),
        ({"quantization.double_quant": False}, "quantization"),
    ]
    for flags, what in others:
        with pytest.raises(OutputDirectoryError, match=what):
            train(asked(shallow_base, tmp_path / "other", **flags), Recorder())


def test_a_run_without_its_base_is_not_resumed(copy: Path, shallow_base: Path) -> None:
    shutil.rmtree(copy / "base")
    with pytest.raises(OutputDirectoryError, match="missing"):
        train(asked(shallow_base, copy, training__max_steps=5), Recorder())


@pytest.mark.parametrize("method", ["int8", "none"])
def test_what_can_not_be_calibrated_leaves_nothing_behind(shallow_base: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(ModelError, match="no codes"):
        train(asked(shallow_base, tmp_path / "run", **{"quantization.method": method}), Recorder())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags", [{"model.new_tokens": "<a>"}, {"model.rope_scaling": "yarn:2"}, {"training.num_gpus": 2}], ids=str
)
def test_settings_that_change_the_base_twice_are_refused(
    shallow_base: Path, tmp_path: Path, flags: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match=r"--calibrate|is done by one process"):
        asked(shallow_base, tmp_path / "run", **flags)


def test_the_number_of_tokens_alone_has_no_effect(shallow_base: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has no effect"):
        asked(shallow_base, tmp_path / "run", training__calibrate=False)


def test_a_plan_calibrates_nothing(shallow_base: Path, tmp_path: Path) -> None:
    prepared = prepare_run(asked(shallow_base, tmp_path / "run"), Recorder())
    assert prepared.settings.training.calibrate
    assert not (tmp_path / "run").exists()
