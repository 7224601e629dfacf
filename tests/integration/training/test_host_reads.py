"""How often the host reads from the device, which it waits for then: once in a step."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map
from transformers import TrainerCallback

from qlora_cli.training.trainer import QloraTrainer
from tests.integration.training.test_loss_in_training import trainer_of
from tests.support.runs.host_reads import HostReads

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_STEPS, NUM_MICRO_BATCHES = 4, 3
STEPS: dict[str, object] = {
    "training__max_steps": NUM_STEPS,
    "training__gradient_accumulation_steps": NUM_MICRO_BATCHES,
    "training__micro_batch_size": 1,
}
READ = "loss_model.read"


class CountSteps(TrainerCallback):
    """Counts the reads of each step from its first micro-batch to the next step's, with its report."""

    def __init__(self, reads: HostReads) -> None:
        self._reads = reads
        self.steps: list[Counter[str]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._end()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._end()

    def _end(self) -> None:
        self.steps.append(Counter(self._reads.counts))
        self._reads.counts.clear()


def moved(batches: Any) -> Any:
    """Return the batches as if they had been copied to another device; what is not a tensor stays on the host."""
    return tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, batches)


def watched(trainer: QloraTrainer, monkeypatch: pytest.MonkeyPatch) -> HostReads:
    """Return the reads of what would be on a GPU: weights, buffers, and batches once the loader has moved them."""
    reads = HostReads()
    reads.mark([*trainer.model.parameters(), *trainer.model.buffers()])
    draw, predict = trainer.get_batch_samples, trainer.prediction_step

    def marked_batches(*args: Any, **kwargs: Any) -> Any:
        batches, num_tokens = draw(*args, **kwargs)
        batches = moved(batches)
        reads.mark((batches, num_tokens))
        return batches, num_tokens

    def marked_evaluation(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = moved(inputs)
        reads.mark(inputs)
        return predict(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "get_batch_samples", marked_batches)
    monkeypatch.setattr(trainer, "prediction_step", marked_evaluation)
    return reads


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"training__micro_batch_size": 2},
        {"training__micro_batch_size": 2, "model__attention": "eager"},
        {"data__packing": True, "data__max_length": 64, "data__on_long": "truncate", "data__accept_lost": True},
        {"training__logging_steps": 2},
        {"training__neftune_noise_alpha": 5.0, "lora__dropout": 0.1, "training__loss": "dft"},
    ],
    ids=["one row", "padded", "padded with scores", "packed", "reported every second step", "noise"],
)
def test_a_step_reads_once_from_the_device(
    flags: dict[str, object],
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = trainer_of(base_model, rows, tmp_path / "run", **{**STEPS, **flags})
    reads = watched(trainer, monkeypatch)
    steps = CountSteps(reads)
    trainer.add_callback(steps)
    with reads.counted():
        trainer.train()
    assert len(steps.steps) == NUM_STEPS + 1
    for step in steps.steps[1:]:  # the first are of what came before
        assert step == {READ: 1}


def test_a_step_with_filled_micro_batches_reads_once(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, object] = {**STEPS, "training__micro_batch_tokens": 8}  # each row alone
    trainer = trainer_of(base_model, rows, tmp_path / "run", **flags)
    reads = watched(trainer, monkeypatch)
    steps = CountSteps(reads)
    trainer.add_callback(steps)
    with reads.counted():
        trainer.train()
    for step in steps.steps[1:]:
        assert step == {READ: 1}


def test_a_read_of_a_micro_batch_would_be_counted(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(base_model, rows, tmp_path / "run", **STEPS)
    reads = watched(trainer, monkeypatch)
    step_of_trainer = trainer.training_step

    def reading(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step_of_trainer(*args, **kwargs)
        assert bool(trainer._recorder.losses[-1].isfinite())
        return loss

    monkeypatch.setattr(trainer, "training_step", reading)
    steps = CountSteps(reads)
    trainer.add_callback(steps)
    with reads.counted():
        trainer.train()
    assert all(step["test_host_reads.reading"] == NUM_MICRO_BATCHES for step in steps.steps[1:])


@pytest.mark.parametrize(
    "read",
    [
        lambda values: values.sum().item(),
        lambda values: bool((values > 0).all()),
        lambda values: values[values > 0],
        lambda values: values.masked_select(values > 0),
        lambda values: (values > 0).nonzero(),
        lambda values: torch.equal(values, values + 1),
        lambda values: values.tolist(),
        lambda values: values.detach().cpu(),
        lambda values: values.detach().numpy(),
        lambda values: torch.zeros(3).add_(values).sum().item(),
        lambda values: values.index_put_((values > 0,), torch.tensor(2.0)),
    ],
)
def test_each_kind_of_read_is_counted_and_none_of_what_is_on_the_host(read: Any) -> None:
    reads = HostReads()
    values = torch.tensor([-1.0, 0.0, 1.0])
    with reads.counted():
        read(values.clone())
        assert not reads.counts
        reads.mark(values)
        read(values)
    assert reads.counts.total() == 1


def test_an_evaluation_reads_once(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(base_model, rows, tmp_path / "run", **STEPS, data__eval_split="5")
    reads = watched(trainer, monkeypatch)
    with reads.counted():
        metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    # The losses are moved to the host, and made an array there; their sum is read once, at the end.
    assert reads.counts == {READ: 1, "trainer_pt_utils.nested_numpify": 2, "shared_step.end": 1}
