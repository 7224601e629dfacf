"""A base with calibrated codes: an ordinary quantized checkpoint, whose predictions are nearer to those of 16 bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_cli.calibrating.calibration import calibrate_on
from qlora_cli.errors import ModelError
from qlora_cli.events import Noted
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.loading.loader import LoadedModel, load_planned
from qlora_cli.loading.save import save_quantized
from qlora_cli.memory.gpus import this_cpu
from qlora_cli.timing.rates import rates_of
from qlora_cli.timing.rates_file import store_rates
from tests.conftest import ASSETS, Recorder, RunQlora
from tests.support.models.experts import save_moe
from tests.support.models.loading import asked_load, logits, save_model, without_repacking
from tests.support.models.reference_models import load_plain

DATA = str(ASSETS / "held_out.jsonl")  # the demo's base was not trained on it
NUM_TOKENS = 2000


def calibrated(model: Path, recorder: Recorder | None = None, **flags: object) -> LoadedModel:
    reporter = recorder or Recorder()
    load_plan = plan_load(asked_load(model, **flags), reporter)
    codes = calibrate_on((DATA,), load_plan, reporter, num_tokens=NUM_TOKENS)
    return load_planned(load_plan, reporter, measure_error=True, calibrated=codes)


def saved(loaded: LoadedModel, directory: Path) -> Path:
    save_quantized(loaded, directory, Recorder())
    return directory


def divergence(exact: PreTrainedModel, other: torch.nn.Module, ids: torch.Tensor) -> float:
    """Return the mean KL divergence, in nats a token, of the predictions of `other` from those of `exact`."""
    one, two = (log_softmax(logits(model, ids), -1) for model in (exact, other))
    return float(kl_div(two, one, log_target=True, reduction="none").sum(-1).mean())


@pytest.fixture(scope="module")
def demo(base_model: Path) -> LoadedModel:
    return calibrated(base_model)


@pytest.fixture(scope="module")
def demo_checkpoint(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(demo, tmp_path_factory.mktemp("demo") / "base")


@pytest.fixture(scope="module")
def unseen_ids(demo: LoadedModel) -> torch.Tensor:
    """Rows of the training data, `(rows, seq)`, which were not calibrated on."""
    rows = [json.loads(line) for line in (ASSETS / "train.jsonl").read_text().splitlines()[:40]]
    texts = [str(demo.tokenizer.apply_chat_template(row["messages"], tokenize=False)) for row in rows]
    ids = torch.tensor(demo.tokenizer("".join(texts), add_special_tokens=False).input_ids)
    return ids[: 8 * 128].view(8, 128)


def test_the_predictions_are_nearer_to_those_of_16_bit(
    demo: LoadedModel, base_model: Path, unseen_ids: torch.Tensor
) -> None:
    exact = load_plain(base_model)
    plain = AutoModelForCausalLM.from_pretrained(
        base_model,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    assert divergence(exact, demo.base, unseen_ids) < 0.5 * divergence(exact, plain, unseen_ids)


def test_plain_transformers_loads_the_checkpoint_to_the_same_logits(demo: LoadedModel, demo_checkpoint: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)
    assert torch.equal(logits(without_repacking(plain)), logits(demo.base))
    note = json.loads((demo_checkpoint / "qlora.json").read_text())["calibration"]
    assert note["data"] == [DATA]
    assert note["num_tokens"] >= NUM_TOKENS
    assert note["fingerprint"]


def test_a_second_calibration_gives_the_same_bytes(demo_checkpoint: Path, base_model: Path, tmp_path: Path) -> None:
    again = saved(calibrated(base_model), tmp_path / "again")
    (one,), (two,) = (sorted(path.glob("*.safetensors")) for path in (demo_checkpoint, again))
    assert one.read_bytes() == two.read_bytes()


def test_the_reported_error_is_that_of_the_codes(demo: LoadedModel, base_model: Path) -> None:
    exact = load_plain(base_model).state_dict()
    assert demo.errors is not None
    for name, error in demo.errors.items():
        module = demo.base.get_submodule(name.removesuffix(".weight"))
        restored = module(torch.eye(exact[name].shape[1])).T
        expected = (restored - exact[name]).norm() / exact[name].norm()
        assert error == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text", "dbrx"])
def test_experts_are_calibrated_by_their_own_tokens(family: str, tmp_path: Path) -> None:
    """Where they are stacked; random routing leaves some with fewer tokens than features, which is noted."""
    recorder = Recorder()
    loaded = calibrated(save_moe(tmp_path / family, family), recorder)
    checkpoint = saved(loaded, tmp_path / "saved")
    again = load_planned(plan_load(asked_load(checkpoint), Recorder()), Recorder())
    assert torch.equal(logits(again.base), logits(loaded.base))
    notes = [event.message for event in recorder.events if isinstance(event, Noted)]
    assert any("had no token" in note for note in notes) == (family == "dbrx")


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "phi3", "qwen3_next", "mamba"])
def test_other_layouts_are_calibrated(family: str, unseen_ids: torch.Tensor, tmp_path: Path) -> None:
    """Transposed and fused weights, and layers of different kinds."""
    path = save_model(tmp_path / family, family)
    loaded = calibrated(path)
    assert loaded.calibration is not None
    plain = load_planned(plan_load(asked_load(path), Recorder()), Recorder())
    assert not torch.equal(logits(plain.base), logits(loaded.base))
    exact = load_plain(path)
    assert divergence(exact, loaded.base, unseen_ids) < divergence(exact, plain.base, unseen_ids)


def test_rows_with_new_tokens_are_calibrated_on(base_model: Path) -> None:
    loaded = calibrated(base_model, model__new_tokens="<a>,<b>")
    assert len(loaded.new_token_ids) == 2


@pytest.mark.parametrize("method", ["int8", "none"])
def test_what_has_no_codes_to_choose_is_refused(base_model: Path, method: str) -> None:
    with pytest.raises(ModelError, match="no codes that could be chosen") as caught:
        calibrated(base_model, quantization__method=method)
    assert "nf4" in str(caught.value.hint)


def test_a_quantized_checkpoint_is_refused(demo_checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="already quantized"):
        calibrated(demo_checkpoint)


def test_the_command_says_what_the_codes_were_chosen_by(base_model: Path, tmp_path: Path, run_qlora: RunQlora) -> None:
    command = ["load", str(base_model), "--calibrate", DATA, "--set", "load.calibration_tokens=300"]
    finished = run_qlora(*command, "--save", str(tmp_path / "saved"), "--json")
    report = json.loads(finished.stdout)
    assert report["calibration"]["data"] == [DATA]
    assert 300 <= report["calibration"]["num_tokens"] < 1000
    assert (tmp_path / "saved" / "config.json").exists()


def test_data_that_does_not_exist_is_refused_before_the_model_is_read(base_model: Path, run_qlora: RunQlora) -> None:
    finished = run_qlora("load", str(base_model), "--calibrate", "absent.jsonl")
    assert finished.code == 2
    assert "absent.jsonl" in finished.stderr
    assert "--calibrate" in finished.stderr


def test_how_long_it_takes_is_said_beforehand_where_the_rates_of_the_machine_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    path = save_model(tmp_path / "llama", "llama")

    def notes() -> list[str]:
        recorder = Recorder()
        calibrated(path, recorder)
        messages = [event.message for event in recorder.events if isinstance(event, Noted)]
        return [message for message in messages if "takes about" in message]

    assert notes() == []
    rates = rates_of("T4", 1)
    assert rates is not None
    store_rates(this_cpu().measured_as, "fp32", replace(rates, watts=0, is_host=True))
    (note,) = notes()
    assert "measured on this machine on" in note
