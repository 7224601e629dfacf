"""Evaluations during training: the best adapter is kept, training is unchanged, and each answers the prompts."""

import json
import math
from pathlib import Path

import torch

from qlora_cli.events import EvalDone, Noted, SampleDone
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.train_run import run, train
from tests.conftest import Recorder, short_settings, write_jsonl
from tests.integration.training.test_training_faults import messages


def test_a_held_out_loss_that_is_not_finite_is_reported_and_never_the_best(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [messages(f"What is {n}?", "bad " * 80) for n in range(3)])
    changed = {**EVALUATED, "data__eval_split": None, "data__eval_dataset": str(held_out), "training__max_steps": 3}
    prepared = prepare_run(short_settings(base_model, rows, tmp_path / "run", **changed), Recorder())
    evaluated = iter(range(100))

    def spoil(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        is_first = inputs[0].shape[1] > 150 and not prepared.model.training and next(evaluated) < 3
        return output * math.nan if is_first else output  # in the first pass, and in the first evaluation

    prepared.model.get_input_embeddings().register_forward_hook(spoil)
    recorder = Recorder()
    result = run(prepared, recorder)
    first, *later = evaluations(recorder)
    assert math.isnan(first.loss)
    assert not first.is_best
    assert later[0].is_best
    assert result.best_step != 1
    assert result.best_eval_loss == min(event.loss for event in later)
    assert any("the held-out loss is nan" in e.message for e in recorder.events if isinstance(e, Noted))


EVALUATED: dict[str, object] = {
    "data__eval_split": "3",
    "training__eval_steps": 1,
    "training__max_steps": 8,
    "training__schedule": "constant",
}


def evaluations(recorder: Recorder) -> list[EvalDone]:
    return [event for event in recorder.events if isinstance(event, EvalDone)]


def test_training_stops_early_and_the_best_adapter_is_kept(base_model: Path, rows: Path, tmp_path: Path) -> None:
    changed = {
        **EVALUATED,
        "training__max_steps": 30,
        "training__learning_rate": 0.02,  # far too high, so that the held-out loss soon rises
        "training__early_stopping_patience": 3,
        "training__load_best_model_at_end": True,
        "output__max_checkpoints": 1,
    }
    recorder = Recorder()
    result = train(short_settings(base_model, rows, tmp_path / "run", **changed), recorder)
    losses = {event.step: event.loss for event in evaluations(recorder)}
    best = min(losses, key=lambda step: losses[step])
    assert result.stopped_early
    assert result.steps == best + 3 < 30
    assert (result.best_step, result.best_eval_loss) == (best, losses[best])
    assert [event.step for event in evaluations(recorder) if event.is_best][-1] == best
    # The best checkpoint survives although only one is to be kept, and the adapter is that of it.
    assert [path.name for path in result.checkpoints] == [f"step-{best}", f"step-{result.steps}"]
    name = "adapter_model.safetensors"
    assert (result.adapter / name).read_bytes() == (result.checkpoints[0] / name).read_bytes()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"


def test_evaluating_does_not_change_what_is_trained(base_model: Path, rows: Path, tmp_path: Path) -> None:
    name = "adapter/adapter_model.safetensors"
    for run_name, steps in (("often", 1), ("once", None)):
        changed = {**EVALUATED, "training__max_steps": 4, "training__eval_steps": steps, "lora__dropout": 0.2}
        train(short_settings(base_model, rows, tmp_path / run_name, **changed), Recorder())
    assert (tmp_path / "often" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_prompts_are_answered_before_training_and_at_each_evaluation(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    changed = {
        **EVALUATED,
        "training__eval_steps": 4,
        "training__learning_rate": 5e-3,
        "training__sample_prompts": ["What does os.getcwd() do?", "What is a list?"],
        "training__sample_tokens": 12,
    }
    recorder = Recorder()
    train(short_settings(base_model, rows, tmp_path / "run", **changed), recorder)
    samples = [event for event in recorder.events if isinstance(event, SampleDone)]
    assert [event.step for event in samples] == [0, 0, 4, 4, 8, 8]
    assert {event.prompt for event in samples} == set(changed["training__sample_prompts"])  # type: ignore[call-overload]
    assert len({event.answer for event in samples if event.prompt == "What is a list?"}) > 1
    without = {key: value for key, value in changed.items() if "sample" not in key}
    train(short_settings(base_model, rows, tmp_path / "without", **without), Recorder())
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
