"""Prepare one file once, as one program does, and print how long it took: the case of `data_vs_trl.py`.

    python benchmarks/data_case.py trl|trl-2-processes|qlora FILE MODEL MAX_LENGTH

Seconds are from the file to rows of tokens and labels that a trainer takes; importing and the tokenizer are left out.
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def prepare_with_trl(file: Path, model: Path, max_length: int, num_processes: int | None) -> tuple[float, Any]:
    """Let TRL's trainer prepare the file: its own code, as `trl sft` runs it with a loss on answers only."""
    import torch
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    small = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    network = torch.nn.Module.to(LlamaForCausalLM(small), torch.float32)
    arguments = SFTConfig(
        output_dir=str(file.parent / "trl"),
        assistant_only_loss=True,
        max_length=max_length,
        use_cpu=True,
        bf16=False,
        report_to="none",
        dataset_num_proc=num_processes,
    )
    start = time.perf_counter()
    rows = load_dataset("json", data_files=str(file), split="train")
    trainer = SFTTrainer(model=network, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return time.perf_counter() - start, trainer.train_dataset


def prepare_with_qlora(file: Path, model: Path, max_length: int) -> tuple[float, Any]:
    """Let `qlora` prepare the file, with an empty cache."""
    from qlora_cli.data.feeding.prepare import prepare_data
    from qlora_cli.data.tokenizing.encode import TextTokenizer
    from qlora_cli.events import SilentReporter
    from qlora_cli.settings.models import DataSettings, ModelSettings
    from qlora_cli.tokenizing.text_interface import load_text_interface

    side = load_text_interface(ModelSettings(name=str(model)), SilentReporter(), max_length=None)
    text = TextTokenizer(tokenizer=side.tokenizer.tokenizer, end_ids=side.tokenizer.end_ids, reporter=SilentReporter())
    settings = DataSettings(dataset=(str(file),), max_length=max_length, accept_lost=True)
    start = time.perf_counter()
    prepared = prepare_data(settings, text, seed=0)
    return time.perf_counter() - start, prepared.train.dataset


def digest(rows: Any) -> str:
    """Return a digest of the tokens and labels of every row, in order."""
    digest = hashlib.sha256()
    for row in rows.select_columns(["input_ids", "labels"]):
        digest.update(json.dumps([row["input_ids"], row["labels"][1:]]).encode())
    return digest.hexdigest()


def main() -> None:
    """Prepare, and print seconds, peak memory and a digest of the rows as one JSON object."""
    program, file, model, max_length = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    if program == "qlora":
        seconds, rows = prepare_with_qlora(file, model, max_length)
    else:
        seconds, rows = prepare_with_trl(file, model, max_length, 2 if program == "trl-2-processes" else None)
    peak = psutil.Process().memory_info().rss
    print(json.dumps({"seconds": seconds, "rows": len(rows), "rss_bytes": peak, "digest": digest(rows)}))


if __name__ == "__main__":
    main()
