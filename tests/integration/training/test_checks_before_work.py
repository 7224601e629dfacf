"""Faults that the headers of files show are reported together, before rows are tokenized or weights are read."""

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qlora_cli.cli.app import app
from qlora_cli.errors import DataError, DiskSpaceError, ModelError, QloraError, SettingsError
from qlora_cli.events import PhaseStarted
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.run_plan import load_run, settle_run
from tests.conftest import Recorder, RunQlora, train_settings, write_jsonl
from tests.support.processes.hub_server import COMMIT, Hub, Repo

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without tokens."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(base_model: Path, tmp_path: Path) -> Path:
    """A model whose weights have a valid header and unusable data: reading them is an error."""
    copy = tmp_path / "model"
    shutil.copytree(base_model, copy)
    content = bytearray((copy / WEIGHTS).read_bytes())
    begin = 8 + header_bytes(copy / WEIGHTS)
    content[begin:] = b"\xff" * (len(content) - begin)
    (copy / WEIGHTS).write_bytes(content)
    return copy


@pytest.fixture
def unknown_format(tmp_path: Path) -> Path:
    """Rows of no known format."""
    return write_jsonl(tmp_path / "unknown_format.jsonl", [{"ask": "a", "say": "b"}] * 3)


def header_bytes(file: Path) -> int:
    return int(struct.unpack("<Q", file.read_bytes()[:8])[0])


def refused(settings: Resolved[TrainSettings], cache: Path) -> QloraError:
    """Return the error of a run that ends before it has done anything."""
    recorder = Recorder()
    with pytest.raises(QloraError) as caught:
        load_run(settle_run(settings, recorder), recorder)
    assert caught.value.exit_code == 2
    assert not list(cache.rglob("*.arrow"))
    phases = [event.title for event in recorder.events if isinstance(event, PhaseStarted)]
    assert [title for title in phases if title.startswith(("Reading", "Loading"))] == []
    assert not settings.settings.output.directory.exists()
    return caught.value


def test_the_weights_of_the_fixture_can_not_be_read(model: Path, rows: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    settled = settle_run(train_settings(model, rows, tmp_path / "run"), recorder)
    with pytest.raises(ModelError, match=r"finite|NaN|nan"):
        load_run(settled, recorder)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("data.columns", "messages=mesages", "has no column 'mesages'"),
        ("data.columns", "mesages=messages", "no format has a part 'mesages'"),
        ("data.format", "alpaca", "has no column instruction, output"),
        ("data.dataset", "{rows},{unknown_format}", "unknown_format.jsonl fit no known format"),
        ("data.eval_dataset", "{unknown_format}", "unknown_format.jsonl fit no known format"),
        ("data.eval_dataset", "{unknown_format}#2", "unknown_format.jsonl#2 fit no known format"),
        ("data.eval_dataset", "{no_answers}", "no_answers.jsonl, row 2 .*is empty"),
        ("model.chat_template", "{template}", "chat template"),
        ("lora.target_modules", "q_proj,nothing", "'nothing' matches no linear layer"),
        ("lora.target_parameters", "all-experts", "has no fused experts"),
        ("lora.modules_to_save", "nothing", "'nothing' matches no module"),
        ("lora.modules_to_save", "q_proj", "q_proj .*(is stored quantized|has an adapter)"),
        ("lora.modules_to_save", "embed_tokens,mlp", "stored quantized|has an adapter"),
        ("lora.rank_pattern", "nothing=4", "'nothing' matches no adapted layer"),
        ("lora.alpha_pattern", "nothing=4", "'nothing' matches no adapted layer"),
        ("quantization.skip_modules", "nothing", "'nothing' matches no layer"),
        ("output.max_checkpoints", "100000000", "would be written"),
    ],
)
def test_faults_are_found_before_work(
    model: Path, rows: Path, unknown_format: Path, cache: Path, tmp_path: Path, setting: str, value: str, message: str
) -> None:
    no_answers = [json.loads(rows.read_text().splitlines()[0]), {"messages": [{"role": "assistant", "content": ""}]}]
    places = {
        "rows": rows,
        "unknown_format": unknown_format,
        "no_answers": write_jsonl(tmp_path / "no_answers.jsonl", no_answers),
        "template": tmp_path / "bad.jinja",
    }
    places["template"].write_text("{{ raise_exception('no') }}")
    values: Any = value.format(**places)
    if setting.endswith("dataset"):
        values = values.split(",")
    settings = train_settings(model, rows, tmp_path / "run", **{setting.replace(".", "__"): values})
    error = refused(settings, cache)
    assert not isinstance(error, SettingsError)
    assert re.search(message, str(error)), error


def test_an_impossible_initialization_is_found_before_work(
    model: Path, rows: Path, cache: Path, tmp_path: Path
) -> None:
    asked = {"quantization__method": "none", "lora__init_lora_weights": "pissa", "lora__rank": 4096}
    assert "principal components" in str(refused(train_settings(model, rows, tmp_path / "run", **asked), cache))


