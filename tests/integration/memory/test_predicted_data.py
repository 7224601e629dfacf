"""`inspect-memory --dataset`: the rows, steps and micro-batches are those that `train` makes of the same data."""

import json
from collections import Counter
from pathlib import Path

import pytest

from qlora_cli.cli.commands.predicted_data import with_rows
from qlora_cli.errors import DataError, ModelError, ModelNotFoundError
from qlora_cli.memory.request import MemoryRequest
from qlora_cli.memory.run_batches import FedRows, ReadRows
from qlora_cli.settings.models import InspectMemoryOfDataSettings, TrainingSettings
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from tests.conftest import ASSETS, Recorder, RunQlora, write_jsonl

CHECKPOINTS = ["--set", "output.max_checkpoints=5"]
AS_IN_THE_PLAN = (
    *("num_train_rows", "num_packed_rows", "num_eval_rows", "num_train_tokens", "longest_row_tokens"),
    *("num_truncated_rows", "padding_share"),
)


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:70]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "flags",
    [
        ["--micro-batch-size", "3", "--eval-split", "7", "--sampling", "group_by_length", "--epochs", "1.5"],
        ["--packing", "--max-length", "128", "--loss-on", "all"],
        ["--micro-batch-tokens", "300", "--drop-duplicates", "--max-length", "48", "--accept-lost", *CHECKPOINTS],
    ],
    ids=["padded", "packed", "filled"],
)
def test_what_is_read_is_what_train_would_feed(
    flags: list[str], many_rows: Path, run_qlora: RunQlora, tmp_path: Path
) -> None:
    data, model = ["--dataset", str(many_rows), *flags], str(ASSETS / "base")
    planned = run_qlora("train", "--model", model, *data, "--output", tmp_path / "run", "--dry-run", "--json")
    assert planned.code == 0, planned.stderr
    predicted = run_qlora("inspect-memory", model, *data, "--gpu", "RTX 4090", "--price", "2", "--json")
    assert predicted.code == 0, predicted.stderr
    read, plan = predicted.json["data"], planned.json
    assert {key: read[key] for key in AS_IN_THE_PLAN} == {key: plan[key] for key in AS_IN_THE_PLAN}
    figures = predicted.json["predicted"]
    assert figures["num_steps"] == plan["num_steps"]
    assert (figures["disk_bytes"], figures["download_bytes"]) == (plan["disk_bytes"], 0)
    assert 0 < figures["run_seconds_low"] < figures["run_seconds"] < figures["run_seconds_high"]
    assert figures["cost"] == pytest.approx(2 * figures["run_seconds"] / 3600)
    num_checkpoints = 5 if CHECKPOINTS[-1] in flags else 2
    assert f"the disk holds {num_checkpoints} checkpoints and the one being written" in predicted.json["assumptions"]
    if plan["num_packed_rows"] is None:
        assert predicted.json["settings"]["max-length"] == str(plan["longest_row_tokens"])


def asked(rows: Path, *, model: Path | str = ASSETS / "base", **more: str) -> Resolved[InspectMemoryOfDataSettings]:
    flags = {"model.name": str(model), "data.dataset": [str(rows)]}
    flags |= {path.replace("__", "."): value for path, value in more.items()}
    return resolve(Sources(flags={path: (path, value) for path, value in flags.items()}), InspectMemoryOfDataSettings)


def read(rows: Path, *, model: Path | str = ASSETS / "base", **more: str) -> tuple[ReadRows, FedRows]:
    """Return the rows as they are read, and as a run with these settings feeds them."""
    request = with_rows(MemoryRequest(asked=asked(rows, model=model, **more)), Recorder())
    assert request.rows is not None
    return request.rows, request.rows.feed(request.asked.settings.training)


