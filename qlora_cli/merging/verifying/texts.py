"""The texts that models are compared on: fixed prompts, and a few rows of the training data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.feeding.collate import sequences_of
from qlora_cli.data.finding.sources import find_dataset, first_local
from qlora_cli.data.tokenizing.encode import TextTokenizer, tokenize_source
from qlora_cli.errors import QloraError
from qlora_cli.events import Noted, Reporter
from qlora_cli.runs.record import RunRecord
from qlora_cli.settings.choices import OnBadRow
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.settle import with_values
from qlora_cli.tokenizing.tokenizer import LoadedTokenizer
from qlora_cli.tokenizing.tokenizer_errors import explain_tokenizer_errors

PROMPTS = (
    "The capital of France is Paris, and the capital of Japan is Tokyo.",
    "def add(a: int, b: int) -> int:\n    return a + b\n",
    "Q: What is 17 + 25?\nA: 42.",
    "Once upon a time there was a small village by the sea, where everyone knew everyone.",
)
NUM_ROWS, MOST_TOKENS = 8, 128
MOST_LOGIT_BYTES = 256 * 1024**2  # of one model's logits, in fp32


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Rows of tokens, the prompts first."""

    rows: tuple[tuple[int, ...], ...]
    num_prompts: int

    @property
    def num_rows(self) -> int:
        """The number of rows from the data."""
        return len(self.rows) - self.num_prompts

    def batch(self, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask, `(rows, seq)`, padded on the right."""
        longest = max(map(len, self.rows))
        ids = torch.full((len(self.rows), longest), pad_id)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(self.rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        return ids, mask

    @property
    def targets(self) -> torch.Tensor:
        """The token that follows each token, -100 after the last of a row, `(tokens,)`."""
        return torch.tensor([token for row in self.rows for token in (*row[1:], -100)])


def read_texts(tokenizer: LoadedTokenizer, record: RunRecord | None, vocabulary: int, reporter: Reporter) -> Texts:
    """Return the prompts and, for a run, a few rows of its data, limited by the memory of the logits."""
    prompts = [_tokens(tokenizer.tokenizer, text) for text in PROMPTS]
    rows = [] if record is None else _rows_of_run(tokenizer, record, reporter)
    left = max(len(PROMPTS) * 16, MOST_LOGIT_BYTES // (4 * vocabulary))
    chosen: list[tuple[int, ...]] = []
    num_prompts = 0
    for index, row in enumerate([*prompts, *rows]):
        row = row[: min(MOST_TOKENS, left)]
        if len(row) < 2 or max(row) >= vocabulary:
            continue
        chosen.append(tuple(row))
        num_prompts += index < len(prompts)
        left -= len(row)
    return Texts(rows=tuple(chosen), num_prompts=num_prompts)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Sequence[int]:
    with explain_tokenizer_errors(tokenizer.name_or_path):
        ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _rows_of_run(tokenizer: LoadedTokenizer, record: RunRecord, reporter: Reporter) -> list[Sequence[int]]:
    """Return rows of the run's data as in training, if the data can still be read."""
    try:
        settings = DataSettings.model_validate(record.settings_of("data", "which data it was trained on"))
        first_rows = with_values(settings, on_bad_row=OnBadRow.SKIP)
        text = TextTokenizer(tokenizer=tokenizer.tokenizer, end_ids=tokenizer.end_ids, reporter=reporter)
        name = settings.dataset[0]
        source = find_dataset(first_local(map(str, record.candidate_paths(name))) or name, settings.split)
        tokenized = tokenize_source(source, settings.split, first_rows, text, record.seed or 0, max_rows=NUM_ROWS)
    except (QloraError, ValidationError) as error:
        reporter.report(Noted(message=f"the run's data can't be read here ({error}): compared on fixed prompts only"))
        return []
    return [sequences_of(row)[0]["input_ids"] for row in tokenized.dataset]
