"""A run whose sharded base is kept in host memory is that of one process.

The processes are forked and compute on the CPU, where a shard is in host memory in any case: what is shown is that
`fully_shard` is asked to keep it there, and that all is computed by what it takes from there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qlora_cli.merging.merge_run import merge
from qlora_cli.ranks.group import ProcessGroup
from qlora_cli.settings.choices import Device
from qlora_cli.training.sharding import sharded_base
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, short_settings, train_settings
from tests.integration.training.test_ranks import UNEVEN, all_done, distance, first_dies_after_step_2
from tests.integration.training.test_sharding import Watching, check_same_run
from tests.support.processes.rank_processes import run_ranks
from tests.support.runs.merge_command import merge_settings

pytestmark = pytest.mark.usefixtures("one_thread")

OFFLOADED: dict[str, object] = {"training__num_gpus": 2, "training__offload_base": True}


@dataclass(frozen=True)
class Offloading:
    """Counts the units that are kept on the host; `spoils` inverts bits in what the second process keeps there."""

    folder: Path
    spoils: bool = False

    def __call__(self, group: ProcessGroup) -> Recorder:
        kept = list[bool]()

        def noting(module: Any, **named: Any) -> object:
            policy = named.get("offload_policy")
            kept.append(isinstance(policy, CPUOffloadPolicy) and not policy.pin_memory)
            self.folder.mkdir(exist_ok=True)
            (self.folder / f"{group.rank}").write_text(str(sum(kept)), encoding="utf-8")
            return fully_shard(module, **named)

        put = sharded_base._Part.put

        def spoiling(part: sharded_base._Part) -> None:
            put(part)
            weight = getattr(part.module, part.name)
            assert isinstance(weight, DTensor)
            if self.spoils and group.rank == 1 and weight.dtype == torch.uint8:
                with torch.no_grad():
                    weight.to_local()[:16] ^= 0x11

        setattr(sharded_base, "fully_shard", noting)  # noqa: B010 - in a process of its own
        setattr(sharded_base._Part, "put", spoiling)  # noqa: B010
        return Recorder()

    def num_kept(self) -> list[int]:
        return [int((self.folder / str(rank)).read_text()) for rank in range(2)]


def test_a_base_in_host_memory_trains_the_adapter_of_one_process(base_model: Path, rows: Path, tmp_path: Path) -> None:
    one, run, watching = tmp_path / "one", tmp_path / "run", Offloading(tmp_path / "kept")
    train(train_settings(base_model, rows, one, **UNEVEN), Recorder())
    settings = train_settings(base_model, rows, run, **UNEVEN, **OFFLOADED)
    all_done(run_ranks(settings, tmp_path / "ranks", watching), 2)
    check_same_run(run, one)
    assert watching.num_kept() == [4, 4], "two layers, the embedding and the head"


def test_a_shard_in_host_memory_that_is_damaged_would_give_another_adapter(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    one, run = tmp_path / "one", tmp_path / "run"
    train(short_settings(base_model, rows, one), Recorder())
    settings = short_settings(base_model, rows, run, **OFFLOADED)
    all_done(run_ranks(settings, tmp_path / "ranks", Offloading(tmp_path / "kept", spoils=True)), 2)
    assert distance(run, one) > 1e-3


def test_a_process_holds_a_part_of_an_unquantized_base_on_the_host(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    one, run, watching = tmp_path / "one", tmp_path / "run", Watching(tmp_path / "held")
    changed: dict[str, object] = {"quantization__method": "none", "training__gradient_checkpointing": "on"}
    train(short_settings(base_model, rows, one, **changed), Recorder())
    settings = short_settings(base_model, rows, run, **changed, **OFFLOADED, training__strategy="fsdp")
    all_done(run_ranks(settings, tmp_path / "ranks", watching), 2)
    check_same_run(run, one)
    assert all(held["held"] < 0.51 * held["whole"] for held in watching.held(2))


def test_a_run_with_its_base_in_host_memory_resumes_on_one_process_and_merges(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    one, run = tmp_path / "one", tmp_path / "run"
    changed = {**UNEVEN, "training__save_steps": 1}
    train(train_settings(base_model, rows, one, **changed), Recorder())
    run_ranks(train_settings(base_model, rows, run, **changed, **OFFLOADED), tmp_path / "two", first_dies_after_step_2)
    assert not (run / "adapter").exists()
    train(train_settings(base_model, rows, run, **changed), Recorder())
    assert distance(run, one) < 1e-5
    verified = merge(merge_settings(run, output=tmp_path / "merged", device=Device.CPU), Recorder())
    assert verified.verification is not None
