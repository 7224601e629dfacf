"""QLoRA in one page: what `qlora train` computes, without all that makes it fit, resume, report and refuse.

    python docs/explanation/training_step.py qlora_cli/demo/assets/base qlora_cli/demo/assets/train.jsonl

Every line is one that the product has too, mostly inside a library; a test holds that the losses agree. It reads
conversations in JSON lines, on a CPU, in fp32.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

SEED = 0
RANK, ALPHA = 16, 32
MAX_LENGTH, BATCH = 256, 16
EPOCHS, LEARNING_RATE, WARMUP_SHARE, MAX_NORM = 2, 2e-3, 0.03, 1.0
IGNORED = -100  # the label of a token that is read but not trained

Row = tuple[list[int], list[int]]  # tokens and labels, of one length


def load(path: Path) -> PeftModel:
    """Return the base in NF4, frozen, with a LoRA adapter in fp32 on every linear layer but the head."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=nf4, dtype=torch.float32, device_map="cpu")
    base.requires_grad_(False)
    torch.manual_seed(SEED)  # A is drawn, B is zero: at first the adapter changes nothing
    return get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    )


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Return the conversations of a file as tokens; only what the assistant says, and its end of turn, is trained."""
    return [encode(json.loads(line)["messages"], tokenizer) for line in path.read_text(encoding="utf-8").splitlines()]


def encode(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Row:
    """Return one conversation as tokens and labels."""
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    spans, position = [], 0
    for message in messages:  # each begins after its role and a line break, and ends with the mark of a turn
        start = text.index(message["content"], position)
        position = text.index("<|im_end|>", start + len(message["content"])) + len("<|im_end|>")
        if message["role"] == "assistant":
            spans.append((start, position))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    is_trained = [
        any(start < end and begin <= start < stop for begin, stop in spans) for start, end in encoded["offset_mapping"]
    ]
    ids = encoded["input_ids"][:MAX_LENGTH]
    return ids, [token if trained else IGNORED for token, trained in zip(ids, is_trained, strict=False)]


def batches(rows: list[Row], pad: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield tokens, attention mask and labels of each step, all `(batch, seq)`, padded to the longest row of it."""
    for epoch in range(EPOCHS):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        for start in range(0, len(order), BATCH):
            chosen = [rows[index] for index in order[start : start + BATCH]]
            length = max(len(ids) for ids, _ in chosen)
            ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in chosen])
            mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in chosen])
            labels = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in chosen])
            yield ids, mask, labels


def learning_rate(step: int, num_steps: int) -> float:
    """Return the rate of a step, counted from 0: a linear warm-up, then half a cosine down to zero."""
    warmup = round(WARMUP_SHARE * num_steps)
    if step < warmup:
        return LEARNING_RATE * step / warmup
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))


def train(base: Path, data: Path) -> Iterator[float]:
    """Yield the loss of each step: the mean over its trained tokens, before the step changes the weights."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load(base).train()
    rows = read(data, tokenizer)
    num_steps = EPOCHS * math.ceil(len(rows) / BATCH)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step, (ids, mask, labels) in enumerate(batches(rows, tokenizer.pad_token_id)):
        logits = model(input_ids=ids, attention_mask=mask).logits  # (batch, seq, vocabulary)
        # A token is predicted from those before it: logits at i are compared with the label at i + 1.
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()  # through the frozen NF4 weights, to A and B alone
        torch.nn.utils.clip_grad_norm_(trainable, MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


if __name__ == "__main__":
    for number, value in enumerate(train(Path(sys.argv[1]), Path(sys.argv[2])), start=1):
        print(f"step {number}: loss {value:.4f}")
