"""`qlora train` and the positions of a model: longer rows are truncated with a note, or positions are stretched."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qlora_cli.cli.app import app
from qlora_cli.errors import ModelError
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.train_run import run
from tests.conftest import Recorder, train_settings, write_jsonl
from tests.support.models.loading import load, logits, save_model

POSITIONS = 64
IDS = torch.arange(20, 20 + 2 * POSITIONS)[None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", max_position_embeddings=POSITIONS)


@pytest.fixture
def long_rows(tmp_path: Path) -> Path:
    """Rows of many more than 128 tokens."""
    words = "os.path.join(a, b) returns a path " * 40
    return write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Say: ", "completion": words}] * 4)


def train(model: Path, data: Path, output: Path, *flags: str) -> tuple[int, str]:
    arguments = ["train", "--model", model, "--dataset", data, "--output", output, "--device", "cpu", *flags]
    arguments += ["--dtype", "fp32", "--max-steps", "1", "--gradient-accumulation-steps", "1", "--accept-lost"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stderr


def longest_row(output: Path) -> int:
    number = json.loads((output / "run.json").read_text())["data"]["train"]["longest_row_tokens"]
    assert isinstance(number, int)
    return number


def test_rows_are_truncated_at_the_positions_with_a_note_if_no_length_is_set(
    model: Path, long_rows: Path, tmp_path: Path
) -> None:
    code, stderr = train(model, long_rows, tmp_path / "run")
    assert code == 0, stderr
    assert "rows are truncated at 64 tokens, the positions that the model has" in stderr
    assert "4 rows longer than 64 tokens, truncated" in stderr
    assert longest_row(tmp_path / "run") == POSITIONS
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["data"]["max_length"] == POSITIONS


def test_the_error_of_a_length_beyond_the_positions_names_the_flag_that_permits_it(
    model: Path, long_rows: Path, tmp_path: Path
) -> None:
    code, stderr = train(model, long_rows, tmp_path / "run", "--max-length", "128")
    assert code == 2
    assert "error: --max-length: 128 is more than the 64 positions of the model" in stderr
    assert not (tmp_path / "run").exists()
    hinted = re.search(r"--rope-scaling (\S+)", stderr)
    assert hinted is not None
    code, stderr = train(model, long_rows, tmp_path / "run", "--max-length", "128", "--rope-scaling", hinted[1])
    assert code == 0, stderr
    assert "rotary positions stretched from 64 to 128" in stderr
    assert longest_row(tmp_path / "run") == 128


@pytest.mark.parametrize("scaling", ["linear:2", "yarn:2", "dynamic:2"])
def test_a_run_on_stretched_positions_loads_with_them_to_the_same_logits(
    model: Path, long_rows: Path, tmp_path: Path, scaling: str
) -> None:
    flags = {"model__rope_scaling": scaling, "data__max_length": 128, "data__accept_lost": True}
    flags["training__learning_rate"] = 0.01
    prepared = prepare_run(train_settings(model, long_rows, tmp_path / "run", **flags), Recorder())
    output = run(prepared, Recorder()).output
    expected = logits(prepared.model, IDS)
    again = load(output)
    assert again.settings.model.rope_scaling == scaling
    assert torch.equal(logits(again.model, IDS), expected)
    assert torch.equal(logits(load(output / "adapter").model, IDS), expected)
    # Outside its run, the adapter does not know its positions.
    alone = shutil.copytree(output / "adapter", tmp_path / "alone")
    assert not torch.equal(logits(load(alone).model, IDS), expected)
    assert torch.equal(logits(load(alone, model__rope_scaling=scaling).model, IDS), expected)


def test_a_run_continues_to_train_with_its_stretched_positions(model: Path, long_rows: Path, tmp_path: Path) -> None:
    flags: dict[str, object] = {"data__max_length": 128, "data__accept_lost": True, "training__max_steps": 1}
    first = train_settings(model, long_rows, tmp_path / "one", model__rope_scaling="yarn:2", **flags)
    run(prepare_run(first, Recorder()), Recorder())
    prepared = prepare_run(train_settings(tmp_path / "one", long_rows, tmp_path / "two", **flags), Recorder())
    assert prepared.settings.model.rope_scaling == "yarn:2"
    assert prepared.plan.longest_row_tokens == 128
    with pytest.raises(ModelError, match=r"data.max_length: 256 is more than the 128 positions"):
        prepare_run(
            train_settings(tmp_path / "one", long_rows, tmp_path / "two", **{**flags, "data__max_length": 256}),
            Recorder(),
        )
