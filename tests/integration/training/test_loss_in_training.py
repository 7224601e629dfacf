"""The loss in TRL's trainer: its value, its gradients and TRL's metrics are those of TRL's own loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer

from qlora_cli.errors import ModelError
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.training.callbacks.stop import StopSignal
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.session import Session
from qlora_cli.training.trainer import QloraTrainer
from tests.conftest import Recorder, train_settings
from tests.support.models.loading import save_model

pytestmark = pytest.mark.usefixtures("one_thread")

# Families, and settings; experts have a loss of their own, and a loss on all tokens is that of plain text.
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("llama", {}),
    "packed": ("llama", {"data__packing": True, "data__max_length": 512}),
    "all messages": ("llama", {"data__loss_on": "all"}),
    "soft cap": ("gemma2", {}),
    "experts": ("qwen3_moe", {}),
    "bf16": ("llama", {"model__dtype": "bf16"}),
    "whole head": ("llama", {"lora__modules_to_save": "lm_head"}),
    "new tokens": ("llama", {"model__new_tokens": "<one>,<two>"}),
    "dft": ("llama", {"training__loss": "dft"}),
    "dft of experts": ("qwen3_moe", {"training__loss": "dft"}),
    "dft in bf16": ("gemma2", {"training__loss": "dft", "model__dtype": "bf16"}),
}

ADDED = ("trained_positions", "trained_targets", "num_tokens")


def trainer_of(model: Path, rows: Path, output: Path, **flags: object) -> QloraTrainer:
    """Return the trainer of a run before its first step."""
    prepared = prepare_run(train_settings(model, rows, output, **flags), Recorder())
    directory = RunDirectory(output)
    directory.create()
    trainer = Session(prepared, directory, Recorder(), StopSignal(Recorder())).trainer
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def as_trls(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch as TRL's collator makes it."""
    return {name: value for name, value in batch.items() if name not in ADDED}


def step(trainer: QloraTrainer, *, by_trl: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
    """Return loss, gradients and metrics of a micro-batch of a step with 50 trained tokens."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.model.zero_grad()
    num_items = torch.tensor(50)
    torch.manual_seed(0)
    if by_trl:
        head: Any = trainer.model.get_base_model().get_output_embeddings()
        head.bias = getattr(head, "bias", None)  # PEFT's wrapper of a head with trained rows lacks it
        with trainer.accelerator.autocast():
            loss = SFTTrainer.compute_loss(trainer, trainer.model, as_trls(batch), num_items_in_batch=num_items)
    else:
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
    loss.backward()
    if not by_trl:
        trainer.on_grad_norm(trainer.model, torch.zeros(()))  # which reads the metrics
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradients, metrics


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics_are_trls(case: str, rows: Path, tmp_path: Path) -> None:
    family, flags = CASES[case]
    trainer = trainer_of(
        save_model(tmp_path / "model", family, max_position_embeddings=512), rows, tmp_path / "run", **flags
    )
    loss, gradients, metrics = step(trainer, by_trl=False)
    expected_loss, expected_gradients, expected = step(trainer, by_trl=True)
    lower = flags.get("model__dtype") == "bf16"
    if trainer.args.loss_type == "dft":  # which is TRL's loss; ours has the gradient of that, and the value of nll
        del expected["dft_loss"]  # of the step before
        balance = trainer.router_aux_loss_coef * metrics.get("aux_loss", 0.0) if family == "qwen3_moe" else 0.0
        assert metrics.pop("dft_loss") + balance == pytest.approx(float(expected_loss), rel=1e-3 if lower else 1e-6)
        assert loss > 10 * expected_loss
        trainer.args.loss_type = "nll"
        expected_loss = step(trainer, by_trl=True)[0]
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3 if lower else 1e-6, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        exact = expected_gradients[name]
        error = (gradient - exact).norm()
        assert error <= (2e-2 if lower else 1e-5) * exact.norm(), name
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    names = {"entropy", "mean_token_accuracy", "num_tokens"}
    assert metrics.keys() == expected.keys() == (names | {"aux_loss"} if family == "qwen3_moe" else names)
    tokens = metrics.pop("num_tokens")  # counted twice by now
    assert expected.pop("num_tokens") == 2 * tokens
    assert metrics == pytest.approx(expected, rel=1e-3 if lower else 1e-5)


def test_an_evaluation_has_trls_loss_and_makes_no_gradient(base_model: Path, rows: Path, tmp_path: Path) -> None:
    trainer = trainer_of(base_model, rows, tmp_path / "run")
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    loss, _, _ = trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=True)
    with torch.no_grad():
        expected = SFTTrainer.compute_loss(trainer, trainer.model, as_trls(batch))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_a_micro_batch_without_a_trained_token_changes_nothing(base_model: Path, rows: Path, tmp_path: Path) -> None:
    trainer = trainer_of(base_model, rows, tmp_path / "run")
    rows_of: Any = trainer.train_dataset
    row = dict(rows_of[0])
    collate: Any = trainer.data_collator
    batch = collate([{**row, "labels": [-100] * len(row["labels"])}])
    loss: Any = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(50))
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in trainer.model.parameters() if p.grad is not None)


def test_a_model_with_unknown_logits_is_refused_before_it_is_trained(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_cli.loss.output_head.SOFT_CAPS", ())
    changes: dict[str, Any] = {"final_logit_softcapping": 0.01}
    model = save_model(tmp_path / "model", "gemma2", **changes)
    with pytest.raises(ModelError, match="Gemma2ForCausalLM are not those of its output head"):
        trainer_of(model, rows, tmp_path / "run")
