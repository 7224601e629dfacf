"""What a run forgets of general text: measured as the loss of base and result is, recorded, shown, and left out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.errors import SettingsError
from qlora_cli.events import Noted
from qlora_cli.runs.detail import detail_of
from qlora_cli.runs.find_runs import read_run
from qlora_cli.runs.report.run_page import report_page
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.checks.input_checks import check_train_inputs
from qlora_cli.training.outcome.general_text import ROW_TOKENS, general_rows, text_of
from qlora_cli.training.outcome.measured_forgetting import TIMES_THE_TEXT, measure_forgetting
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.train_run import train
from tests.conftest import ASSETS, Recorder, short_settings

TEXT = "A short text, which nobody has trained on: nine days of rain, then sun. " * 40


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join((ASSETS / "train.jsonl").read_text().splitlines(keepends=True)[:12]))
    path.with_name("text.txt").write_text(TEXT)
    return path


def settings_with(
    base: Path, rows: Path, output: Path, text: str | Path, **changed: object
) -> Resolved[TrainSettings]:
    flags = {"quantization__method": "none", "training__general_text": str(text), **changed}
    return short_settings(base, rows, output, training__learning_rate=5e-3, **flags)


@torch.no_grad()
def plain_loss(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> float:
    """Return the mean loss by transformers, one row at a time."""
    nll, num_tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        nll += float(model(input_ids=ids, labels=ids).loss) * (ids.numel() - 1)
        num_tokens += ids.numel() - 1
    return nll / num_tokens


@pytest.mark.fast
def test_both_losses_are_those_of_transformers_and_are_recorded_and_shown(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    result = train(settings_with(base_model, rows, tmp_path / "run", rows.with_name("text.txt")), Recorder())
    measured = result.forgetting
    assert measured is not None
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    text = general_rows("text", TEXT, tokenizer, max_length=512)
    before = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    after = AutoPeftModelForCausalLM.from_pretrained(result.adapter, dtype=torch.float32)
    assert measured.base_loss == pytest.approx(plain_loss(before, text.dataset), abs=1e-4)
    assert measured.loss == pytest.approx(plain_loss(after, text.dataset), abs=1e-4)
    assert abs(measured.change) > 1e-3
    assert (measured.text, measured.num_tokens) == ("text.txt", int((text.lengths - 1).sum()))
    run = read_run(tmp_path / "run")
    assert detail_of(run).forgetting == measured
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["result"]["forgetting"]
    assert recorded["loss"] == measured.loss
    page = report_page(run.summary, run.history, run.record)
    assert "Loss on general text" in page
    assert f"{measured.base_loss:.4f} before" in page


@pytest.mark.parametrize(
    ("text", "changed", "is_measured"),
    [
        ("on", {}, True),
        ("off", {}, False),
        ("auto", {}, False),
        ("on", {"lora__init_lora_weights": "pissa", "training__max_steps": 1}, False),
    ],
)
def test_it_is_measured_if_it_is_asked_for_or_cheap_and_the_base_is_still_there(
    text: str, changed: dict[str, object], is_measured: bool, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    reporter = Recorder()
    result = train(settings_with(base_model, rows, tmp_path / "run", text, **changed), reporter)
    assert (result.forgetting is not None) == is_measured
    assert ("what was forgotten is not measured" in str(reporter.events)) == ("lora__init_lora_weights" in changed)


def test_before_any_training_nothing_is_forgotten_and_a_text_that_is_gone_is_a_warning(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    reporter, text = Recorder(), tmp_path / "text.txt"
    text.write_text(TEXT)
    prepared = prepare_run(settings_with(base_model, rows, tmp_path / "run", "auto"), reporter)
    num_tokens = int(general_rows(*text_of("on"), prepared.loaded.tokenizer, max_length=512).lengths.sum())
    assert measure_forgetting(prepared, TIMES_THE_TEXT * num_tokens - 1, reporter) is None
    measured = measure_forgetting(prepared, TIMES_THE_TEXT * num_tokens, reporter)
    assert measured is not None
    assert measured.change == pytest.approx(0, abs=1e-6)
    assert not any(isinstance(event, Noted) and event.level == "warning" for event in reporter.events)
    other = prepare_run(settings_with(base_model, rows, tmp_path / "run", text), reporter)
    text.unlink()
    assert measure_forgetting(other, 1, reporter) is None
    assert "is not measured" in str(reporter.events[-1])
    text.write_text("")
    assert measure_forgetting(other, 1, reporter) is None


def test_measuring_does_not_change_the_run(base_model: Path, rows: Path, tmp_path: Path) -> None:
    runs = [train(settings_with(base_model, rows, tmp_path / text, text), Recorder()) for text in ("on", "off")]
    weights = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    assert runs[0].adapter_health == runs[1].adapter_health


def test_our_own_text_is_plain_and_long_enough_and_rows_hold_all_of_it() -> None:
    name, text = text_of("on")
    assert name == "built in"
    assert text.isascii()
    assert 1500 < len(text.split()) < 2500
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "base")
    for max_length in (8, 100, 4096):
        rows = general_rows(name, text, tokenizer, max_length=max_length)
        assert rows.lengths.max() <= min(max_length, ROW_TOKENS)
        assert np.array_equal(rows.lengths, [len(row["labels"]) for row in rows.dataset])
    assert general_rows("a", text, tokenizer, max_length=64).fingerprint != rows.fingerprint


@pytest.mark.parametrize(
    ("content", "says"), [(None, "can't be read"), (b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe\x00", "UTF-8")]
)
def test_a_file_without_text_is_refused_before_any_work(
    content: bytes | None, says: str, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"training\.general_text: .*{says}"):
        check_train_inputs(settings_with(base_model, rows, tmp_path / "run", tmp_path / "text.txt"))
