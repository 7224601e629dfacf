"""A stand-in for llama-cpp-python: what is called of it, without llama.cpp. Its model prefers the next token.

It runs files that begin with GGUF, and has eight tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

NUM_TOKENS = 8


class Llama:
    """A model whose logits are 1 at the token after the current one, and the position divided by 10 at token 0."""

    def __init__(self, model_path: str, *, n_gpu_layers: int, n_ctx: int, n_batch: int, logits_all: bool) -> None:
        if not Path(model_path).read_bytes().startswith(b"GGUF"):
            raise ValueError(f"Failed to load model from file: {model_path}")
        assert (n_gpu_layers, n_batch, logits_all) == (0, n_ctx, True)
        self.scores = np.zeros((n_ctx, NUM_TOKENS), dtype=np.float32)
        self._position = 0

    def n_vocab(self) -> int:
        """Return the size of the vocabulary."""
        return NUM_TOKENS

    def reset(self) -> None:
        """Forget what was evaluated."""
        self._position = 0
        self.scores[:] = 0

    def eval(self, tokens: Sequence[int]) -> None:
        """Compute the logits of further tokens."""
        for token in tokens:
            self.scores[self._position, token + 1] = 1
            self.scores[self._position, 0] += self._position / 10
            self._position += 1
