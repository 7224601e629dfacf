"""A calibrated adapter begins as what quantization lost on the rows to train, and a run with it resumes exactly."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import kl_div

from qlora_cli.calibrating.initial_adapter import FILE, stored_ranks
from qlora_cli.errors import ModelError, OutputDirectoryError, SettingsError
from qlora_cli.events import PhaseStarted
from qlora_cli.loading.loader import load_model
from qlora_cli.loading.save import save_quantized
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.train_run import plan, train
from tests.conftest import ASSETS, Recorder, short_settings
from tests.support.models.loading import load_settings, logits
from tests.support.models.reference_models import load_plain

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = Path(f"{ASSETS / 'train.jsonl'}#40")
INIT = "lora.init_lora_weights"


def asked(model: Path, output: Path, **flags: Any) -> Resolved[TrainSettings]:
    given: dict[str, Any] = {INIT: "calibrated", "training.save_steps": 1, "model.dtype": "fp32", **flags}
    return short_settings(model, ROWS, output, **given)


def test_it_begins_nearer_to_the_unquantized_model_than_the_others(shallow_base: Path, tmp_path: Path) -> None:
    prepared = prepare_run(asked(shallow_base, tmp_path), Recorder())
    rows = [torch.tensor([row["input_ids"]]) for row in prepared.train_data.dataset]
    exact = load_plain(shallow_base)

    def divergence(model: torch.nn.Module) -> float:
        pairs = [(logits(exact, ids).log_softmax(-1), logits(model, ids).log_softmax(-1)) for ids in rows]
        return sum(float(kl_div(two, one, log_target=True, reduction="sum")) for one, two in pairs)

    calibrated = divergence(prepared.model)
    loftq, default = (
        divergence(prepare_run(asked(shallow_base, tmp_path, **{INIT: init}), Recorder()).model)
        for init in ("loftq", "default")
    )
    assert calibrated < 0.9 * loftq < 0.9 * default


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_run_resumes_exactly(shallow_base: Path, tmp_path: Path, calibrate: bool) -> None:
    flags: dict[str, Any] = {"training.calibrate": calibrate, "training.schedule": "constant"}
    whole = train(asked(shallow_base, tmp_path / "whole", training__max_steps=4, **flags), Recorder())
    train(asked(shallow_base, tmp_path / "cut", **flags), Recorder())
    recorder = Recorder()
    cut = train(asked(shallow_base, tmp_path / "cut", training__max_steps=4, **flags), recorder)
    assert not any("Calibrating" in event.title for event in recorder.events if isinstance(event, PhaseStarted))
    first, second = (load_file(result.adapter / "adapter_model.safetensors") for result in (whole, cut))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_base_of_the_run_is_stored_with_what_the_adapter_begins_as(shallow_base: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"training.calibrate": True, "lora.rank": 4}
    result = train(asked(shallow_base, tmp_path / "run", **flags), Recorder())
    base = tmp_path / "run" / "base"
    assert set(stored_ranks(base).values()) == {4}
    assert load_model(load_settings(base)).load_seconds > 0  # the file is none of the model's
    shutil.copytree(base, tmp_path / "again" / "base")
    again = train(asked(shallow_base, tmp_path / "again", **flags), Recorder())
    assert again.final_loss == result.final_loss
    shutil.copytree(base, tmp_path / "other" / "base")
    with pytest.raises(OutputDirectoryError, match="other settings: adapter"):
        train(asked(shallow_base, tmp_path / "other", **{**flags, "lora.rank": 8}), Recorder())
    with pytest.raises(ModelError, match=f"{FILE} is for an adapter of other ranks"):
        train(asked(base, tmp_path / "direct", **{"lora.rank": 8}), Recorder())
    assert not (tmp_path / "direct").exists()


def test_a_plan_calibrates_nothing(shallow_base: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    plan(asked(shallow_base, tmp_path / "run"), recorder)
    assert not any("Calibrating" in event.title for event in recorder.events if isinstance(event, PhaseStarted))


def test_a_base_without_its_original_weights_is_refused_before_it_is_read(shallow_base: Path, tmp_path: Path) -> None:
    save_quantized(load_model(load_settings(shallow_base)), tmp_path / "base", Recorder())
    with pytest.raises(ModelError, match="calibrated needs the weights as they were before quantization"):
        train(asked(tmp_path / "base", tmp_path / "run"), Recorder())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"training.num_gpus": 2}, "done by one process"),
        ({"quantization.method": "int8"}, "has none"),
        ({"quantization.method": "none"}, "has none"),
        ({"lora.target_parameters": "all-experts"}, "fused experts"),
        ({"data.streaming": True, "training.max_steps": 2}, "data.streaming reads none"),
        ({"data.streaming": True, INIT: "default", "training.calibrate": True}, "data.streaming reads none"),
        ({INIT: "loftq", "training.calibrate": True}, "not of the layers"),
        ({INIT: "default", "training.calibration_tokens": 9}, "has no effect"),
    ],
    ids=str,
)
def test_what_it_can_not_be_used_with_is_an_error(
    shallow_base: Path, tmp_path: Path, flags: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        asked(shallow_base, tmp_path / "run", **flags)
