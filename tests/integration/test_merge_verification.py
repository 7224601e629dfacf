"""What verification finds, however little an adapter does; and a merged model that is not of the adapter any more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qlora_cli.cli.app import app
from qlora_cli.merging.changes import LowRank
from qlora_cli.merging.merger import Merger
from qlora_cli.merging.plan import PlannedTensor
from qlora_cli.merging.result import Action
from qlora_cli.merging.room import Room
from tests.conftest import write_jsonl
from tests.merge_command import copy_run, merged, qlora_merge, refused, trained_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gentle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt next to nothing: as a bound on all differences, 0.001 nats are far above what it does."""
    return trained_run(tmp_path_factory.mktemp("gentle"), training__learning_rate=2e-5)


def failed(run: Path, *arguments: str) -> str:
    """Merge, which must end with 1 and keep what it wrote; return the message."""
    done = qlora_merge(run, *arguments, "--device", "cpu", "--json")
    assert done.exit_code == 1, done.output
    assert (run / "merged-failed-verification" / "config.json").is_file()
    assert not (run / "merged").exists()
    message: str = json.loads(done.stdout)["error"]["message"]
    return message


def test_a_right_merge_of_it_passes_with_room_to_spare(gentle: Path, tmp_path: Path) -> None:
    found = merged(copy_run(gentle, tmp_path / "copy"))["verification"]
    assert found["passed"]
    assert 0 <= found["unrounded"]["mean_kl"] < found["max_unexplained"] / 100
    assert found["differing_parameters"] == []
    assert found["num_parameters"] == 39  # all tensors, one of which is embedding and head


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_an_update_of_another_scale_is_found(
    gentle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, base: str
) -> None:
    delta = LowRank.delta

    def scaled(self: LowRank, index: int | None = None, room: Room | None = None) -> torch.Tensor:
        return delta(self, index, room).mul_(factor)

    monkeypatch.setattr(LowRank, "delta", scaled)
    assert "rounding does not explain" in failed(copy_run(gentle, tmp_path / "copy"), "--base", base)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_tensor_that_was_not_merged_into_its_file_is_found(
    gentle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    value, forgotten = Merger.value, []

    def forgetful(self: Merger, planned: PlannedTensor) -> torch.Tensor:
        if planned.action == Action.MERGE and planned.name == f"model.layers.{layer}.mlp.down_proj.weight":
            forgotten.append(planned.name)
            return self._model.tensors[planned.name]
        return value(self, planned)

    monkeypatch.setattr(Merger, "value", forgetful)
    message = failed(copy_run(gentle, tmp_path / "copy"), "--base", "original")
    assert message == f"1 weight not in the files as merged, such as {forgotten[0]}"


def test_a_bound_below_what_rounding_does_fails(gentle: Path, tmp_path: Path) -> None:
    message = failed(copy_run(gentle, tmp_path / "copy"), "--base", "original", "--max-divergence", "1e-9")
    assert "more than 1e-09" in message


# ---- what changed afterwards


def told_by(*command: str | Path) -> str:
    """Run a command, which must succeed, and return what it says on stderr."""
    done = CliRunner().invoke(app, [*map(str, command), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    return done.stderr


def test_a_merged_model_of_another_adapter_is_told(gentle: Path, tmp_path: Path) -> None:
    run = copy_run(gentle, tmp_path / "copy")
    merged(run, "--base", "original", "--no-verify")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "What is a list?", "completion": "A sequence."}] * 2)
    commands: tuple[tuple[str | Path, ...], ...] = (
        ("generate", run, "--prompt", "What is a list?", "--compare", "--max-new-tokens", "4"),
        ("evaluate", run, "--dataset", rows),
    )
    for command in commands:
        assert "merge it anew" not in told_by(*command)
    record = run / "merged" / "merge.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    content["adapters"][0]["sha256"] = "0" * 64
    record.write_text(json.dumps(content), encoding="utf-8")
    for command in commands:
        assert f"{run / 'merged'} was merged from another adapter" in told_by(*command)


def test_the_base_of_every_run_is_looked_at(gentle: Path, tmp_path: Path) -> None:
    run = copy_run(gentle, tmp_path / "copy")
    other = run.with_name("other")
    other.mkdir()
    for path in run.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts:
            place = other / path.relative_to(run)
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(path.read_bytes())
    record = json.loads((other / "run.json").read_text(encoding="utf-8"))
    change: dict[str, dict[str, Any]] = {
        "other": {"base_model_digest": "0" * 64},
        "quantization": {"settings": {**record["settings"], "quantization": {"method": "none"}}},
    }
    (other / "run.json").write_text(json.dumps({**record, **change["other"]}), encoding="utf-8")
    assert "is not the base that" in refused(run, other, "--output", tmp_path / "out")
    (other / "run.json").write_text(json.dumps({**record, **change["quantization"]}), encoding="utf-8")
    assert "differ in quantization" in refused(run, other, "--output", tmp_path / "out")


def test_shards_in_a_folder_are_written_to_one(gentle: Path, tmp_path: Path) -> None:
    run = copy_run(gentle, tmp_path / "copy")
    base = run.parent / "base"
    (base / "weights").mkdir()
    (base / "model.safetensors").rename(base / "weights" / "one.safetensors")
    names = [tensor["name"] for tensor in _tensors(base / "weights" / "one.safetensors")]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "weights/one.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = merged(run, "--base", "original", "--base-model", base)
    assert found["verification"]["passed"]
    assert (run / "merged" / "weights" / "one.safetensors").is_file()


def _tensors(file: Path) -> list[dict[str, Any]]:
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return [{"name": name} for name in header if name != "__metadata__"]
