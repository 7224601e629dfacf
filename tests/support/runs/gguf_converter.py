"""A stand-in for llama.cpp's converter, which no package has: writes a real GGUF of a Llama, with the same arguments.

`WRONG` in the environment names one thing to write wrongly, as an older converter might.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import numpy.typing as npt
from safetensors import deserialize

Array = npt.NDArray[np.float16]
Value = TypeVar("Value", bound=np.generic)
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor of a Llama."""
    layer, _, kind = name.rpartition(".")
    if layer in NAMES:
        return f"{NAMES[layer]}.{kind}"
    number, _, part = layer.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{BLOCK_NAMES[part]}.{kind}"


def tensors_of(file: Path) -> Iterator[tuple[str, Array]]:
    """Yield the bf16 tensors of a file as fp16, without torch, whose import would take longer than everything else."""
    for name, stored in deserialize(file.read_bytes()):  # type: ignore[no-untyped-call]
        bits = np.frombuffer(stored["data"], dtype=np.uint16).astype(np.uint32) << 16
        yield name, bits.view(np.float32).astype(np.float16).reshape(stored["shape"])


def write(model: Path, target: Path, wrong: str | None, *, vocabulary_only: bool) -> None:
    """Write `target` from `model`."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    vocabulary = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    assert max(tokens_of(vocabulary).values()) < config["vocab_size"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"] - (wrong == "layers"))
    writer.add_embedding_length(config["hidden_size"] + (wrong == "width"))
    _add_architecture(writer, config)
    _add_vocabulary(writer, vocabulary, config, wrong)
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    if wrong != "no template":
        writer.add_chat_template(template + (" " if wrong == "template" else ""))
    for name, tensor in () if vocabulary_only else tensors_of(model / "model.safetensors"):
        if not (wrong == "weights" and name.endswith("q_proj.weight")):
            if wrong != "heads":
                tensor = with_pairs_together(name, tensor, config)
            rows = slice(0, -1 if wrong == "rows" and "embed_tokens" in name else None)
            values = tensor[rows]
            # llama.cpp runs norms in fp32 only.
            writer.add_tensor(gguf_name(name), values.astype(np.float32) if values.ndim == 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_architecture(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Add what llama.cpp needs to run the model."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])


def with_pairs_together(name: str, tensor: npt.NDArray[Value], config: dict[str, Any]) -> npt.NDArray[Value]:
    """Return queries and keys with the rows of each rotated pair next to each other, as llama.cpp rotates them."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    kind = name.split(".")[-2]
    if kind not in heads:
        return tensor
    halves = tensor.reshape(heads[kind], 2, -1, tensor.shape[1])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def tokens_of(stored: Any) -> dict[str, int]:
    """Return the ids of the tokens in a tokenizer.json."""
    return {**stored["model"]["vocab"], **{token["content"]: token["id"] for token in stored["added_tokens"]}}


def _add_vocabulary(writer: gguf.GGUFWriter, stored: Any, config: dict[str, Any], wrong: str | None) -> None:
    tokens = tokens_of(stored)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_token_list(sorted(tokens, key=lambda token: tokens[token]))
    writer.add_eos_token_id(config["eos_token_id"] + (wrong == "eos"))
    writer.add_bos_token_id(config["bos_token_id"] + (wrong == "bos"))
    writer.add_add_bos_token(wrong != "adds no bos")


def main() -> None:
    """Convert according to the command line, which is that of llama.cpp's converter."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", type=Path, required=True)
    parser.add_argument("--outtype", required=True)
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--vocab-only", action="store_true")
    arguments = parser.parse_args()
    wrong = os.environ.get("WRONG")
    if wrong == "tokenizer":
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
    write(arguments.model, arguments.outfile, wrong, vocabulary_only=arguments.vocab_only)
    whole = arguments.outfile.read_bytes()
    if wrong == "garbage":
        arguments.outfile.write_bytes(b"garbage!" * 100)
    elif wrong == "truncated":
        arguments.outfile.write_bytes(whole[: len(whole) // 2])


if __name__ == "__main__":
    main()
