"""Pairs are shared out among processes as other rows are, and train the adapter of one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.events import StepDone
from qlora_cli.ranks.group import ProcessGroup
from qlora_cli.ranks.weight_gather import WeightGather
from qlora_cli.training import batches, trainer
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, RunQlora, train_settings
from tests.integration.training.test_preferences import PAIRS, SETTINGS, write_pairs
from tests.integration.training.test_ranks import all_done, distance
from tests.support.processes.rank_processes import run_ranks

# Three pairs a step: of two processes, one has two, and the other one and, of a sharded base, a blank.
UNEVEN: dict[str, object] = {
    **SETTINGS,
    "quantization__method": "nf4",
    "data__eval_split": "2",
    "training__micro_batch_size": 1,
    "training__gradient_accumulation_steps": 3,
    "training__eval_steps": 3,
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS[:5])


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
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_two_processes_train_the_adapter_of_one_on_pairs(
    run_qlora: RunQlora, base_model: Path, pairs: Path, tmp_path: Path, objective: str, strategy: str
) -> None:
    changed = {**UNEVEN, "training__objective": objective}
    if (objective, strategy) == ("orpo", "ddp"):
        changed["training__micro_batch_tokens"] = 90
    train(train_settings(base_model, pairs, tmp_path / "one", **changed), Recorder())
    changed |= {"training__num_gpus": 2, "training__strategy": strategy}
    counting = Counting(tmp_path / "ranks")
    all_done(
        run_ranks(train_settings(base_model, pairs, tmp_path / "two", **changed), tmp_path / "ranks", counting), 2
    )
    assert distance(tmp_path / "two", tmp_path / "one") < 1e-5
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


def test_a_blank_that_counted_would_give_another_adapter(base_model: Path, pairs: Path, tmp_path: Path) -> None:
    changed = {**UNEVEN, "training__objective": "orpo"}
    train(train_settings(base_model, pairs, tmp_path / "one", **changed), Recorder())
    changed |= {"training__num_gpus": 2, "training__strategy": "fsdp"}
    settings = train_settings(base_model, pairs, tmp_path / "two", **changed)
    all_done(run_ranks(settings, tmp_path / "ranks", with_blanks_that_count), 2)
    assert distance(tmp_path / "two", tmp_path / "one") > 1e-3


def with_blanks_that_count(group: ProcessGroup) -> Recorder:  # noqa: ARG001 - a fault has this signature
    def counting(batch: batches.Batch) -> list[batches.Batch]:
        return [{**blank, batches.IS_BLANK: False} for blank in batches.blanks_of(batch)]

    setattr(trainer, "blanks_of", counting)  # noqa: B010 - in a process of its own
    return Recorder()
