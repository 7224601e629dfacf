"""Make models of true shapes with random weights, and rows for them, in seconds and without a network.

Speed and memory do not depend on what the weights are, so nothing needs to be downloaded. Tensors are
drawn one at a time, on the GPU if there is one, and written as bf16 safetensors shards, so that an 8B model
never exists in memory as a whole.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SHARD_BYTES = 2 * 1024**3
INITIAL_STD = 0.02  # as Llama models are initialized
EOS = "<|end|>"
PAD = "<|pad|>"
SYLLABLES = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a Llama model."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool

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
    "107m": Shape(
        hidden_size=768,
        num_layers=12,
        intermediate_size=2048,
        num_heads=12,
        num_kv_heads=12,
        vocab_size=28_672,
        tied=True,
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
}


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the checkpoint, by name, `(out, in)` for a linear layer."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    key_width = shape.num_kv_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (key_width, hidden),
            f"{prefix}.self_attn.v_proj.weight": (key_width, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocab_size, hidden)
    return shapes


def num_elements(size: Sequence[int]) -> int:
    """Return the number of elements of a tensor of this size."""
    count = 1
    for extent in size:
        count *= extent
    return count


def num_parameters(shape: Shape) -> int:
    """Return the parameters of a model; a tied head counts once."""
    return sum(num_elements(size) for size in tensor_shapes(shape).values())


def write_model(directory: Path, shape: Shape, device: str) -> None:
    """Write config, random weights (drawn on `device`, seed 0) and tokenizer to `directory`."""
    directory.mkdir(parents=True)
    _write_config(directory, shape)
    _write_weights(directory, shape, device)
    _write_tokenizer(directory)


def _write_config(directory: Path, shape: Shape) -> None:
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
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Split tensors into groups that stay under `SHARD_BYTES` in bf16."""
    shard: dict[str, tuple[int, ...]] = {}
    num_bytes = 0
    for name, size in shapes.items():
        tensor_bytes = 2 * num_elements(size)
        if shard and num_bytes + tensor_bytes > SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = size
        num_bytes += tensor_bytes
    yield shard


def _write_weights(directory: Path, shape: Shape, device: str) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator(device=device).manual_seed(0)

    def draw(size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:  # a norm
            return torch.ones(size, dtype=torch.bfloat16)
        tensor = torch.empty(size, dtype=torch.bfloat16, device=device)
        return tensor.normal_(std=INITIAL_STD, generator=generator).cpu()

    shards = list(_shards(tensor_shapes(shape)))
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file_name = f"model-{index:05}-of-{len(shards):05}.safetensors"
        tensors = {name: draw(size) for name, size in shard.items()}
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    index_file = {"metadata": {"total_size": 2 * num_parameters(shape)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="utf-8")


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
    """Write `text` rows that are as long as they can be within `num_tokens`, counting the end token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    generator = random.Random(1)  # noqa: S311 - reproducible text, no secret
    rows = []
    for _ in range(num_rows):
        words = sample_text(generator, num_tokens).split(" ")
        while len(tokenizer.encode(" ".join(words)).ids) > num_tokens - 1:
            words.pop()
        rows.append(json.dumps({"text": " ".join(words)}) + "\n")
    path.write_text("".join(rows), encoding="utf-8")


def main() -> None:
    """Write one model, in a process of its own: its memory must not count as that of what is measured."""
    parser = argparse.ArgumentParser(description="Write a Llama-shaped model with random weights.")
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the weights are drawn")
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    arguments = parser.parse_args()
    write_model(arguments.output, SHAPES[arguments.size], arguments.device)


if __name__ == "__main__":
    main()
