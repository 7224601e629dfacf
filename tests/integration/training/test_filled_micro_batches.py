"""Micro-batches filled with tokens: a step is the same as with one row at a time, resumes exactly, and is named."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qlora_cli.data.feeding.micro_batches import micro_batch_tokens
from qlora_cli.errors import OutOfMemoryError, SettingsError, TrainingError
from qlora_cli.events import EvalDone, Noted, Rehearsed, StepDone, StepSkipped
from qlora_cli.training.batches import Batches, micro_batches_of
from qlora_cli.training.run_plan import PreparedRun, prepare_run
from qlora_cli.training.train_run import run, train
from tests.conftest import Recorder, train_settings, write_jsonl
from tests.integration.training.test_loss_in_training import trainer_of
from tests.integration.training.test_training import gradients_of_first_step
from tests.integration.training.test_training_faults import messages
from tests.support.models.loading import save_model
from tests.support.processes.killed_runs import EXACT, Copier, assert_same, place_killed, stopped_at

pytestmark = pytest.mark.usefixtures("one_thread")

FILLED: dict[str, object] = {
    "training__micro_batch_size": 1,
    "training__gradient_accumulation_steps": 6,
    "training__micro_batch_tokens": 192,
}


def first_step(model: Path, rows: Path, output: Path, **flags: object) -> tuple[float, dict[str, torch.Tensor]]:
    changed = {**FILLED, "training__max_steps": 1, "training__max_grad_norm": 1e9, **flags}
    return gradients_of_first_step(prepare_run(train_settings(model, rows, output, **changed), Recorder()), output)


def largest_difference(gradients: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of the gradients of a parameter, relative to them."""
    assert gradients.keys() == others.keys()
    assert all(float(gradient.norm()) > 0 for name, gradient in gradients.items() if "lora_B" in name)
    return max(
        float((gradient - others[name]).norm() / gradient.norm())
        for name, gradient in gradients.items()
        if float(gradient.norm()) > 0
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "phi3"])
def test_a_step_is_that_of_one_row_at_a_time(family: str, rows: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family, max_position_embeddings=512)
    loss, gradients = first_step(model, rows, tmp_path / "filled")
    other_loss, others = first_step(model, rows, tmp_path / "alone", training__micro_batch_tokens=None)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert largest_difference(gradients, others) <= 1e-6


