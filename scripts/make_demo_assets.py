"""Make what `qlora demo` ships: a small trained Llama, its tokenizer and a data set.

    python scripts/make_demo_assets.py            # about 20 minutes on two CPU cores

The only source of text is the Python that runs this script: the docstrings of its standard library
and the language reference that `pydoc` contains, both under the PSF licence, which is copied next to
the result. Functions whose answers are held out for evaluation are held out of pre-training as well.
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import random
import shutil
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "qlora_cli" / "demo" / "assets"
SEED = 20261124
VOCABULARY_SIZE = 3072
SEQUENCE_LENGTH = 256
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
NUM_TRAIN_ROWS = 1500
NUM_HELD_OUT_ROWS = 200
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "__pycache__", "ensurepip"}

# ChatML. The generation prompt is a prefix of the rendered answer, so training and serving agree.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Function:
    """A documented function of the standard library."""

    name: str
    signature: str
    docstring: str

    @property
    def summary(self) -> str:
        return " ".join(self.docstring.strip().split("\n\n")[0].split())

    @property
    def as_source(self) -> str:
        body = textwrap.indent(f'"""{self.docstring.strip()}\n"""', "    ")
        return f"def {self.signature}:\n{body}\n"


def library_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts) and "_pydoc" not in path.name
    )


def module_name(path: Path) -> str:
    relative = path.relative_to(sysconfig.get_paths()["stdlib"]).with_suffix("")
    return ".".join(part for part in relative.parts if part != "__init__")


def read_library() -> tuple[list[Function], list[str]]:
    """Return the documented functions, and the docstrings of modules and classes."""
    functions: dict[str, Function] = {}
    prose: list[str] = []
    for path in library_files():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for name, node in _walk(tree, module_name(path)):
            docstring = ast.get_docstring(node)
            if not docstring or not docstring.isascii():
                continue
            if isinstance(node, ast.FunctionDef):
                signature = f"{name}({ast.unparse(node.args)})"
                functions.setdefault(name, Function(name=name, signature=signature, docstring=docstring))
            else:
                prose.append(f"{name}\n\n{docstring}\n")
    return list(functions.values()), prose


def _walk(tree: ast.Module, module: str) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]]:
    yield module, tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield f"{module}.{node.name}", node
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield f"{module}.{node.name}.{member.name}", member
        elif isinstance(node, ast.FunctionDef):
            yield f"{module}.{node.name}", node


def is_question(function: Function) -> bool:
    """Return whether the function makes a good row: public, with a summary of one short sentence."""
    parts = function.name.split(".")
    return (
        not any(part.startswith("_") for part in parts)
        and 20 <= len(function.summary) <= 120
        and function.summary.endswith(".")
        and len(function.signature) <= 100
    )


def split_rows(functions: list[Function]) -> tuple[list[Function], list[Function]]:
    """Return train and held-out functions; no summary is in both."""
    unique = {function.summary: function for function in functions if is_question(function)}
    rows = sorted(unique.values(), key=lambda function: hashlib.sha256(function.name.encode()).hexdigest())
    held_out = rows[:NUM_HELD_OUT_ROWS]
    return rows[NUM_HELD_OUT_ROWS : NUM_HELD_OUT_ROWS + NUM_TRAIN_ROWS], held_out


def as_row(function: Function) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"What does {function.signature} do?"},
            {"role": "assistant", "content": function.summary},
        ]
    }


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Runs of letters, digits or signs; identifiers fall apart at underscores and dots.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+|_| ?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9_]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = "<|bos|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, SPECIAL_TOKENS.index(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=SEQUENCE_LENGTH * 2,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=SEQUENCE_LENGTH * 2,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretrain(model: LlamaForCausalLM, stream: torch.Tensor, *, minutes: float | None, epochs: int) -> float:
    """Train on `stream`, `(num_tokens,)`, cut at random offsets; returns the mean loss of the last 100 steps.

    The number of steps follows from `epochs`, so that the result does not depend on the machine's speed;
    `minutes` only cuts a trial short.
    """
    batch_size = 16
    num_steps = epochs * len(stream) // (batch_size * SEQUENCE_LENGTH)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=2e-3, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.1 + 0.45 * (1 + math.cos(math.pi * step / num_steps)))
    )
    generator = torch.Generator().manual_seed(SEED)
    losses: list[float] = []
    start = time.monotonic()
    for step in range(num_steps):
        offsets = torch.randint(len(stream) - SEQUENCE_LENGTH - 1, (batch_size,), generator=generator)
        batch = torch.stack([stream[offset : offset + SEQUENCE_LENGTH] for offset in offsets.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {step}/{num_steps}  loss {recent:.3f}  {time.monotonic() - start:.0f} s", flush=True)
        if minutes is not None and time.monotonic() - start > minutes * 60:
            break
    return sum(losses[-100:]) / len(losses[-100:])


def encode_corpus(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return one stream of token ids, `(num_tokens,)`: <|bos|> text <|eos|> <|bos|> text …"""
    bos, eos = SPECIAL_TOKENS.index("<|bos|>"), SPECIAL_TOKENS.index("<|eos|>")
    ids: list[int] = []
    for text in texts:
        ids += [bos, *tokenizer(text, add_special_tokens=False).input_ids, eos]
    return torch.tensor(ids, dtype=torch.long)


def write_rows(path: Path, functions: list[Function]) -> None:
    path.write_text("".join(json.dumps(as_row(function)) + "\n" for function in functions), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--epochs", type=int, default=8, help="passes over the corpus")
    parser.add_argument("--minutes", type=float, default=None, help="stop early; for trials only")
    arguments = parser.parse_args()
    random.seed(SEED)
    torch.use_deterministic_algorithms(True)

    functions, prose = read_library()
    train_rows, held_out_rows = split_rows(functions)
    held_out = {function.summary for function in held_out_rows}
    texts = [function.as_source for function in functions if function.summary not in held_out]
    texts += prose + [text for text in topics.topics.values() if text.isascii()]
    random.shuffle(texts)
    tokenizer = train_tokenizer(texts)
    stream = encode_corpus(tokenizer, texts)
    model = make_model(tokenizer)
    print(f"{len(functions)} functions, {len(stream)} tokens, {model.num_parameters()} parameters")
    model.train()
    loss = pretrain(model, stream, minutes=arguments.minutes, epochs=arguments.epochs)

    shutil.rmtree(arguments.output, ignore_errors=True)
    base = arguments.output / "base"
    base.mkdir(parents=True)
    model.bfloat16().save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_rows(arguments.output / "train.jsonl", train_rows)
    write_rows(arguments.output / "held_out.jsonl", held_out_rows)
    shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", arguments.output / "LICENSE-PSF.txt")
    origin = {
        "made_by": "scripts/make_demo_assets.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": SEED,
        "corpus_tokens": len(stream),
        "epochs": arguments.epochs,
        "final_loss": round(loss, 4),
        "weights_sha256": hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest(),
    }
    (arguments.output / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(origin, indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
