"""Train the adapter in fp32, and rounded to bf16 as TRL rounds it, and compare the losses on held-out rows.

    python -m benchmarks.quality.adapter_dtype MODEL [--seeds 3] [--steps N] [--rows N] [--rate R] [--dtype bf16]

`qlora train` keeps adapters in fp32, so the loop is one of its own, like that of `docs/explanation/training_step.py`,
on the demo's rows. What differs between two runs of a seed is the dtype of A, B, their gradients and AdamW's moments.
Results are appended to `benchmarks/results/` one by one, and a run that is there already is not repeated.
"""

import argparse
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from benchmarks.quality.fine_tune import ASSETS, table
from benchmarks.records import RESULTS, ROOT, append, now, read, results_file, revision, versions

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH_SIZE, MAX_LENGTH, RANK, ALPHA, MAX_GRAD_NORM = 8, 256, 16, 32, 0.3
WARMUP_SHARE = 0.03
IGNORED = -100

Row = tuple[list[int], list[int]]  # tokens and labels, of one length


def load(model: str, adapter_dtype: torch.dtype, dtype: torch.dtype, seed: int) -> PeftModel:
    """Return the base in NF4, which computes in `dtype`, with an adapter on every linear layer but the head."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=nf4, dtype=dtype, device_map="cpu", trust_remote_code=False
    )
    base.requires_grad_(False)
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    adapted = get_peft_model(base, config)  # drawn in fp32
    for parameter in trained_parameters(adapted):
        parameter.data = parameter.data.to(adapter_dtype)
    return adapted


def trained_parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    """Return A and B of all layers."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def read_rows(path: Path, model: str) -> list[Row]:
    """Return the conversations of a file as the tokens and labels of the documented training step."""
    spec = importlib.util.spec_from_file_location("training_step", ROOT / "docs" / "explanation" / "training_step.py")
    assert spec is not None
    assert spec.loader is not None
    documented = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(documented)
    rows: list[Row] = documented.read(path, AutoTokenizer.from_pretrained(model, trust_remote_code=False))
    return [row for row in rows if any(label != IGNORED for label in row[1][1:])]


def batches(rows: list[Row]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield tokens, attention mask and labels of the rows in their order, all `(batch, seq)`."""
    for start in range(0, len(rows), BATCH_SIZE):
        chosen = rows[start : start + BATCH_SIZE]
        length = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in chosen])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in chosen])
        labels = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in chosen])
        yield ids, mask, labels


def shuffled(rows: list[Row], num_steps: int, seed: int) -> list[Row]:
    """Return the rows of `num_steps` steps: each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Row] = []
    while len(chosen) < num_steps * BATCH_SIZE:
        chosen += [rows[index] for index in torch.randperm(len(rows), generator=generator).tolist()]
    return chosen[: num_steps * BATCH_SIZE]


def summed_loss(model: PeftModel, batch: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return the summed loss of a batch in nats, and the number of its trained tokens."""
    ids, mask, labels = batch
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    targets = labels[:, 1:].flatten()
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")
    return loss, int((targets != IGNORED).sum())


def run(model_name: str, adapter_dtype: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Train, and return the loss on the held-out rows, and the share of all updates that was `lost`.

    An update is lost if the gradient of a weight is not zero, and the weight is the same after the step.
    """
    dtype, peak = DTYPES[arguments.dtype], float(arguments.rate)
    model = load(model_name, DTYPES[adapter_dtype], dtype, seed).train()
    trained = trained_parameters(model)
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    warmup = max(1, round(WARMUP_SHARE * arguments.steps))
    rows = shuffled(read_rows(ASSETS / "train.jsonl", model_name), arguments.steps, seed)
    num_lost = num_updates = 0
    for step, batch in enumerate(batches(rows)):
        loss, num_tokens = summed_loss(model, batch, dtype)
        torch.autograd.backward(loss / num_tokens)
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        done = max(0.0, (step - warmup) / (arguments.steps - warmup))
        rate = peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        before = [parameter.detach().clone() for parameter in trained]
        optimizer.step()
        for parameter, old in zip(trained, before, strict=True):
            assert parameter.grad is not None
            has_update = parameter.grad != 0
            num_updates += int(has_update.sum())
            num_lost += int((has_update & (parameter.detach() == old)).sum())
        optimizer.zero_grad()
    held_out = read_rows(ASSETS / "held_out.jsonl", model_name)[: arguments.rows]
    return {"eval_loss": mean_loss(model, held_out, dtype), "lost": num_lost / num_updates}


@torch.no_grad()
def mean_loss(model: PeftModel, rows: list[Row], dtype: torch.dtype) -> float:
    """Return the mean loss of the trained tokens of rows, in nats."""
    model.eval()
    parts = [summed_loss(model, batch, dtype) for batch in batches(rows)]
    return sum(loss.item() for loss, _ in parts) / sum(num_tokens for _, num_tokens in parts)


def measured(arguments: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Return the losses on held-out rows by dtype and seed, after measuring those that the file lacks."""
    names = ("steps", "rows", "rate", "dtype")
    key = {"model": Path(arguments.model).resolve().name, **{name: getattr(arguments, name) for name in names}}
    known = list(read([arguments.file])) if arguments.file.exists() else []
    losses: dict[str, dict[int, float]] = {name: {} for name in DTYPES}
    for seed in range(arguments.seeds):
        for adapter_dtype in DTYPES:
            case = {**key, "adapter_dtype": adapter_dtype, "seed": seed}
            record: dict[str, Any] | None = next((one for one in known if case.items() <= one.items()), None)
            if record is None:
                record = {**case, **run(arguments.model, adapter_dtype, seed, arguments)}
                append(arguments.file, {**record, "time": now(), "revision": revision(), "versions": versions()})
            losses[adapter_dtype][seed] = record["eval_loss"]
            print(
                json.dumps({name: record[name] for name in ("adapter_dtype", "seed", "eval_loss", "lost")}), flush=True
            )
    return losses


def main() -> None:
    """Train in both dtypes, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--rows", type=int, default=200, help="held-out rows that are evaluated")
    parser.add_argument("--rate", default="2e-3", help="highest learning rate of a cosine schedule")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="in which the base computes")
    parser.add_argument("--file", type=Path, default=results_file(RESULTS, "adapter_dtype"))
    print(table(measured(parser.parse_args())))


if __name__ == "__main__":
    main()
