"""Fine-tune the bundled base on the bundled rows with the code of `qlora train`, and compare before and after."""

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from qlora_cli.answering.answerer import Answerer
from qlora_cli.data.feeding.prepare import PreparedData
from qlora_cli.demo.demo_result import DemoResult
from qlora_cli.evaluating.losses import measure_losses
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from qlora_cli.training.run_plan import PreparedRun, prepare_run
from qlora_cli.training.train_run import run

ASSETS = Path(__file__).parent / "assets"
MAX_ANSWER_TOKENS = 48

# The settings of the demonstration, as flags; configs/demo.yaml has the same.
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


def demo_settings(output: Path, assets: Path = ASSETS) -> Resolved[TrainSettings]:
    """Return the settings of the demonstration, on the base and the rows in `assets`, written to `output`."""
    values = {
        "model.name": str(assets / "base"),
        "data.dataset": str(assets / "train.jsonl"),
        "data.eval_dataset": str(assets / "held_out.jsonl"),
        "output.directory": str(output),
        "output.resume": "never",
        **DEMO_SETTINGS,
    }
    return resolve(Sources(flags={path: ("demo", value) for path, value in values.items()}), TrainSettings)


def run_demo(output: Path | None, reporter: Reporter) -> DemoResult:
    """Train on the bundled rows and compare the held-out loss and an answer before and after.

    The run directory is temporary unless `output` is given.

    Raises:
        OutputDirectoryError: `output` contains other files.
    """
    start = time.monotonic()
    with ExitStack() as stack:
        directory = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qlora-demo-"))) / "run"
        prepared = prepare_run(demo_settings(directory), reporter)
        assert prepared.eval_data is not None, "the demonstration has held-out rows"
        prompt, reference = _question(ASSETS / "held_out.jsonl")
        reporter.report(PhaseStarted(title="Measuring the base on held-out rows"))
        loss_before = _held_out_loss(prepared, prepared.eval_data, reporter)
        answerer = _answerer(prepared)
        answer_before = answerer.answer(prepared.model, prompt)
        result = run(prepared, reporter)
        reporter.report(PhaseStarted(title="Measuring the fine-tuned model on held-out rows"))
        loss_after = _held_out_loss(prepared, prepared.eval_data, reporter)
        answer_after = answerer.answer(prepared.model, prompt)
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


def _held_out_loss(prepared: PreparedRun, data: PreparedData, reporter: Reporter) -> float:
    """Return the mean loss over all trained tokens of `data`."""
    loaded = prepared.loaded
    losses = measure_losses(
        prepared.model,
        data,
        pad_token_id=loaded.tokenizer.pad_token_id,
        dtype=loaded.dtype.torch_dtype,
        batch_size=prepared.plan.micro_batch_size,
        title="held-out rows",
        reporter=reporter,
    )
    return losses.loss


def _answerer(prepared: PreparedRun) -> Answerer:
    return Answerer(
        tokenizer=prepared.loaded.tokenizer,
        end_ids=prepared.end_ids,
        dtype=prepared.loaded.dtype.torch_dtype,
        max_tokens=MAX_ANSWER_TOKENS,
    )


def _question(path: Path) -> tuple[str, str]:
    """Return the first held-out question and the answer that Python's documentation gives."""
    with path.open(encoding="utf-8") as file:
        messages = json.loads(file.readline())["messages"]
    return messages[0]["content"], messages[1]["content"]