def test_the_longest_row_is_that_of_all_data_even_of_held_out_rows(tmp_path: Path) -> None:
    short = [{"prompt": f"{number}", "completion": "yes"} for number in range(8)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "a", "completion": "word " * 60}])
    rows = write_jsonl(tmp_path / "rows.jsonl", short)
    (alone, trained), (evaluated, both) = read(rows), read(rows, data__eval_dataset=str(held_out))
    assert evaluated.longest_tokens > 60 > alone.longest_tokens
    assert both.summary.longest_row_tokens == trained.summary.longest_row_tokens == alone.longest_tokens
    assert both.summary.num_eval_rows == 1
    assert evaluated.digest != alone.digest


@pytest.mark.parametrize(
    "change", [{"training__seed": "1"}, {"training__sampling": "sequential"}, {"data__max_length": "70"}]
)
def test_what_decides_the_micro_batches_is_part_of_the_key(many_rows: Path, change: dict[str, str]) -> None:
    assert read(many_rows, **change)[0].digest != read(many_rows)[0].digest == read(many_rows)[0].digest


def test_a_longer_run_has_the_micro_batches_of_more_epochs(many_rows: Path) -> None:
    one, two = (read(many_rows, training__epochs=epochs, training__micro_batch_size="4")[1] for epochs in ("1", "2"))
    once, twice = (Counter(dict(each.batches.by_tokens)) for each in (one, two))
    assert twice.total() == 2 * once.total() == two.summary.num_micro_batches
    assert twice != Counter({tokens: 2 * number for tokens, number in once.items()})  # another order of the rows


def test_what_train_refuses_is_refused(many_rows: Path) -> None:
    with pytest.raises(DataError, match="of the tokens to train are lost"):
        read(many_rows, data__max_length="48")


@pytest.mark.parametrize("kind", ["catalogue", "config"])
def test_without_a_tokenizer_it_says_what_to_give_instead(kind: str, many_rows: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((ASSETS / "base" / "config.json").read_text())
    model = "llama-3.1-8b" if kind == "catalogue" else tmp_path
    with pytest.raises((ModelError, ModelNotFoundError), match="needs the model's tokenizer: ") as caught:
        read(many_rows, model=model)
    assert "leave --dataset out, and give --rows N and --mean-tokens T" in (caught.value.hint or "")


def test_the_settings_of_a_run_decide_how_data_is_read(many_rows: Path, run_qlora: RunQlora, tmp_path: Path) -> None:
    flags = ["--max-length", "128", "--packing", "--max-steps", "1", "--set", "training.gradient_accumulation_steps=1"]
    trained = run_qlora(
        *("train", "--model", ASSETS / "base", "--dataset", many_rows, "--output", tmp_path / "run", *flags, "--json")
    )
    assert trained.code == 0, trained.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    rows, _ = read(many_rows, model=tmp_path / "run")
    fed = rows.feed(TrainingSettings(max_steps=1))
    assert fed.summary.num_packed_rows == record["plan"]["num_packed_rows"]
    assert rows.longest_tokens <= 128
    assert fed.batches.num_steps == 1


def test_rows_are_divided_as_train_plans_it_on_the_gpu(run_qlora: RunQlora, tmp_path: Path) -> None:
    short = [{"prompt": f"{number}", "completion": "yes"} for number in range(40)]
    rows = write_jsonl(tmp_path / "rows.jsonl", [*short, {"prompt": "a", "completion": "word " * 60}])
    question = ["inspect-memory", ASSETS / "base", "--dataset", rows, "--gpu", "RTX 4090", "--json"]
    planned, alone = run_qlora(*question).json, run_qlora(*question, "--micro-batch-size", "1").json
    tokens = planned["plan"]["chosen"]["micro_batch_tokens"]
    assert tokens is not None
    assert planned["settings"]["micro-batch-tokens"] == str(tokens)
    assert alone["plan"]["chosen"]["micro_batch_tokens"] is None
    assert planned["data"]["num_micro_batches"] < alone["data"]["num_micro_batches"] / 2
    assert planned["predicted"]["run_seconds"] < alone["predicted"]["run_seconds"] / 2
    assert planned["predicted"]["num_steps"] == alone["predicted"]["num_steps"]
