"""What every benchmark records beside its figures, and how a model of a given shape is made."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "qlora-cli")
WORDS = "the model reads a short text and learns to answer every question about rivers mountains cities".split()


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that shape a figure; None for one that runs from its source."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def processor() -> dict[str, Any]:
    """Return the processor's name, its number of cores, and whether it multiplies bf16 natively."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    flags = ""
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        cleaned = {key.strip(): value.strip() for key, value in lines.items()}
        name, flags = cleaned.get("model name", name), cleaned.get("flags", "")
    return {"name": name, "cores": os.cpu_count(), "native_bf16": "avx512_bf16" in flags.split()}


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line and show it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def save_tokenizer(directory: Path, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Write a byte-level BPE tokenizer of at most `vocabulary_size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(directory)
    return fast


def write_rows(path: Path, num_rows: int, num_words: int) -> None:
    """Write `text` rows of `num_words` words, a token each, in an order that differs by row."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            words = [WORDS[(row + 3 * index * index) % len(WORDS)] for index in range(num_words)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
