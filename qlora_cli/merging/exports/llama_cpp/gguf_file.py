"""Compare a GGUF file with the model that it was converted from: weights, tokens and chat template must agree.

Only this module needs the package `gguf`: import it only after checking that it is installed.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qlora_cli.errors import ExportError
from qlora_cli.merging.exports.llama_cpp.converter import UPDATE
from qlora_cli.units import counted

BLOCK = re.compile(r"blk\.(\d+)\.")
EMBEDDING = "token_embd.weight"
# What the reader raises on an invalid or truncated file; it checks little itself.
UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError, UnicodeDecodeError, OverflowError)


@dataclass(frozen=True, kw_only=True)
class GgufFacts:
    """The contents of a GGUF file.

    Attributes:
        matrices: The weights in a row of each tensor with several rows, and the type that it is stored in.
        num_announced_blocks: The layers by the metadata; `blocks` are those with tensors.
        width: The hidden size.
        num_rows: The rows of the embedding.
        adds_bos: Whether BOS is put before text; None if the file does not say.
    """

    architecture: str
    num_tensors: int
    num_parameters: int
    bits_per_weight: float
    matrices: tuple[tuple[int, str], ...]
    num_announced_blocks: int | None
    blocks: frozenset[int]
    width: int | None
    num_rows: int
    vocabulary_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool | None
    chat_template: str | None

    def in_other_types(self, block_weights: int) -> str | None:
        """Return how many matrices are in other types because their rows are no whole blocks; None if none are."""
        others = [kind for row_weights, kind in self.matrices if row_weights % block_weights]
        if not others:
            return None
        kinds = " and ".join(sorted(set(others)))
        return (
            f"{len(others)} of {len(self.matrices)} matrices have rows that are no multiple of {block_weights} "
            f"weights, and are stored in {kinds}: {self.bits_per_weight:.2f} bits a weight on average"
        )


def read_gguf(path: Path) -> GgufFacts:
    """Return the contents of `path`.

    Raises:
        ExportError: it is not a GGUF file, or incomplete.
    """
    try:
        return _facts(GGUFReader(path))
    except UNREADABLE as error:
        raise ExportError(
            f"what llama.cpp's converter wrote to {path.name} can't be read as GGUF: {error}",
            hint=f"Is the disk full? Otherwise: {UPDATE}.",
        ) from error


def _facts(reader: GGUFReader) -> GgufFacts:
    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    architecture = value("general.architecture")
    tokens = reader.get_field("tokenizer.ggml.tokens")
    names = [str(tensor.name) for tensor in reader.tensors]
    rows = [int(tensor.shape[-1]) for tensor in reader.tensors if tensor.name == EMBEDDING]
    if architecture is None or tokens is None or not rows:
        missing = "architecture" if architecture is None else "vocabulary" if tokens is None else "embedding"
        raise ValueError(f"it has no {missing}")
    num_parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return GgufFacts(
        architecture=architecture,
        num_tensors=len(names),
        num_parameters=num_parameters,
        bits_per_weight=8 * sum(int(tensor.n_bytes) for tensor in reader.tensors) / num_parameters,
        matrices=tuple(
            (int(tensor.shape[0]), tensor.tensor_type.name) for tensor in reader.tensors if len(tensor.shape) > 1
        ),
        num_announced_blocks=value(f"{architecture}.block_count"),
        blocks=frozenset(int(match[1]) for name in names if (match := BLOCK.match(name))),
        width=value(f"{architecture}.embedding_length"),
        num_rows=rows[0],
        vocabulary_size=len(tokens.data),
        bos_id=value("tokenizer.ggml.bos_token_id"),
        eos_id=value("tokenizer.ggml.eos_token_id"),
        adds_bos=value("tokenizer.ggml.add_bos_token"),
        chat_template=value("tokenizer.chat_template"),
    )


def mismatches(
    facts: GgufFacts, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, num_parameters: int
) -> list[str]:
    """Describe where the file differs from the model of `config` and `tokenizer` with `num_parameters` weights."""
    return [*_weight_mismatches(facts, config, num_parameters), *_tokenizer_mismatches(facts, config, tokenizer)]


def _weight_mismatches(facts: GgufFacts, config: PreTrainedConfig, num_parameters: int) -> list[str]:
    layers: int = config.num_hidden_layers
    problems = []
    if facts.num_announced_blocks != layers or facts.blocks != frozenset(range(layers)):
        problems.append(
            f"{counted(len(facts.blocks), 'layer')}, {facts.num_announced_blocks} by its metadata, and the model has "
            f"{layers}"
        )
    if facts.width != config.hidden_size:
        problems.append(f"a hidden size of {facts.width}, and the model has {config.hidden_size}")
    # It may hold more: RoPE factors, which a config stores only as settings.
    if facts.num_parameters < num_parameters:
        problems.append(f"{facts.num_parameters:,} weights, and the model has {num_parameters:,}")
    return problems


def _tokenizer_mismatches(facts: GgufFacts, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    problems = []
    needed = max(config.vocab_size, *tokenizer.get_vocab().values())
    if facts.vocabulary_size != facts.num_rows or facts.num_rows < needed:
        problems.append(
            f"{facts.vocabulary_size:,} tokens and {facts.num_rows:,} rows of the embedding, "
            f"and the model has {config.vocab_size:,}"
        )
    if facts.eos_id != tokenizer.eos_token_id:
        problems.append(f"the end token {facts.eos_id}, and the tokenizer has {tokenizer.eos_token_id}")
    if tokenizer.bos_token_id is not None and facts.bos_id != tokenizer.bos_token_id:
        problems.append(f"the begin token {facts.bos_id}, and the tokenizer has {tokenizer.bos_token_id}")
    if facts.chat_template != default_template(tokenizer):
        what = "no chat template" if facts.chat_template is None else "another chat template than the tokenizer"
        problems.append(what)
    return problems


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template that is used unless another is chosen by name."""
    own: str | dict[str, str] | None = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own