def test_all_problems_are_reported_together(
    model: Path, rows: Path, unknown_format: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    held_out = shutil.copy(unknown_format, tmp_path / "held_out.jsonl")
    settings = train_settings(
        model, rows, tmp_path / "run", data__dataset=[str(rows), str(unknown_format)], data__eval_dataset=str(held_out)
    )
    error = refused(settings, cache)
    assert isinstance(error, SettingsError)
    assert [problem.where for problem in error.problems] == ["data.dataset", "data.eval_dataset", "output.directory"]


@pytest.mark.parametrize(
    "setting", ["lora.target_modules", "lora.target_parameters", "lora.modules_to_save", "lora.rank_pattern"]
)
def test_a_name_that_matches_nothing_is_reported_with_the_columns_and_its_setting(
    model: Path, rows: Path, cache: Path, tmp_path: Path, setting: str
) -> None:
    value = "no=3" if setting.endswith("pattern") else "no"
    asked = {"data__columns": "messages=no", setting.replace(".", "__"): value}
    error = refused(train_settings(model, rows, tmp_path / "run", **asked), cache)
    assert isinstance(error, SettingsError)
    assert [problem.where for problem in error.problems] == ["data.columns", setting]


def test_problems_of_the_model_are_reported_with_those_of_the_data(
    model: Path, unknown_format: Path, cache: Path, tmp_path: Path
) -> None:
    (model / "tokenizer.json").write_text("{}")
    error = refused(train_settings(model, unknown_format, tmp_path / "run"), cache)
    assert isinstance(error, SettingsError)
    assert [problem.where for problem in error.problems] == ["model.name", "data.dataset"]


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--model", "./no"], ["--model", "--dataset"]),
        (["--eval-dataset", "no.jsonl"], ["--eval-dataset", "--dataset"]),
        (["--output", "{unknown_format}"], ["--output", "--dataset"]),
    ],
)
def test_a_wrong_name_is_reported_with_wrong_columns(
    model: Path, unknown_format: Path, tmp_path: Path, flags: list[str], wrong: list[str]
) -> None:
    usual = {"--model": str(model), "--dataset": str(unknown_format), "--output": str(tmp_path / "run")}
    usual |= {flags[0]: flags[1].format(unknown_format=unknown_format)}
    done = CliRunner().invoke(app, ["train", *(part for pair in usual.items() for part in pair), "--json"])
    assert done.exit_code == 2
    assert [problem["where"] for problem in json.loads(done.stdout)["error"]["problems"]] == wrong


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["load", "./no", "--save", "{file}"], ["MODEL", "--save"]),
        (["merge", "./no", "--output", "{file}", "--format", "gguf"], ["RUN_OR_ADAPTER", "--output", "--format"]),
        (["generate", "./no", "--prompt", "a", "--compare", "--merged", "./none"], ["MODEL", "--merged"]),
        (["evaluate", "./no", "--dataset", "no.jsonl", "--merged", "./none"], ["MODEL", "--merged", "--dataset"]),
    ],
)
def test_other_commands_report_all_faults_too(
    unknown_format: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], wrong: list[str]
) -> None:
    monkeypatch.setenv("PATH", "")  # llama.cpp may be on it
    values = [part.format(file=unknown_format) for part in arguments]
    done = CliRunner().invoke(app, [*values, "--json"])
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert [problem["where"] for problem in error["problems"]] == wrong


def test_truncated_weights_are_found_by_their_header(model: Path, rows: Path, cache: Path, tmp_path: Path) -> None:
    with (model / WEIGHTS).open("rb+") as file:
        file.truncate(8 + header_bytes(model / WEIGHTS))
    assert isinstance(refused(train_settings(model, rows, tmp_path / "run"), cache), ModelError)


def test_space_for_the_checkpoints_is_checked_before_work(
    model: Path, rows: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert isinstance(refused(train_settings(model, rows, tmp_path / "run"), cache), DiskSpaceError)


def test_a_cache_that_can_not_be_made_is_found_before_work(
    model: Path, rows: Path, cache: Path, tmp_path: Path
) -> None:
    cache.write_text("a file in the way")
    error = refused(train_settings(model, rows, tmp_path / "run"), cache)
    assert isinstance(error, DataError)
    assert "QLORA_CACHE" in str(error.hint)


def test_a_download_that_does_not_fit_is_reported_with_other_problems_before_work(
    run_qlora: RunQlora, hub: Hub, hub_env: dict[str, str], rows: Path, cache: Path, tmp_path: Path
) -> None:
    hub.claimed_bytes[WEIGHTS] = shutil.disk_usage(tmp_path).free + 1024**3
    flags = ("--model", "owner/tiny", "--dataset", rows, "--target-modules", "nothing", "--device", "cpu")
    done = run_qlora("train", *flags, "--output", tmp_path / "run", env=hub_env)
    assert done.code == 2
    assert "--target-modules: target module 'nothing' matches no linear layer" in done.stderr
    assert "--model: downloading owner/tiny takes" in done.stderr
    assert hub.sent_from(WEIGHTS) == []
    assert not list(cache.rglob("*.arrow"))


def test_held_out_data_on_the_hub_is_checked_before_training_data_is_tokenized(
    run_qlora: RunQlora, hub: Hub, hub_env: dict[str, str], model: Path, rows: Path, cache: Path, tmp_path: Path
) -> None:
    hub.repos["owner/rows"] = Repo(commits={COMMIT: {"test.jsonl": b'{"ask": "a", "say": "b"}\n'}})
    flags = ("--model", model, "--dataset", rows, "--eval-dataset", "owner/rows", "--device", "cpu")
    done = run_qlora("train", *flags, "--output", tmp_path / "run", env=hub_env)
    assert done.code == 2, done.stderr
    assert "the columns of owner/rows fit no known format: ask, say" in done.stderr
    assert not list(cache.rglob("tokens.arrow"))
