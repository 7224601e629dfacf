"""Generate one answer: tokens in, text out, and why it ended."""

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from qlora_cli.answering.answers import FinishReason
from qlora_cli.answering.prompts import encode, messages_of
from qlora_cli.hardware.device import device_of
from qlora_cli.settings.models import AnswerSettings
from qlora_cli.tokenizing.tokenizer_errors import explain_tokenizer_errors

INCOMPLETE_CHARACTER = "\ufffd"  # incomplete bytes of a character decode to this

GREEDY = AnswerSettings()

Model: TypeAlias = PreTrainedModel | PeftModel


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The text of a model after a prompt, without special tokens; `num_new_tokens` includes the end token."""

    text: str
    num_new_tokens: int
    finish_reason: FinishReason
    seconds: float


class Watch(StoppingCriteria):
    """Watches an answer after each token: passes new text to `on_text`, and ends it when `stops` returns true."""

    def __init__(self, on_text: Callable[[str], None], stops: Callable[[], bool]) -> None:
        self.has_stopped = False
        self._on_text = on_text
        self._stops = stops
        self._written = ""
        self._text_of: Callable[[torch.Tensor], str] = lambda _: ""

    def begin(self, text_of: Callable[[torch.Tensor], str]) -> None:
        """Set the function that decodes all ids so far, `(seq,)`."""
        self._text_of = text_of

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:  # noqa: ARG002 - the signature is that of transformers
        """Return for each row of `input_ids`, `(batch, seq)`, whether it ends here."""
        text = self._text_of(input_ids[0])
        if not text.endswith(INCOMPLETE_CHARACTER):
            self.write(text)
        self.has_stopped = self.has_stopped or self._stops()
        return torch.full((len(input_ids),), self.has_stopped, device=input_ids.device)  # type: ignore[return-value]

    def write(self, text: str) -> None:
        """Pass on what is new in `text`, the answer so far."""
        if new := text[len(self._written) :]:
            self._written = text
            self._on_text(new)


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """Answers a prompt, with the chat template if the tokenizer has one. Stops at each of `end_ids`.

    Computes in `dtype`; an answer has at most `max_tokens`. Random draws use the seed of
    `sampling` and `turn`, so that a repeated question in a conversation gets another answer. If the weights are
    `shared`, each of several processes holds a part of them, and all generate until the last has ended.
    """

    tokenizer: PreTrainedTokenizerBase
    end_ids: Collection[int]
    dtype: torch.dtype
    max_tokens: int
    sampling: AnswerSettings = GREEDY
    turn: int = 0
    shared: bool = False

    def answer(self, model: Model, prompt: str) -> str:
        """Return the answer to one prompt, without special tokens.

        Raises:
            ModelError: the chat template refuses the prompt.
        """
        return self.complete(model, encode(self.tokenizer, messages_of(prompt))).text

    @torch.no_grad()
    def complete(self, model: Model, ids: Sequence[int], watch: Watch | None = None) -> Completion:
        """Return the completion of `ids` by the model."""
        start = time.monotonic()
        inputs = torch.tensor([ids], device=_device_of(model))
        if watch is not None:
            watch.begin(lambda so_far: self._text_of(so_far[len(ids) :]))
        if (seed := self.sampling.drawn_seed) is not None:
            torch.manual_seed((seed + self.turn) % 2**32)
        with _evaluating(model), self._computing(inputs.device):
            output = cast(Any, model).generate(  # defined by transformers for each generating class
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.max_tokens,
                eos_token_id=sorted(self.end_ids) or None,
                pad_token_id=self.tokenizer.pad_token_id,
                synced_gpus=self.shared,
                stopping_criteria=None if watch is None else [watch],
                **self._sampling_arguments(),
            )
        new = output[0, len(ids) :]
        text = self._text_of(new)
        if watch is not None:
            watch.write(text)
        return Completion(
            text=text,
            num_new_tokens=len(new),
            finish_reason=self._finish_reason(new, watch),
            seconds=time.monotonic() - start,
        )

    def _text_of(self, ids: torch.Tensor) -> str:
        with explain_tokenizer_errors(self.tokenizer.name_or_path):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _sampling_arguments(self) -> dict[str, Any]:
        """Return the sampling arguments, which override the model's generation config."""
        if self.sampling.is_greedy:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.sampling.temperature,
            "top_p": 1.0 if self.sampling.top_p is None else self.sampling.top_p,
            "top_k": self.sampling.top_k or 0,  # transformers' default is 50
            "min_p": None,
        }

    def _computing(self, device: torch.device) -> Any:
        lower = self.dtype != torch.float32
        return torch.autocast(device.type, dtype=self.dtype) if lower else nullcontext()

    def _finish_reason(self, new: torch.Tensor, watch: Watch | None) -> FinishReason:
        if len(new) and int(new[-1]) in self.end_ids:
            return "stop"
        return "interrupted" if watch is not None and watch.has_stopped else "length"


def _device_of(model: Model) -> torch.device:
    """Return the device of the model: that of its head, since the embedding may be in host memory."""
    head = model.get_output_embeddings()
    return model.device if head is None else device_of(head.weight)


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            # It checks the first weight, which may be an embedding in host memory.
            warnings.filterwarnings("ignore", "You are calling .generate.. with the `input_ids` being on a device")
            yield
    finally:
        model.train(was_training)
