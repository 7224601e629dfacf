"""Make models of real shapes with random weights, and rows for them, in seconds and without a network.

Speed and memory do not depend on the values of weights, so nothing needs to be downloaded, and one pool of normal
numbers is enough: every tensor is a slice of it from a random offset. Files are streamed to the disk as bf16
safetensors shards; no tensor of the model, let alone a shard, is ever in memory as a whole.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

SHARD_BYTES = 1024**3
POOL_SIZE = 2**24
INITIAL_STD = 0.02  # as Llama models are initialized
EOS = "<|end|>"
PAD = "<|pad|>"
SYLLABLES = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a Llama model; with experts, of a Qwen3-MoE model and the `intermediate_size` of an expert."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool
    num_experts: int = 0
    num_experts_per_token: int = 0

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.hidden_size // self.num_heads


SHAPES = {
    "tiny": Shape(
        hidden_size=128,
        num_layers=2,
        intermediate_size=256,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=4096,
        tied=False,
    ),
    "tiny-moe": Shape(
        hidden_size=128,
        num_layers=2,
        intermediate_size=64,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=4096,
        tied=False,
        num_experts=4,
        num_experts_per_token=2,
    ),
    "107m": Shape(
        hidden_size=768,
        num_layers=12,
        intermediate_size=2048,
        num_heads=12,
        num_kv_heads=12,
        vocab_size=28_672,
        tied=True,
    ),
    # The layers of Llama-3.2-1B with a smaller vocabulary: nine tenths of it are quantized.
    "1b-small-vocabulary": Shape(
        hidden_size=2048,
        num_layers=16,
        intermediate_size=8192,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=32_000,
        tied=False,
    ),
    # The shape of Llama-3.2-1B.
    "1b": Shape(
        hidden_size=2048,
        num_layers=16,
        intermediate_size=8192,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=128_256,
        tied=True,
    ),
    # Half the layers of Llama-3.2-1B, half as wide, with a head of its own: two thirds of it are embedding and head.
    "400m-large-vocabulary": Shape(
        hidden_size=1024,
        num_layers=8,
        intermediate_size=4096,
        num_heads=16,
        num_kv_heads=4,
        vocab_size=128_256,
        tied=False,
    ),
    # The shape of Llama-3.2-3B.
    "3b": Shape(
        hidden_size=3072,
        num_layers=28,
        intermediate_size=8192,
        num_heads=24,
        num_kv_heads=8,
        vocab_size=128_256,
        tied=True,
    ),
    # A layer with as many experts as one of Qwen3-30B-A3B, each a third as large, and hardly anything else.
    "200m-moe": Shape(
        hidden_size=1024,
        num_layers=1,
        intermediate_size=512,
        num_heads=16,
        num_kv_heads=4,
        vocab_size=4096,
        tied=False,
        num_experts=128,
        num_experts_per_token=8,
    ),
    # Three of the 48 layers of Qwen3-30B-A3B, and a smaller vocabulary.
    "2b-moe": Shape(
        hidden_size=2048,
        num_layers=3,
        intermediate_size=768,
        num_heads=32,
        num_kv_heads=4,
        vocab_size=32_000,
        tied=False,
        num_experts=128,
        num_experts_per_token=8,
    ),
    # The shape of Llama-3.1-8B.
    "8b": Shape(
        hidden_size=4096,
        num_layers=32,
        intermediate_size=14_336,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=128_256,
        tied=False,
    ),
    # As wide as Llama-3.1-70B, with 4 of its 80 layers, so that it fits on a small disk.
    "70b-wide": Shape(
        hidden_size=8192,
        num_layers=4,
        intermediate_size=28_672,
        num_heads=64,
        num_kv_heads=8,
        vocab_size=128_256,
        tied=False,
    ),
    # The shape of Llama-3.1-405B.
    "405b": Shape(
        hidden_size=16_384,
        num_layers=126,
        intermediate_size=53_248,
        num_heads=128,
        num_kv_heads=8,
        vocab_size=128_256,
        tied=False,
    ),
}


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the checkpoint, by name, `(out, in)` for a linear layer."""
    hidden = shape.hidden_size
    query_width, key_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (query_width, hidden),
            f"{prefix}.self_attn.k_proj.weight": (key_width, hidden),
            f"{prefix}.self_attn.v_proj.weight": (key_width, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, query_width),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
        if shape.num_experts:
            shapes |= {f"{prefix}.self_attn.{name}_norm.weight": (shape.head_dim,) for name in ("q", "k")}
            shapes[f"{prefix}.mlp.gate.weight"] = (shape.num_experts, hidden)
            for expert in range(shape.num_experts):
                shapes |= _mlp(f"{prefix}.mlp.experts.{expert}", shape)
        else:
            shapes |= _mlp(f"{prefix}.mlp", shape)
    shapes["model.norm.weight"] = (hidden,)
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocab_size, hidden)
    return shapes


