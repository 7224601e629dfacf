"""A run whose base is sharded is that of one process, and no process holds all of the base.

The processes are forked, compute on the CPU and speak over gloo.
"""

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_cli.loading.loader import load_model
from qlora_cli.loading.save import save_quantized
from qlora_cli.merging.merge_run import merge
from qlora_cli.ranks.group import ProcessGroup
from qlora_cli.settings.choices import Device
from qlora_cli.training import run_plan
from qlora_cli.training.sharding.sharded_base import shard_base
from qlora_cli.training.train_run import train
from qlora_cli.training.trainer import QloraTrainer
from tests.conftest import Recorder, RunQlora, short_settings, train_settings
from tests.integration.training.test_ranks import (
    DROPPING,
    UNEVEN,
    InterruptAt,
    all_done,
    distance,
    first_dies_after_step_2,
    first_dies_after_step_4,
)
from tests.support.models.experts import save_moe
from tests.support.models.loading import load_settings, save_model
from tests.support.processes.killed_runs import assert_same, metrics_of
from tests.support.processes.rank_processes import run_ranks
from tests.support.runs.merge_command import merge_settings

pytestmark = pytest.mark.usefixtures("one_thread")

SHARDED: dict[str, object] = {"training__num_gpus": 2, "training__strategy": "fsdp"}


def bytes_of_layers(model: PeftModel) -> int:
    """Return the bytes of the layers' frozen weights that this process holds."""
    in_layers = re.compile(r"\.(layers|h)\.")  # the second in GPT-2
    frozen = (one for name, one in model.named_parameters() if in_layers.search(name) and not one.requires_grad)
    return sum((one.to_local() if isinstance(one, DTensor) else one).nbytes for one in frozen)


