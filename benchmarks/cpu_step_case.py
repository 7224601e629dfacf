"""Train one variant of `cpu_step.py` in this process, a step at a time, whenever the parent asks for one.

Every variant trains the same adapter on the same two rows, with AdamW at a constant learning rate, so that the losses
of all of them agree within rounding.
"""

import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 1.0
BATCH_SIZE = 2


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train: `program` is `plain`, `trl` or `qlora`; `settings` are further ones of `qlora train`."""

    name: str
    program: str
    dtype: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The files that all variants share, and the directory `output` of this one."""

    model: Path
    adapter: Path
    rows: Path
    output: Path


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: CPU seconds of this process, its loss, and the largest resident set so far."""

    cpu_seconds: float
    loss: float
    peak_host_bytes: int


class Pacer:
    """Holds the training until the parent asks for the next step, and reports each."""

    def __init__(self, connection: Connection, num_steps: int) -> None:
        self._connection = connection
        self._num_remaining = num_steps
        self._start = 0.0

    def wait(self) -> None:
        """Wait until the next step is asked for."""
        self._connection.recv()
        self._start = time.process_time()

    def done(self, loss: float) -> None:
        """Report a step, and wait for the next one if there is one."""
        seconds = time.process_time() - self._start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        self._connection.send(Step(cpu_seconds=seconds, loss=loss, peak_host_bytes=peak))
        self._num_remaining -= 1
        if self._num_remaining:
            self.wait()


def run_variant(variant: Variant, paths: Paths, num_steps: int, connection: Connection) -> None:
    """Train `num_steps` steps, each when the parent asks; the entry point of a process."""
    paths.output.mkdir(parents=True)
    log = os.open(paths.output / "log.txt", os.O_CREAT | os.O_WRONLY, 0o600)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    pacer = Pacer(connection, num_steps)
    {"plain": _train_plain, "trl": _train_with_trl, "qlora": _train_with_qlora}[variant.program](
        variant, paths, num_steps, pacer
    )


def _train_plain(variant: Variant, paths: Paths, num_steps: int, pacer: Pacer) -> None:
    """Train by a loop around PEFT's model, whose own loss takes all logits; nothing is recomputed."""
    import torch

    model = _peft_model(paths, variant.dtype)
    rows = torch.tensor([row["input_ids"] for row in read_rows(paths.rows)])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    pacer.wait()
    for _ in range(num_steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=variant.dtype == "bf16"):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pacer.done(loss.item())


def _train_with_trl(variant: Variant, paths: Paths, num_steps: int, pacer: Pacer) -> None:
    """Train by `SFTTrainer` with the defaults of `trl sft`: activations recomputed, the adapter in bf16."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Paced(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            pacer.wait()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if "loss" in kwargs["logs"]:
                pacer.done(kwargs["logs"]["loss"])

    arguments = SFTConfig(
        output_dir=str(paths.output / "run"),
        use_cpu=True,
        bf16=variant.dtype == "bf16",
        max_steps=num_steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=_peft_model(paths, "fp32"),  # the default of `trl sft`, whatever autocast computes in
        args=arguments,
        train_dataset=Dataset.from_list(list(read_rows(paths.rows))),
        processing_class=AutoTokenizer.from_pretrained(paths.model, trust_remote_code=False),
        callbacks=[Paced()],
    )
    trainer.train()


def _train_with_qlora(variant: Variant, paths: Paths, num_steps: int, pacer: Pacer) -> None:
    """Train by the code of `qlora train`."""
    from qlora_cli.events import Event, StepDone, TrainingStarted
    from qlora_cli.settings.models import TrainSettings
    from qlora_cli.settings.resolve import Sources, resolve
    from qlora_cli.training.train_run import train

    class Paced:
        def report(self, event: Event) -> None:
            if isinstance(event, TrainingStarted):
                pacer.wait()
            elif isinstance(event, StepDone):
                pacer.done(event.loss)

    values = {
        "model.name": str(paths.adapter),
        "model.dtype": variant.dtype,
        "model.device": "cpu",
        "data.dataset": str(paths.rows),
        "training.max_steps": num_steps,
        "training.micro_batch_size": BATCH_SIZE,
        "training.gradient_accumulation_steps": 1,
        "training.learning_rate": LEARNING_RATE,
        "training.schedule": "constant",
        "training.max_grad_norm": MAX_GRAD_NORM,
        "training.save_steps": num_steps,
        "output.directory": str(paths.output / "run"),
        **variant.settings,
    }
    train(resolve(Sources(flags={path: (path, value) for path, value in values.items()}), TrainSettings), Paced())


def _peft_model(paths: Paths, dtype: str) -> Any:
    """Return the base in NF4 with double quantization, the rest of it in `dtype`, and the adapter in fp32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(
        paths.model,
        dtype=torch_dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch_dtype,
        ),
        device_map="cpu",
        trust_remote_code=False,
    )
    return PeftModel.from_pretrained(model, paths.adapter, is_trainable=True)


def read_rows(path: Path) -> Iterator[dict[str, list[int]]]:
    """Yield the rows, each with its `input_ids`."""
    import json

    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
