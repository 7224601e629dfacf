"""Rows that are compared are shared out among processes as others are, and train the adapter of one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.events import StepDone
from qlora_cli.ranks.group import ALONE, ProcessGroup
from qlora_cli.ranks.weight_gather import WeightGather
from qlora_cli.training import batches, trainer
from qlora_cli.training.preferences.label_model import LabelModel
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, RunQlora, train_settings, write_jsonl
from tests.integration.training.test_labelled_answers import LABELLED
from tests.integration.training.test_preferences import PAIRS, SETTINGS, write_pairs
from tests.integration.training.test_ranks import all_done, distance
from tests.support.processes.rank_processes import Fault, run_ranks

TOLERANCE = 1e-5  # of the adapter, relative
# Three rows a step: of two processes, one has two, and the other one and, of a sharded base, a blank.
UNEVEN: dict[str, object] = {
    **SETTINGS,
    "quantization__method": "nf4",
    "data__eval_split": "2",
    "training__micro_batch_size": 1,
    "training__gradient_accumulation_steps": 3,
    "training__eval_steps": 3,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows by objective."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = write_pairs(folder / "pairs.jsonl", PAIRS[:5])
    return {"dpo": pairs, "orpo": pairs, "kto": write_jsonl(folder / "labels.jsonl", LABELLED)}


def events_of(run: Path) -> list[dict[str, Any]]:
    """Return losses and rewards by step, and the held-out ones."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        {
            "loss": line.get("loss", line.get("eval_loss")),
            **{k: v for k, v in line["rewards"].items() if v is not None},
        }
        for line in lines
        if line.get("rewards") is not None
    ]


@dataclass(frozen=True)
class Counting:
    """Notes how many bytes a process has received of weights when each step is done."""

    folder: Path

    def __call__(self, group: ProcessGroup) -> Recorder:
        received, original = [0], WeightGather.__call__

        def counted(self: WeightGather, output_tensor: torch.Tensor, input_tensor: torch.Tensor, **more: Any) -> Any:
            received[0] += output_tensor.nbytes - input_tensor.nbytes
            return original(self, output_tensor, input_tensor, **more)

        class Noting(Recorder):
            def report(this, event: Any) -> None:  # noqa: N805
                super().report(event)
                if isinstance(event, StepDone):
                    with (self.folder / f"received-{group.rank}").open("a", encoding="utf-8") as file:
                        file.write(f"{received[0]}\n")

        setattr(WeightGather, "__call__", counted)  # noqa: B010 - in a process of its own
        return Noting()

    def of_second_step(self, rank: int) -> int:
        first, second, *_ = map(int, (self.folder / f"received-{rank}").read_text(encoding="utf-8").split())
        return second - first


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_two_processes_train_the_adapter_of_one(
    run_qlora: RunQlora, base_model: Path, files: dict[str, Path], tmp_path: Path, objective: str, strategy: str
) -> None:
    changed, rows = {**UNEVEN, "training__objective": objective}, files[objective]
    if (objective, strategy) == ("orpo", "ddp"):
        changed["training__micro_batch_tokens"] = 90
    train(train_settings(base_model, rows, tmp_path / "one", **changed), Recorder())
    changed |= {"training__num_gpus": 2, "training__strategy": strategy}
    counting = Counting(tmp_path / "ranks")
    all_done(run_ranks(train_settings(base_model, rows, tmp_path / "two", **changed), tmp_path / "ranks", counting), 2)
    assert distance(tmp_path / "two", tmp_path / "one") < TOLERANCE
    alone, shared = events_of(tmp_path / "one"), events_of(tmp_path / "two")
    assert len(alone) == len(shared) == 4  # three steps and an evaluation
    for mine, its in zip(shared, alone, strict=True):
        assert mine == pytest.approx(its, rel=1e-4, abs=1e-5)
    if strategy == "fsdp":
        words = ["--objective", objective, "--num-gpus", "2", "--strategy", "fsdp", "--micro-batch-size", "1"]
        words += ["--gradient-accumulation-steps", "3", "--rank", "4", "--target-modules", "q_proj,down_proj"]
        asked = run_qlora("inspect-memory", str(base_model), *words, "--dtype", "fp32", "--max-length", "64", "--json")
        assert asked.code == 0, asked.stderr
        predicted = asked.json["sharding"]["received_bytes_per_step"]
        assert [counting.of_second_step(rank) for rank in range(2)] == [predicted] * 2


def with_blanks_that_count(group: ProcessGroup) -> Recorder:  # noqa: ARG001 - a fault has this signature
    def counting(batch: batches.Batch) -> list[batches.Batch]:
        return [{**blank, batches.IS_BLANK: False} for blank in batches.blanks_of(batch)]

    setattr(trainer, "blanks_of", counting)  # noqa: B010 - in a process of its own
    return Recorder()


def with_baselines_of_their_own(group: ProcessGroup) -> Recorder:  # noqa: ARG001
    original = LabelModel.begin_step

    def alone(self: LabelModel, mismatched: Sequence[dict[str, Any]], num_rows: int, group: ProcessGroup) -> None:  # noqa: ARG001
        original(self, mismatched, num_rows, ALONE)

    setattr(LabelModel, "begin_step", alone)  # noqa: B010
    return Recorder()


@pytest.mark.parametrize(
    ("objective", "strategy", "fault"),
    [("orpo", "fsdp", with_blanks_that_count), ("kto", "ddp", with_baselines_of_their_own)],
)
def test_a_blank_that_counted_or_a_baseline_that_is_not_shared_would_give_another_adapter(
    base_model: Path, files: dict[str, Path], tmp_path: Path, objective: str, strategy: str, fault: Fault
) -> None:
    changed = {**UNEVEN, "training__objective": objective}
    train(train_settings(base_model, files[objective], tmp_path / "one", **changed), Recorder())
    changed |= {"training__num_gpus": 2, "training__strategy": strategy}
    settings = train_settings(base_model, files[objective], tmp_path / "two", **changed)
    all_done(run_ranks(settings, tmp_path / "ranks", fault), 2)
    assert distance(tmp_path / "two", tmp_path / "one") > 10 * TOLERANCE