@dataclass(frozen=True)
class Watching:
    """Records what each process holds once its base is sharded; `spoils` inverts bits in one shard of the second."""

    folder: Path
    spoils: bool = False

    def __call__(self, group: ProcessGroup) -> Recorder:
        original = shard_base

        def watched(model: PeftModel, *arguments: Any) -> None:
            whole = bytes_of_layers(model)
            original(model, *arguments)
            sharded = [one for one in model.parameters() if isinstance(one, DTensor)]
            held = {"whole": whole, "held": bytes_of_layers(model), "num_sharded": len(sharded)}
            self.folder.mkdir(exist_ok=True)
            (self.folder / f"{group.rank}.json").write_text(json.dumps(held), encoding="utf-8")
            if self.spoils and group.rank == 1:
                with torch.no_grad():
                    shard = next(one.to_local() for one in sharded if one.dtype == torch.uint8)
                    shard[: len(shard) // 4] ^= 0x11

        setattr(run_plan, "shard_base", watched)  # noqa: B010 - in a process of its own
        return Recorder()

    def held(self, size: int) -> list[dict[str, int]]:
        return [json.loads((self.folder / f"{rank}.json").read_text()) for rank in range(size)]


def check_same_run(run: Path, other: Path) -> None:
    """Check that two runs have the same adapter and figures, but for rounding."""
    assert distance(run, other) < 1e-5
    steps, others = metrics_of(run), metrics_of(other)
    assert len(steps) == len(others) > 0
    for mine, its in zip(steps, others, strict=True):
        assert mine == pytest.approx(its, rel=1e-4)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_a_sharded_run_trains_the_adapter_of_one(
    base_model: Path, rows: Path, tmp_path: Path, num_processes: int
) -> None:
    one, run, watching = tmp_path / "one", tmp_path / "run", Watching(tmp_path / "held")
    train(train_settings(base_model, rows, one, **UNEVEN), Recorder())
    changed = {**UNEVEN, **SHARDED, "training__num_gpus": num_processes}
    all_done(run_ranks(train_settings(base_model, rows, run, **changed), tmp_path / "ranks", watching), num_processes)
    check_same_run(run, one)
    for held in watching.held(num_processes):
        assert held["num_sharded"] > 10
        assert held["held"] < 1.02 * held["whole"] / num_processes


def test_a_shard_that_is_damaged_would_give_another_adapter(base_model: Path, rows: Path, tmp_path: Path) -> None:
    one, run = tmp_path / "one", tmp_path / "run"
    train(short_settings(base_model, rows, one), Recorder())
    spoiling = Watching(tmp_path / "held", spoils=True)
    all_done(run_ranks(short_settings(base_model, rows, run, **SHARDED), tmp_path / "ranks", spoiling), 2)
    assert distance(run, one) > 1e-3


@pytest.mark.parametrize(
    "changed",
    [
        {"training__gradient_checkpointing": "on", "training__micro_batch_tokens": 200},
        {"training__gradient_checkpointing": "selective", "data__packing": True, "data__max_length": 192},
        {"quantization__method": "none", "training__fused_lora": False},
        {"quantization__method": "fp4", "quantization__double_quant": False, "training__fused_lora": False},
        {"lora__dropout": 0.0, "lora__use_rslora": True, "training__optimizer": "adamw_8bit"},
    ],
    ids=["recomputed, filled", "selective, packed", "not quantized", "FP4 as PEFT computes", "8-bit optimizer"],
)
def test_every_way_to_compute_is_the_same_sharded(
    base_model: Path, rows: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    one, run, watching = tmp_path / "one", tmp_path / "run", Watching(tmp_path / "held")
    changed = {"training__gradient_accumulation_steps": 3, "data__eval_split": "2", **changed}
    train(short_settings(base_model, rows, one, **changed), Recorder())
    all_done(run_ranks(short_settings(base_model, rows, run, **changed, **SHARDED), tmp_path / "ranks", watching), 2)
    check_same_run(run, one)
    assert all(held["held"] < 0.51 * held["whole"] for held in watching.held(2))


@pytest.mark.parametrize(
    ("save", "changed"),
    [
        (partial(save_moe, family="qwen3_moe"), {"lora__target_parameters": "all-experts"}),
        (partial(save_model, family="gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), {}),
        (save_model, {"model__new_tokens": "<a>,<b>", "model__resize_vocab": True}),
    ],
    ids=["experts", "Conv1D", "new rows of an untied vocabulary"],
)
def test_every_kind_of_model_is_the_same_sharded(
    rows: Path, tmp_path: Path, save: Callable[[Path], Path], changed: dict[str, object]
) -> None:
    model, one, run = save(tmp_path / "model"), tmp_path / "one", tmp_path / "run"
    watching = Watching(tmp_path / "held")
    changed = {"training__gradient_accumulation_steps": 3, **changed}
    train(train_settings(model, rows, one, **changed), Recorder())
    all_done(run_ranks(train_settings(model, rows, run, **changed, **SHARDED), tmp_path / "ranks", watching), 2)
    check_same_run(run, one)
    assert all(held["num_sharded"] > 0 and held["held"] < 0.55 * held["whole"] for held in watching.held(2))


def test_a_quantized_checkpoint_is_the_same_sharded(base_model: Path, rows: Path, tmp_path: Path) -> None:
    model, one, run = tmp_path / "model", tmp_path / "one", tmp_path / "run"
    save_quantized(load_model(load_settings(base_model)), model, Recorder())
    train(short_settings(model, rows, one), Recorder())
    watching = Watching(tmp_path / "held")
    all_done(run_ranks(short_settings(model, rows, run, **SHARDED), tmp_path / "ranks", watching), 2)
    check_same_run(run, one)
    assert all(held["held"] < 0.51 * held["whole"] for held in watching.held(2))


def test_a_sharded_run_is_evaluated_and_merged_as_that_of_one(
    base_model: Path, rows: Path, tmp_path: Path, run_qlora: RunQlora
) -> None:
    one, run = tmp_path / "one", tmp_path / "run"
    train(train_settings(base_model, rows, one, **UNEVEN), Recorder())
    all_done(run_ranks(train_settings(base_model, rows, run, **UNEVEN, **SHARDED), tmp_path / "ranks"), 2)
    losses = []
    for directory in (run, one):
        merged = run_qlora("merge", str(directory), "--device", "cpu")
        assert merged.code == 0, merged.stderr
        evaluated = run_qlora("evaluate", str(directory), "--dataset", str(rows), "--device", "cpu", "--json")
        assert evaluated.code == 0, evaluated.stderr
        losses.append({source["source"]: source["loss"] for source in evaluated.json["sources"]})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0].keys() == {"base", "adapter", "merged"}
    assert losses[0]["merged"] == pytest.approx(losses[0]["adapter"], rel=1e-3)
    assert losses[0]["adapter"] < 0.9 * losses[0]["base"]


def test_a_sharded_run_resumes_exactly(base_model: Path, rows: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    changed = {**DROPPING, **SHARDED, "training__sample_prompts": ["What is a list?"], "training__sample_tokens": 4}
    all_done(run_ranks(train_settings(base_model, rows, whole, **changed), tmp_path / "whole-ranks"), 2)
    settings = train_settings(base_model, rows, run, **changed)
    first, second = run_ranks(settings, tmp_path / "killed", first_dies_after_step_4)
    assert first.code == -signal.SIGKILL
    assert second.code == 1
    all_done(run_ranks(settings, tmp_path / "resumed"), 2)
    assert_same(run, whole)


def test_a_sharded_run_resumes_whole_and_on_another_number(base_model: Path, rows: Path, tmp_path: Path) -> None:
    one, run = tmp_path / "one", tmp_path / "run"
    changed = {**UNEVEN, "training__save_steps": 1}
    train(train_settings(base_model, rows, one, **changed), Recorder())
    three = train_settings(base_model, rows, run, **{**changed, **SHARDED, "training__num_gpus": 3})
    run_ranks(three, tmp_path / "three", first_dies_after_step_2)
    with pytest.raises(KeyboardInterrupt):
        train(train_settings(base_model, rows, run, **changed), InterruptAt(4))
    all_done(run_ranks(train_settings(base_model, rows, run, **changed, **SHARDED), tmp_path / "two"), 2)
    assert distance(run, one) < 1e-5
    verified = merge(merge_settings(run, output=tmp_path / "merged", device=Device.CPU), Recorder())
    assert verified.verification is not None


def raises() -> None:
    raise RuntimeError("the card fell off the bus")


def runs_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class FailingWithin:
    """Lets the second process fail within a layer, of step 3 or, `at_once`, when it is first tried.

    That is in a forward pass or, `backward`, in the backward pass of the last layer, while others wait for the weights
    of the one before.
    """

    fails: Callable[[], None]
    at_once: bool = False
    backward: bool = False

    def __call__(self, group: ProcessGroup) -> Recorder:
        if group.rank != 1:
            return Recorder()
        compute, steps = QloraTrainer.compute_loss, list[int]()

        def noting(trainer: QloraTrainer, *arguments: Any, **named: Any) -> torch.Tensor:
            steps.append(trainer.state.global_step)
            return compute(trainer, *arguments, **named)

        def failing(_: Any, __: Any, output: Any) -> None:
            if not steps or not (self.at_once or steps[-1] == 2):
                return
            if not self.backward:
                self.fails()
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(lambda _: self.fails())

        def sharded(model: PeftModel, *arguments: Any) -> None:
            shard_base(model, *arguments)
            layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
            layers[-1].register_forward_hook(failing)

        setattr(QloraTrainer, "compute_loss", noting)  # noqa: B010 - in a process of its own
        setattr(run_plan, "shard_base", sharded)  # noqa: B010
        return Recorder()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (FailingWithin(raises), "process 1 on .* failed: RuntimeError: the card fell off the bus"),
        (FailingWithin(runs_out), "process 1 on .* failed: cpu ran out of memory in the forward pass"),
        (FailingWithin(runs_out, backward=True), "process 1 on .* failed: cpu ran out of memory in the backward pass"),
        (FailingWithin(dies), "another process of this run ended without a word"),
        (FailingWithin(dies, backward=True), "another process of this run ended without a word"),
    ],
    ids=["raises", "runs out of memory", "runs out of memory backward", "dies", "dies backward"],
)
def test_a_failure_within_a_layer_of_one_process_ends_all_and_is_named(
    base_model: Path, rows: Path, tmp_path: Path, fault: FailingWithin, message: str
) -> None:
    run = tmp_path / "run"
    settings = short_settings(base_model, rows, run, **SHARDED, training__save_steps=1)
    first, second = run_ranks(settings, tmp_path / "ranks", fault)
    assert first.code == (3 if fault.fails is runs_out else 1)
    assert re.search(message, first.told["message"])
    assert "until step 2 is saved" in first.told["hint"]
    assert second.code not in (0, None)
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "failed"
    assert re.search(message, record["error"])
    assert record["error"].startswith("OutOfMemoryError") == (fault.fails is runs_out), "by which a resume plans"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_that_runs_out_before_the_first_step_ends_all(
    base_model: Path, rows: Path, tmp_path: Path, backward: bool
) -> None:
    settings = short_settings(base_model, rows, tmp_path / "run", **SHARDED)
    ended = run_ranks(settings, tmp_path / "ranks", FailingWithin(runs_out, at_once=True, backward=backward))
    assert [one.code for one in ended] == [3, 3]
    assert "process 1 on " in ended[0].told["message"]
