"""Fixed prompts, answered before training and at each evaluation, so that one sees what the model learns."""

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from qlora_cli.events import Reporter, SampleDone
from qlora_cli.training.loop_state import generators_kept


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """Answers a prompt greedily: by the chat template, if the tokenizer has one. Stops at each of `end_ids`."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: Collection[int]
    dtype: torch.dtype
    max_tokens: int

    @torch.no_grad()
    def answer(self, model: PeftModel, prompt: str) -> str:
        """Return the answer, without special tokens."""
        inputs = self._tokens(prompt).to(model.device)
        was_training = model.training
        model.eval()
        lower = self.dtype != torch.float32
        with torch.autocast(model.device.type, dtype=self.dtype) if lower else nullcontext():
            output = model.generate(
                **inputs,
                max_new_tokens=self.max_tokens,
                do_sample=False,
                eos_token_id=sorted(self.end_ids) or None,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        model.train(was_training)
        answered = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return str(answered).strip()

    def _tokens(self, prompt: str) -> Any:
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        question = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)


class SampleCallback(TrainerCallback):
    """Answers the prompts before the first step, at each evaluation and after the last step."""

    def __init__(self, answerer: Answerer, prompts: Collection[str], reporter: Reporter) -> None:
        self._answerer = answerer
        self._prompts = prompts
        self._reporter = reporter
        self._last_step: int | None = None

    def _report(self, model: PeftModel, step: int) -> None:
        if self._last_step == step:
            return
        self._last_step = step
        with generators_kept():
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
        """Answer as the base does."""
        if state.global_step == 0:
            self._report(kwargs["model"], 0)

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Answer as the model does now."""
        self._report(kwargs["model"], state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Answer as the trained model does."""
        if state.global_step >= state.max_steps:
            self.answer_last(kwargs["model"], state.global_step)

    def answer_last(self, model: PeftModel, step: int) -> None:
        """Answer after the last step, unless that was done."""
        self._report(model, step)
