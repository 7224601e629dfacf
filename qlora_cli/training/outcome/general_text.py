"""The text that shows what a run forgets: plain English of our own, or a file; as rows that are trained nowhere."""

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.feeding.token_table import Numbers
from qlora_cli.settings.values import ON, WHERE_CHEAP
from qlora_cli.tokenizing.tokenizer_errors import explain_tokenizer_errors

BUILT_IN = "built in"
TEXT_FILE = "general_text.txt"
ROW_TOKENS = 512  # of a row, at most: the loss of a token depends on how many come before it
MOST_TOKENS = 4096  # of a file; more would cost more time than they add precision
BYTES_PER_TOKEN = 16  # a text is read up to as many bytes as can make so many tokens


@dataclass(frozen=True, kw_only=True)
class GeneralText:
    """Rows of consecutive tokens, all of them labels; `lengths` are `(rows,)`."""

    name: str
    dataset: list[dict[str, Any]]
    lengths: Numbers

    @property
    def fingerprint(self) -> str:
        """A digest of the tokens."""
        digest = hashlib.sha256()
        for row in self.dataset:
            digest.update(np.array(row["input_ids"], "<i8").tobytes())
        return digest.hexdigest()


def text_of(setting: str) -> tuple[str, str]:
    """Return the name and the text of the setting `training.general_text`, which is not off.

    Raises:
        OSError: the file can't be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    if setting in (ON, WHERE_CHEAP):
        return BUILT_IN, resources.files("qlora_cli.training.outcome").joinpath(TEXT_FILE).read_text("utf-8")
    with Path(setting).expanduser().open("rb") as file:
        raw = file.read(MOST_TOKENS * BYTES_PER_TOKEN)
    # A character that the limit cuts in two is left out.
    return Path(setting).name, raw.decode("utf-8", errors="ignore")


def general_rows(name: str, text: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> GeneralText:
    """Return a text as rows of at most `max_length` tokens, each with the token that begins every text, if any."""
    with explain_tokenizer_errors(tokenizer.name_or_path):
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:MOST_TOKENS]
        begins: list[int] = tokenizer("")["input_ids"][:1]
    prefix = begins if begins and begins[0] == tokenizer.bos_token_id else []
    size = max(2, min(ROW_TOKENS, max_length) - len(prefix))
    rows = [prefix + ids[start : start + size] for start in range(0, len(ids), size)]
    kept = [row for row in rows if len(row) > 1]  # nothing predicts the first token
    return GeneralText(
        name=name,
        dataset=[{"input_ids": row, "labels": row} for row in kept],
        lengths=np.array([len(row) for row in kept], np.int64),
    )
