"""One answer of a model: tokens in, text out, as it was sampled, and why it ended."""

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
from qlora_cli.settings.models import AnswerSettings
from qlora_cli.tokenizing.tokenizer_errors import explain_tokenizer_errors

HALF_A_CHARACTER = "\ufffd"  # what the bytes of a character decode to before the last of them is there

GREEDY = AnswerSettings()

Model: TypeAlias = PreTrainedModel | PeftModel


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote after a prompt, without special tokens; the token that ended it counts."""

    text: str
    num_new_tokens: int
    finish_reason: FinishReason
    seconds: float


class Watch(StoppingCriteria):
    """Looks at an answer after each token: hands new text to `on_text`, and ends it once `stops` says so."""

    def __init__(self, on_text: Callable[[str], None], stops: Callable[[], bool]) -> None:
        self.has_stopped = False
        self._on_text = on_text
        self._stops = stops
        self._written = ""
        self._text_of: Callable[[torch.Tensor], str] = lambda _: ""

    def begin(self, text_of: Callable[[torch.Tensor], str]) -> None:
        """Take what makes text of all ids so far, `(seq,)`."""
        self._text_of = text_of

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:  # noqa: ARG002 - the signature is that of transformers
        """Return for each row of `input_ids`, `(batch, seq)`, whether it ends here."""
        text = self._text_of(input_ids[0])
        if not text.endswith(HALF_A_CHARACTER):
            self.write(text)
        self.has_stopped = self.has_stopped or self._stops()
        return torch.full((len(input_ids),), self.has_stopped, device=input_ids.device)  # type: ignore[return-value]

    def write(self, text: str) -> None:
        """Hand on what is new in `text`, all of the answer so far."""
        if new := text[len(self._written) :]:
            self._written = text
            self._on_text(new)


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """Answers a prompt: by the chat template, if the tokenizer has one. Stops at each of `end_ids`.

    Products are in `dtype`; an answer has at most `max_tokens`. What is drawn at random is drawn by the seed of
    `sampling` and `turn`, so that a question which is asked again in a conversation has another answer.
    """

    tokenizer: PreTrainedTokenizerBase
    end_ids: Collection[int]
    dtype: torch.dtype
    max_tokens: int
    sampling: AnswerSettings = GREEDY
    turn: int = 0

    def answer(self, model: Model, prompt: str) -> str:
        """Return the answer to one prompt, without special tokens.

        Raises:
            ModelError: the chat template refuses the prompt.
        """
        return self.complete(model, encode(self.tokenizer, messages_of(prompt))).text

    @torch.no_grad()
    def complete(self, model: Model, ids: Sequence[int], watch: Watch | None = None) -> Completion:
        """Return what the model writes after `ids`."""
        start = time.monotonic()
        inputs = torch.tensor([ids], device=_device_of(model))
        if watch is not None:
            watch.begin(lambda so_far: self._text_of(so_far[len(ids) :]))
        if (seed := self.sampling.drawn_seed) is not None:
            torch.manual_seed((seed + self.turn) % 2**32)
        with _evaluating(model), self._computing(inputs.device):
            output = cast(Any, model).generate(  # which transformers gives to each class that can
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.max_tokens,
                eos_token_id=sorted(self.end_ids) or None,
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=None if watch is None else [watch],
                **self._choices(),
            )
        new = output[0, len(ids) :]
        text = self._text_of(new)
        if watch is not None:
            watch.write(text)
        return Completion(
            text=text,
            num_new_tokens=len(new),
            finish_reason=self._why_ended(new, watch),
            seconds=time.monotonic() - start,
        )

    def _text_of(self, ids: torch.Tensor) -> str:
        with explain_tokenizer_errors(self.tokenizer.name_or_path):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _choices(self) -> dict[str, Any]:
        """Return how tokens are chosen, in place of what the model's generation config would say of that."""
        if self.sampling.is_greedy:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.sampling.temperature,
            "top_p": 1.0 if self.sampling.top_p is None else self.sampling.top_p,
            "top_k": self.sampling.top_k or 0,  # unless told otherwise transformers takes the likeliest 50
            "min_p": None,
        }

    def _computing(self, device: torch.device) -> Any:
        lower = self.dtype != torch.float32
        return torch.autocast(device.type, dtype=self.dtype) if lower else nullcontext()

    def _why_ended(self, new: torch.Tensor, watch: Watch | None) -> FinishReason:
        if len(new) and int(new[-1]) in self.end_ids:
            return "stop"
        return "interrupted" if watch is not None and watch.has_stopped else "length"


def _device_of(model: Model) -> torch.device:
    """Return where the model computes: that of its head, since the embedding may be kept in host memory."""
    head = model.get_output_embeddings()
    device: torch.device = model.device if head is None else head.weight.device
    return device


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            # It looks at the first weight, which is an embedding in host memory if that was asked for.
            warnings.filterwarnings("ignore", "You are calling .generate.. with the `input_ids` being on a device")
            yield
    finally:
        model.train(was_training)