def test_positions_that_do_not_restart_would_give_another_step(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, gradients = first_step(base_model, rows, tmp_path / "filled")
    other_loss, others = first_step(base_model, rows, tmp_path / "alone", training__micro_batch_tokens=None)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert largest_difference(gradients, others) <= 1e-6
    collated = DataCollatorForLanguageModeling.torch_call

    def counted_through(self: Any, examples: Any) -> Any:
        batch = collated(self, examples)
        if "position_ids" in batch:
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        return batch

    prepared = prepare_run(
        train_settings(base_model, rows, tmp_path / "mixed", **{**FILLED, "training__max_steps": 1}), Recorder()
    )
    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", counted_through)
    mixed_loss, mixed = gradients_of_first_step(prepared, tmp_path / "mixed")
    assert mixed_loss != pytest.approx(other_loss, rel=1e-4)
    assert largest_difference(mixed, others) > 1e-2


def test_a_run_has_the_losses_and_steps_of_one_row_at_a_time(base_model: Path, rows: Path, tmp_path: Path) -> None:
    runs = []
    for tokens in (None, 300):
        recorder = Recorder()
        changed = {
            **FILLED,
            "training__gradient_accumulation_steps": 4,
            "training__micro_batch_tokens": tokens,
            "training__max_steps": None,
            "training__epochs": 2,
            "data__eval_split": "3",
        }
        result = train(train_settings(base_model, rows, tmp_path / f"run-{tokens}", **changed), recorder)
        runs.append((result, [event for event in recorder.events if isinstance(event, StepDone)]))
    (alone, alone_steps), (filled, filled_steps) = runs
    assert filled.steps == alone.steps == 6  # nine rows: the third step of an epoch has one
    assert filled.num_tokens == alone.num_tokens
    assert filled.epochs == alone.epochs == 2
    assert [event.loss for event in filled_steps] == pytest.approx([event.loss for event in alone_steps], rel=1e-4)
    assert [event.grad_norm for event in filled_steps] == pytest.approx(
        [event.grad_norm for event in alone_steps], rel=1e-3
    )
    record = json.loads((tmp_path / "run-300" / "run.json").read_text())
    assert record["plan"]["micro_batch_tokens"] == 300
    assert record["plan"]["padding_share"] == 0


@pytest.mark.parametrize(
    ("is_packed", "changed"),
    [
        (False, {"training__micro_batch_tokens": 200}),
        (False, {"training__micro_batch_size": 2, "training__sampling": "group_by_length"}),
        (False, {"training__micro_batch_size": 5, "training__longest_first": True}),
        (True, {"training__micro_batch_size": 2}),
    ],
    ids=["filled", "grouped", "longest first", "packed"],
)
def test_the_micro_batches_that_are_counted_are_those_that_are_fed(
    is_packed: bool, changed: dict[str, object], base_model: Path, rows: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(base_model, rows, tmp_path / "run", data__packing=is_packed, **changed)
    order = trainer.train_sampler()
    assert order is not None
    settings, lengths = order.settings, order.lengths
    loader, fed = trainer.get_train_dataloader(), Counter[int]()
    for epoch in range(2):
        loader.set_epoch(epoch)
        fed.update(each["input_ids"].numel() for batch in loader for each in micro_batches_of(batch))
    num_steps = 2 * settings.steps_per_epoch(len(lengths))
    assert micro_batch_tokens(lengths, settings, num_steps=num_steps, is_packed=is_packed) == fed


def test_the_held_out_loss_is_the_mean_over_all_tokens(base_model: Path, rows: Path, tmp_path: Path) -> None:
    # Ten rows: a mean over filled batches, or those of a few rows, would weigh the rows of the last one more.
    divisions: list[dict[str, object]] = [
        {"training__micro_batch_tokens": None, "training__micro_batch_size": 10},
        {},
        {"training__micro_batch_tokens": None},
        {"training__micro_batch_tokens": None, "training__micro_batch_size": 4},
    ]
    trainers = [
        trainer_of(base_model, rows, tmp_path / f"{index}", **{**FILLED, "data__eval_split": "10", **division})
        for index, division in enumerate(divisions)
    ]
    whole, *others = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert others == pytest.approx([whole] * 3, rel=1e-6)
    for trainer in trainers[1:]:
        by_batch = [
            float(trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)[0])
            for batch in trainer.get_eval_dataloader()
        ]
        assert len(by_batch) > 1
        assert sum(by_batch) / len(by_batch) != pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(
    "data", [{}, {"data__streaming": True, "data__eval_split": None, "training__eval_steps": None}]
)
def test_a_resumed_run_ends_as_if_nothing_had_happened(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, object]
) -> None:
    monkeypatch.setattr("qlora_cli.data.feeding.stream.WINDOW_ROWS", 8)  # the run is resumed in the second one
    changed = {
        **EXACT,
        "training__neftune_noise_alpha": None,
        **FILLED,
        "training__gradient_accumulation_steps": 4,
        "training__max_steps": 5,  # the one it is resumed after is in the middle of an epoch
        **data,
    }
    train(train_settings(base_model, rows, tmp_path / "whole", **changed), Copier(tmp_path / "whole", 3))
    place_killed(tmp_path / "whole", 3, tmp_path / "run")
    assert train(train_settings(base_model, rows, tmp_path / "run", **changed), Recorder()).resumed_from_step == 3
    if data:
        name = "adapter/adapter_model.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    else:
        assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_run_may_be_resumed_with_other_micro_batches_of_the_same_rows(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    changed = {**FILLED, "training__max_steps": 4, "training__save_steps": 1}
    stopped_at(train_settings(base_model, rows, tmp_path / "run", **changed), 2)
    other = {**changed, "training__micro_batch_tokens": None, "training__micro_batch_size": 2}
    with pytest.raises(SettingsError, match="12 rows a step, and was 6"):
        train(train_settings(base_model, rows, tmp_path / "run", **other), Recorder())
    same = {**other, "training__gradient_accumulation_steps": 3}
    recorder = Recorder()
    result = train(train_settings(base_model, rows, tmp_path / "run", **same), recorder)
    assert (result.steps, result.resumed_from_step) == (4, 2)
    whole = train(train_settings(base_model, rows, tmp_path / "whole", **changed), Recorder())
    assert result.final_loss == pytest.approx(whole.final_loss, rel=1e-4)


def break_row(prepared: PreparedRun, place: int) -> None:
    """Make the loss of the micro-batch with a row NaN, which is known by its tokens."""
    row = torch.tensor(prepared.train_data.dataset[place]["input_ids"])

    def spoil(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        starts = inputs[0][0].unfold(0, len(row), 1) if inputs[0].shape[1] >= len(row) else ()
        has_row = any(torch.equal(tokens, row) for tokens in starts)
        return output * math.nan if has_row else output

    prepared.model.get_input_embeddings().register_forward_hook(spoil)


def test_the_rows_of_the_micro_batch_whose_loss_is_not_finite_are_named(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_cli.training.rehearsal.RehearsalCallback.on_train_begin", lambda *_, **__: None)
    changed = {**FILLED, "training__sampling": "sequential", "training__max_steps": 3}
    prepared = prepare_run(train_settings(base_model, rows, tmp_path / "run", **changed), Recorder())
    break_row(prepared, 7)
    lengths = prepared.train_data.lengths
    batches = Batches(prepared.train_data, prepared.settings.training, 512, is_packed=False)
    (named,) = [names for index in range(2) if f"{rows}, row 8" in (names := batches.name_rows(1, index))]
    assert 1 < len(named) < 6
    assert sum(int(lengths[int(name.rpartition(" ")[2]) - 1]) for name in named) <= 192
    with pytest.raises(TrainingError) as caught:
        run(prepared, Recorder())
    assert f"step 2: the loss is nan; nothing was updated. The rows: {', '.join(named)}" in str(caught.value)


def test_a_step_with_a_micro_batch_that_is_not_finite_is_skipped(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_cli.training.rehearsal.RehearsalCallback.on_train_begin", lambda *_, **__: None)
    changed = {**FILLED, "training__sampling": "sequential", "training__on_nan": "skip"}
    prepared = prepare_run(train_settings(base_model, rows, tmp_path / "run", **changed), Recorder())
    break_row(prepared, 7)
    recorder = Recorder()
    result = run(prepared, recorder)
    assert [event.step for event in recorder.events if isinstance(event, StepSkipped)] == [2]
    assert [event.step for event in recorder.events if isinstance(event, StepDone)] == [1, 3]
    assert result.num_skipped_steps == 1


def test_the_largest_micro_batches_are_tried(base_model: Path, rows: Path, tmp_path: Path) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [messages("What?", "bad " * 90)])
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(rows.read_text() + long.read_text())
    prepared = prepare_run(train_settings(base_model, mixed, tmp_path / "run", **FILLED), Recorder())
    lengths = prepared.train_data.lengths
    assert lengths.max() > 192
    seen: list[int] = []
    prepared.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: seen.append(ids[0].shape[1]))
    recorder = Recorder()
    run(prepared, recorder)
    (tried,) = [event for event in recorder.events if isinstance(event, Rehearsed)]
    assert (tried.micro_batch_size, tried.longest_row_tokens) == (1, lengths.max())
    place = seen.index(int(lengths.max()))
    tried_tokens = seen[place : place + 4]  # each twice: from the second on, gradients are in memory
    assert tried_tokens[:2] == [lengths.max()] * 2
    assert tried_tokens[2] == tried_tokens[3] == max(tokens for tokens in seen if tokens <= 192)


def test_micro_batches_that_do_not_fit_are_lowered_to_the_longest_row(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    changed = {
        **FILLED,
        "training__micro_batch_tokens": 512,
        "training__auto_micro_batch": True,
        "training__schedule": "constant",
    }
    prepared = prepare_run(train_settings(base_model, rows, tmp_path / "run", **changed), Recorder())
    longest = int(prepared.train_data.lengths.max())

    def check(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[1] > longest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = prepared.model.get_input_embeddings().register_forward_pre_hook(check)
    recorder = Recorder()
    assert run(prepared, recorder).steps == 3
    notes = [event.message for event in recorder.events if isinstance(event, Noted) and event.level == "warning"]
    assert notes[-1].startswith("micro-batches of up to ")
    assert notes[-1].endswith(f"do not fit in memory: lowered to --micro-batch-tokens {longest}")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["training"]["micro_batch_tokens"] == longest
    assert record["origins"]["training.micro_batch_tokens"] == "training.auto_micro_batch"
    again = prepare_run(
        train_settings(base_model, rows, tmp_path / "run", **{**changed, "training__max_steps": 4}), Recorder()
    )
    assert again.plan.micro_batch_tokens == longest
    handle.remove()
    unlowered = prepare_run(
        train_settings(base_model, rows, tmp_path / "other", **{**changed, "training__auto_micro_batch": False}),
        Recorder(),
    )
    unlowered.model.get_input_embeddings().register_forward_pre_hook(check)
    with pytest.raises(OutOfMemoryError) as caught:
        run(unlowered, Recorder())
    assert f"--micro-batch-tokens {longest}" in str(caught.value.hint)


def test_a_model_that_would_mix_rows_is_trained_on_padded_ones(rows: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "mamba2")
    flags = {**FILLED, "quantization__method": "none", "training__micro_batch_size": 2}
    recorder = Recorder()
    prepared = prepare_run(train_settings(model, rows, tmp_path / "run", **flags), recorder)
    (note,) = [
        event.message
        for event in recorder.events
        if isinstance(event, Noted) and "micro_batch_tokens" in event.message
    ]
    assert "is not used, and rows are padded" in note
    assert "a row attends to the one packed before it" in note or "other logits than alone" in note
    assert prepared.plan.micro_batch_tokens is None
    assert prepared.resolved.origins["training.micro_batch_tokens"].where.startswith("a model that can't keep")
    assert run(prepared, Recorder()).steps == 3


def test_experts_are_balanced_by_micro_batch_and_it_is_said(rows: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3_moe", max_position_embeddings=512)
    recorder = Recorder()
    prepared = prepare_run(train_settings(model, rows, tmp_path / "run", **FILLED), recorder)
    notes = [event.message for event in recorder.events if isinstance(event, Noted)]
    assert any("the balancing loss of experts is a mean over each micro-batch" in note for note in notes)
    assert run(prepared, Recorder()).steps == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data__packing": True}, "training.micro_batch_tokens has no effect with packing"),
        ({"training__neftune_noise_alpha": 5.0}, "can't be used with neftune_noise_alpha"),
    ],
)
def test_what_it_can_t_be_combined_with_is_refused(
    flags: dict[str, object], message: str, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        train_settings(base_model, rows, tmp_path / "run", **FILLED, **flags)


def test_evaluations_in_a_run_are_reported_with_the_mean_over_tokens(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    changed = {**FILLED, "data__eval_split": "5", "training__eval_steps": 1, "training__early_stopping_patience": 3}
    result = train(train_settings(base_model, rows, tmp_path / "run", **changed), recorder)
    losses = [event.loss for event in recorder.events if isinstance(event, EvalDone)]
    assert len(losses) == 3
    assert result.eval_loss == losses[-1]
    assert result.best_eval_loss == min(losses)
