"""cuDNN does not compute attention in what runs a model on batches of many lengths, and does so again afterwards."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_cli.answering import answer_prompts, conversation
from qlora_cli.evaluating import evaluation
from qlora_cli.events import Event, StepDone
from qlora_cli.settings.models import AnswerSettings
from qlora_cli.training.train_run import train
from tests.conftest import train_settings

OPENED: Any = SimpleNamespace(loaded=SimpleNamespace(tokenizer=None))


def is_enabled() -> bool:
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]


class StopHereError(Exception):
    """Ends a function at the first thing that it does."""


class States:
    """A reporter that records whether cuDNN may compute attention when a step is done."""

    def __init__(self) -> None:
        self.states: list[bool] = []

    def report(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.states.append(is_enabled())


def test_training_computes_attention_without_cudnn(base_model: Path, rows: Path, tmp_path: Path) -> None:
    assert is_enabled()  # PyTorch's default
    reporter = States()
    train(train_settings(base_model, rows, tmp_path / "run"), reporter)
    assert reporter.states == [False] * 3
    assert is_enabled()


@pytest.mark.parametrize(
    ("run", "first"),
    [
        (lambda: answer_prompts.generate(*[None] * 4), (answer_prompts, "open_model")),  # type: ignore[arg-type]
        (lambda: evaluation.evaluate(None, None), (evaluation, "check_evaluation")),  # type: ignore[arg-type]
        (lambda: conversation.Chat(OPENED, AnswerSettings()).ask("hello", None), (conversation, "encode")),  # type: ignore[arg-type]
    ],
    ids=["generate", "evaluate", "chat"],
)
def test_answers_and_evaluations_compute_attention_without_cudnn(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], first: tuple[Any, str]
) -> None:
    states = []

    def stop(*_: object, **__: object) -> None:
        states.append(is_enabled())
        raise StopHereError

    monkeypatch.setattr(*first, stop)
    with pytest.raises(StopHereError):
        run()
    assert states == [False]
    assert is_enabled()