def _mlp(prefix: str, shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def num_parameters(shape: Shape) -> int:
    """Return the parameters of a model; a tied head counts once."""
    return sum(prod(size) for size in tensor_shapes(shape).values())


def write_model(directory: Path, shape: Shape, *, sparse: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config, random weights (seed 0) and tokenizer to `directory`.

    `sparse` omits the weights: files of the right size, all zeros, that take no disk space.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_of(shape), indent=2) + "\n", encoding="utf-8")
    _write_weights(directory, list(_shards(tensor_shapes(shape), shard_bytes)), sparse=sparse)
    _write_tokenizer(directory)


def config_of(shape: Shape) -> dict[str, Any]:
    """Return the content of `config.json`."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 131_072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "bfloat16",
    }
    if shape.num_experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.num_experts_per_token,
            "moe_intermediate_size": shape.intermediate_size,
            "norm_topk_prob": True,
        }
    return config


def _shards(shapes: Mapping[str, tuple[int, ...]], shard_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Split tensors into groups of at most so many bytes in bf16, or of one tensor that is larger."""
    shard: dict[str, tuple[int, ...]] = {}
    num_bytes = 0
    for name, size in shapes.items():
        tensor_bytes = 2 * prod(size)
        if shard and num_bytes + tensor_bytes > shard_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = size
        num_bytes += tensor_bytes
    yield shard


def _write_weights(directory: Path, shards: Sequence[Mapping[str, tuple[int, ...]]], *, sparse: bool) -> None:
    pool = None if sparse else Pool()
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file_name = f"model-{index:05}-of-{len(shards):05}.safetensors"
        with (directory / file_name).open("wb") as file:
            header = safetensors_header(shard)
            file.write(header)
            if pool is None:
                file.truncate(len(header) + 2 * sum(prod(size) for size in shard.values()))
            else:
                for size in shard.values():
                    pool.write(file, size)
        weight_map |= dict.fromkeys(shard, file_name)
    total_bytes = 2 * sum(prod(size) for shard in shards for size in shard.values())
    index_file = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="utf-8")


def safetensors_header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Return the header of a safetensors file of these tensors in bf16, one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in shapes.items():
        begin, end = end, end + 2 * prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Pool:
    """Normal numbers in bf16 from which tensors are taken."""

    def __init__(self) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        numbers = torch.empty(POOL_SIZE).normal_(std=INITIAL_STD, generator=generator).bfloat16()
        self._numbers = memoryview(numbers.view(torch.uint8).numpy().data)
        self._ones = torch.ones(2**16, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
        self._offsets = random.Random(0)  # noqa: S311 - reproducible weights, no secret

    def write(self, file: BinaryIO, size: Sequence[int]) -> None:
        """Write one tensor; a vector is a norm's, all ones."""
        remaining = 2 * prod(size)
        if len(size) == 1:
            file.write(self._ones[:remaining])
            return
        offset = 2 * self._offsets.randrange(POOL_SIZE)
        while remaining:
            remaining -= file.write(self._numbers[offset : offset + remaining])
            offset = 0


def sample_text(generator: random.Random, num_words: int) -> str:
    """Return sentences of made-up words."""
    words = ["".join(generator.choices(SYLLABLES, k=generator.randint(1, 4))) for _ in range(num_words)]
    return " ".join(word + ("." if generator.random() < 0.1 else "") for word in words)


def _write_tokenizer(directory: Path) -> None:
    """Train a byte-level BPE of at most 4096 tokens: every id fits each vocabulary above."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    generator = random.Random(0)  # noqa: S311 - reproducible text, no secret
    tokenizer.train_from_iterator([sample_text(generator, 500) for _ in range(200)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(directory)


def write_rows(path: Path, model: Path, *, num_rows: int, num_tokens: int) -> None:
    """Write `text` rows that are as long as possible within `num_tokens`, including the end token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    generator = random.Random(1)  # noqa: S311 - reproducible text, no secret
    rows = []
    for _ in range(num_rows):
        text = sample_text(generator, num_tokens)
        encoding = tokenizer.encode(text)
        if len(encoding.ids) > num_tokens - 1:
            # No token spans two words, so that the whole words before the first token too many have their own tokens.
            start_of_excess = encoding.offsets[num_tokens - 1][0]
            text = text[: max(0, text.rfind(" ", 0, start_of_excess + 1))]
        rows.append(json.dumps({"text": text}) + "\n")
    path.write_text("".join(rows), encoding="utf-8")


def main() -> None:
    """Write one model, in a process of its own, so that its memory does not count towards a measurement."""
    parser = argparse.ArgumentParser(description="Write a model with random weights.")
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    arguments = parser.parse_args()
    write_model(arguments.output, SHAPES[arguments.size])


if __name__ == "__main__":
    main()
