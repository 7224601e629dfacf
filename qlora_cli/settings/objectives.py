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
    "unpaired_preference": ("unpaired-preference", "unpaired"),
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
    UNPAIRED_PREFERENCE = "unpaired_preference"

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
                f"These are for training by comparison: of pairs, with {OBJECTIVES_OF_PAIRS}, or of answers with a "
                f"label, with {OBJECTIVES_OF_LABELS}. To train on the better answers, name them with --columns."
            )
        return None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What an objective that compares answers implies; its loss is in `loss/preference_loss.py` or `label_loss.py`.

    Attributes:
        learning_rate: That of a run for which none is given.
        has_reference: Whether the log-probabilities of the base, without its adapter, are part of the loss.
        format: The format of its rows.
    """

    learning_rate: float
    has_reference: bool
    format: DataFormat = DataFormat.PREFERENCE


class Objective(Choice):
    """What is learned from the rows: their answers, or, if it is in `COMPARED_BY`, which answers are better.

    Those compare the two answers of a pair, or single answers, which have a label, with the base.
    """

    SFT = "sft"
    DPO = "dpo"
    ORPO = "orpo"
    KTO = "kto"

    @classmethod
    def hint_for(cls, value: str) -> str | None:
        """Return what to use in place of an objective of other tools that there is not."""
        if value.lower() in COMPARISONS:
            *first, last = COMPARED_BY
            return f"Of those that compare answers, there are {', '.join(first)} and {last}."
        return None

    @property
    def num_sequences(self) -> int:
        """The sequences of a row: a pair is two."""
        return 2 if self.has_pairs else 1

    @property
    def compares(self) -> bool:
        """Whether answers are compared: those of a row with each other, or single ones with the base."""
        return self in COMPARED_BY

    @property
    def has_pairs(self) -> bool:
        """Whether a row is a pair of a chosen and a rejected answer."""
        return self.compares and COMPARED_BY[self].format == DataFormat.PREFERENCE

    @property
    def has_labels(self) -> bool:
        """Whether a row is an answer with a label: wanted or not."""
        return self.compares and COMPARED_BY[self].format == DataFormat.UNPAIRED_PREFERENCE

    @property
    def has_reference(self) -> bool:
        """Whether the log-probabilities of the base, without its adapter, are part of the loss."""
        return self.compares and COMPARED_BY[self].has_reference

    @property
    def num_forward_passes(self) -> int:
        """How often a step passes forward through the base: for the reference and, both again, for a baseline, too."""
        own = 2 if self.has_reference else 1
        return 2 * own if self.has_labels else own


# The learning rates of pairs are those of TRL's own command or example with LoRA; that of labels is the one of
# LLaMA-Factory's example with LoRA, and the highest that TRL's page on KTO recommends.
COMPARED_BY: Mapping[Objective, Comparison] = {
    Objective.DPO: Comparison(learning_rate=5e-6, has_reference=True),
    Objective.ORPO: Comparison(learning_rate=8e-5, has_reference=False),
    Objective.KTO: Comparison(learning_rate=5e-6, has_reference=True, format=DataFormat.UNPAIRED_PREFERENCE),
}


def _flags_of(fmt: DataFormat) -> str:
    """Return the flag of the objectives whose rows have a format, for hints."""
    return f"--objective {' or '.join(name for name, one in COMPARED_BY.items() if one.format == fmt)}"


OBJECTIVES_OF_PAIRS = _flags_of(DataFormat.PREFERENCE)
OBJECTIVES_OF_LABELS = _flags_of(DataFormat.UNPAIRED_PREFERENCE)
