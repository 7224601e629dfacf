"""Fine-tune the bundled base on the bundled rows by the code that `qlora train` runs, and compare."""

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.prepare import PreparedData
from qlora_cli.demo.result import DemoResult
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from qlora_cli.training.plan import PreparedRun, prepare_run
from qlora_cli.training.run import run

ASSETS = Path(__file__).parent / "assets"
MAX_ANSWER_TOKENS = 48

# The settings of the demonstration, as flags would give them; configs/demo.yaml says the same.
DEMO_SETTINGS = {
    "lora.rank": 16,
    "lora.alpha": 32,
    "data.max_length": 256,
    "training.learning_rate": 2e-3,
    "training.epochs": 2,
    "training.micro_batch_size": 16,
    "training.gradient_accumulation_steps": 1,
    "training.max_grad_norm": 1.0,
}


def demo_settings(output: Path) -> Resolved[TrainSettings]:
    """Return the settings of the demonstration, written to `output`."""
    values = {
        "model.name": str(ASSETS / "base"),
        "data.dataset": str(ASSETS / "train.jsonl"),
        "data.eval_dataset": str(ASSETS / "held_out.jsonl"),
        "output.directory": str(output),
        "output.resume": "never",
        **DEMO_SETTINGS,
    }
    return resolve(Sources(flags={path: ("demo", value) for path, value in values.items()}), TrainSettings)


def run_demo(output: Path | None, reporter: Reporter) -> DemoResult:
    """Train on the bundled rows and compare held-out loss and one answer before and after.

    The run directory is kept if `output` names it, and deleted otherwise.

    Raises:
        OutputDirectoryError: `output` holds something else.
    """
    start = time.monotonic()
    with ExitStack() as stack:
        directory = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qlora-demo-"))) / "run"
        prepared = prepare_run(demo_settings(directory), reporter)
        assert prepared.eval_data is not None, "the demonstration has held-out rows"
        prompt, reference = _question(ASSETS / "held_out.jsonl")
        reporter.report(PhaseStarted(title="Measuring the base on held-out rows"))
        loss_before = mean_loss(prepared, prepared.eval_data)
        answer_before = answer(prepared.model, prepared.loaded.tokenizer, prompt)
        result = run(prepared, reporter)
        reporter.report(PhaseStarted(title="Measuring the fine-tuned model on held-out rows"))
        loss_after = mean_loss(prepared, prepared.eval_data)
        answer_after = answer(prepared.model, prepared.loaded.tokenizer, prompt)
    if output is None:
        reporter.report(Noted(message="the run directory was temporary; keep one with --output"))
    inventory = prepared.loaded.inventory
    return DemoResult(
        train=result,
        float32_bytes=inventory.float32_bytes,
        quantized_bytes=inventory.total_bytes,
        loss_before=loss_before,
        loss_after=loss_after,
        loss_drop=1 - loss_after / loss_before,
        prompt=prompt,
        reference=reference,
        answer_before=answer_before,
        answer_after=answer_after,
        kept=output,
        total_seconds=time.monotonic() - start,
    )


@torch.no_grad()
def mean_loss(prepared: PreparedRun, data: PreparedData) -> float:
    """Return the mean loss over all supervised tokens of `data`, one row at a time, in the compute dtype."""
    model, device = prepared.model, prepared.loaded.device
    was_training = model.training
    model.eval()
    total = num_tokens = 0.0
    for row in data.dataset:
        labels = torch.tensor([row["labels"]], device=device)
        count = int((labels[:, 1:] != -100).sum())
        total += count * float(model(input_ids=torch.tensor([row["input_ids"]], device=device), labels=labels).loss)
        num_tokens += count
    model.train(was_training)
    return total / num_tokens


@torch.no_grad()
def answer(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return what the model answers to `prompt`, decoded greedily."""
    was_training = model.training
    model.eval()
    question = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    model.train(was_training)
    answered = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(answered).strip()


def _question(path: Path) -> tuple[str, str]:
    """Return the first held-out question and the answer that Python's documentation gives."""
    with path.open(encoding="utf-8") as file:
        messages = json.loads(file.readline())["messages"]
    return messages[0]["content"], messages[1]["content"]
