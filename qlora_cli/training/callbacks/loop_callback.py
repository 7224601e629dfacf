"""Tell the trainer of the phases of its loop."""

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Loop(Protocol):
    """What is told of its phases; `eval_dataset` is None if nothing is held out."""

    eval_dataset: Any

    def begin_loop(self) -> None:
        """The first step is next."""

    def begin_update(self) -> None:
        """Gradients are clipped, weights are next."""

    def end_update(self) -> None:
        """The step is counted."""


class LoopCallback(TrainerCallback):
    """Notifies a loop of its phases."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signatures are those of transformers
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Before the first step."""
        self._loop.begin_loop()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Gradients are clipped, weights are next."""
        self._loop.begin_update()

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """The step is counted. The last one is evaluated whatever the interval, before it is saved."""
        self._loop.end_update()
        if state.global_step >= state.max_steps and self._loop.eval_dataset is not None:
            control.should_evaluate = True
