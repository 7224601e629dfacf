"""Explain why a vocabulary without a tokenizer.json can't be read: a missing package, or a file of another kind."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from qlora_cli.errors import MissingDependencyError, ModelError, QloraError
from qlora_cli.model_files.checkpoint import how_to_restore

FAST = "tokenizer.json"
NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
HEAD_BYTES = 128
# A SentencePiece model begins with its first piece, a tiktoken file with a token in base 64 and its rank.
SENTENCEPIECE, TIKTOKEN = re.compile(rb"\n"), re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\n")
# The modules that read each kind, and the names of their packages where they differ.
MODULES: Mapping[str, Sequence[str]] = {
    "SentencePiece": ("sentencepiece", "google.protobuf"),
    "tiktoken": ("tiktoken",),
}
INSTALLED_AS = {"google.protobuf": "protobuf"}


def unreadable_vocabulary(directory: Path) -> QloraError | None:
    """Return the error for the vocabulary in `directory`, judged by its file and the installed packages."""
    if (directory / FAST).is_file():
        return None
    return next((error for path in _files(directory) if (error := _reading_error(path)) is not None), None)


def _files(directory: Path) -> Iterator[Path]:
    yield from (path for name in NAMES if (path := directory / name).is_file())
    yield from sorted(path for path in directory.glob("*.tiktoken") if path.is_file())


def _reading_error(path: Path) -> QloraError | None:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    kind = "tiktoken" if TIKTOKEN.match(head) else "SentencePiece" if SENTENCEPIECE.match(head) else None
    if kind is None:
        return ModelError(
            f"{path} is not a vocabulary of SentencePiece or tiktoken: it begins with {head[:8]!r}",
            hint=how_to_restore(path.parent, path.name),
        )
    missing = [INSTALLED_AS.get(module, module) for module in MODULES[kind] if _is_missing(module)]
    if not missing:
        return None
    return MissingDependencyError(
        f"{path} is a {kind} vocabulary, which needs {' and '.join(missing)}: not installed",
        hint=f"Run: pip install {' '.join(missing)}",
    )


def _is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:  # the package above it is missing
        return True
