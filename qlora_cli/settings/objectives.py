"""What is learned, and of rows of which format: each implies the other, and is named in the other's hints."""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_cli.settings.enumerated import Choice

# The names of the formats in axolotl (`type`), LLaMA-Factory (`formatting`), ms-swift, TRL and Unsloth.
FORMAT_NAMES = {
    "messages": ("chat_template", "chatml", "chat", "openai", "conversational", "conversation"),
    "sharegpt": ("vicuna",),
    "prompt_completion": ("prompt-completion",),
    "alpaca": ("alpaca_chat", "alpaca_w_system", "gpteacher"),
    "question_answer": (
        "question-answer",
        "query-response",
        "qa",
        "jeopardy",
        "alpaca_chat.load_qa",
        "context_qa.load_v2",
    ),
    "text": ("completion", "pretrain", "pretraining", "language_modeling", "language-modeling"),
    "tokens": ("tokenized", "pretokenized"),
    "preference": ("chosen_rejected", "paired"),
}
SEGMENTS_HINT = (
    "Write each row of segments as prompt and completion, or as its tokens with labels: -100 where nothing is trained "
    "(--format tokens)."
)
COMPARISONS = ("dpo", "kto", "orpo", "ipo", "simpo", "ranking", "reward")


class DataFormat(Choice):
    """The format of rows. `auto` recognises it by their columns."""

    AUTO = "auto"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PROMPT_COMPLETION = "prompt_completion"
    ALPACA = "alpaca"
    QUESTION_ANSWER = "question_answer"
    TEXT = "text"
    TOKENS = "tokens"
    PREFERENCE = "preference"

    @classmethod
    def synonyms(cls) -> dict[str, str]:
        """Return the formats by their names in other tools."""
        return {name: fmt for fmt, names in FORMAT_NAMES.items() for name in names}

    @classmethod
    def hint_for(cls, value: str) -> str | None:
        """Return what to do with rows in a format of other tools that is not supported."""
        if value.lower() in ("input_output", "segments"):
            return SEGMENTS_HINT
        if value.lower().partition(".")[0] in COMPARISONS:
            return (
                f"These are for training by comparison: of pairs, with {OBJECTIVES_OF_PAIRS}. To train on the better "
                "answers, name them with --columns."
            )
        return None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What an objective that compares two answers implies; its loss is in `loss/preference_loss.py`."""

    learning_rate: float  # where none is given: that of TRL's own command or example with LoRA
    has_reference: bool


class Objective(Choice):
    """What is learned from the rows: their answers, or which of two answers is better, if it is in `COMPARED_BY`."""

    SFT = "sft"
    DPO = "dpo"
    ORPO = "orpo"

    @classmethod
    def hint_for(cls, value: str) -> str | None:
        """Return what to use in place of an objective of other tools that there is not."""
        if value.lower() in COMPARISONS:
            return f"Of those that compare answers, there are {' and '.join(COMPARED_BY)}."
        return None

    @property
    def num_sequences(self) -> int:
        """The sequences of a row: a pair is two."""
        return 2 if self.compares else 1

    @property
    def compares(self) -> bool:
        """Whether a row is a pair of a chosen and a rejected answer."""
        return self in COMPARED_BY

    @property
    def has_reference(self) -> bool:
        """Whether the log-probabilities of the base, without its adapter, are part of the loss."""
        return self.compares and COMPARED_BY[self].has_reference


COMPARED_BY: Mapping[Objective, Comparison] = {
    Objective.DPO: Comparison(learning_rate=5e-6, has_reference=True),
    Objective.ORPO: Comparison(learning_rate=8e-5, has_reference=False),
}
OBJECTIVES_OF_PAIRS = f"--objective {' or '.join(COMPARED_BY)}"  # for hints
