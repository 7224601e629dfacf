"""Generate answers to fixed prompts before training and at each evaluation, to show what the model learns."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_cli.answering.answerer import Answerer
from qlora_cli.events import Reporter, SampleDone
from qlora_cli.training.resuming.loop_state import preserve_generators


class SampleCallback(TrainerCallback):
    """Answers the prompts before the first step, at each evaluation and after the last step."""

    def __init__(
        self,
        answerer: Answerer,
        prompts: Collection[str],
        reporter: Reporter,
        uncompiled: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Answer within a context of `uncompiled`: prompts grow token by token, each another shape to compile."""
        self._answerer = answerer
        self._prompts = prompts
        self._reporter = reporter
        self._uncompiled = uncompiled
        self._last_step: int | None = None

    def _report(self, model: PeftModel, step: int) -> None:
        if self._last_step == step:
            return
        self._last_step = step
        with preserve_generators(), self._uncompiled():
            for prompt in self._prompts:
                answer = self._answerer.answer(model, prompt)
                self._reporter.report(SampleDone(step=step, prompt=prompt, answer=answer))

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signatures are those of transformers
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Answer with the base."""
        if state.global_step == 0:
            self._report(kwargs["model"], 0)

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Answer with the current model."""
        self._report(kwargs["model"], state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Answer with the trained model."""
        if state.global_step >= state.max_steps:
            self.answer_last(kwargs["model"], state.global_step)

    def answer_last(self, model: PeftModel, step: int) -> None:
        """Answer after the last step, unless already done."""
        self._report(model, step)
