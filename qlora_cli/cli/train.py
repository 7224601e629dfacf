"""`qlora train`: fine-tune a LoRA adapter on a quantized base."""

import signal
from typing import Annotated

import typer

from qlora_cli.cli import options
from qlora_cli.cli.output import print_json
from qlora_cli.settings.models import TrainSettings
from qlora_cli.training.preflight import check_train_inputs


def train(
    context: typer.Context,
    model: options.Model = None,
    revision: options.Revision = None,
    quant: options.Quant = None,
    double_quant: options.DoubleQuant = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    attention: options.Attention = None,
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    target_modules: options.TargetModules = None,
    dataset: options.DatasetName = None,
    eval_dataset: options.EvalDataset = None,
    max_length: options.MaxLength = None,
    learning_rate: options.LearningRate = None,
    epochs: options.Epochs = None,
    max_steps: options.MaxSteps = None,
    micro_batch_size: options.MicroBatchSize = None,
    gradient_accumulation_steps: options.GradientAccumulationSteps = None,
    gradient_checkpointing: options.GradientCheckpointing = None,
    optimizer: options.Optimizer = None,
    seed: options.Seed = None,
    output: options.Output = None,
    report_to: options.ReportTo = None,
    config: options.Config = None,
    assignments: options.Assign = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do all up to the first step; say what would run.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Fine-tune a LoRA adapter on a frozen 4-bit base, and write a run directory."""
    resolved = options.resolve_settings(context, TrainSettings)
    check_train_inputs(resolved)

    from qlora_cli.cli.progress import reporting  # rich, and below torch: only once the input is right
    from qlora_cli.cli.render import render_plan, render_training

    with reporting() as reporter:
        from qlora_cli.training import run

        if dry_run:
            plan = run.plan(resolved, reporter)
        else:
            result = run.train(resolved, reporter)
    if dry_run:
        print_json(plan) if json else render_plan(plan)
        return
    print_json(result) if json else render_training(result)
    if result.interrupted_by is not None:
        raise typer.Exit(128 + signal.Signals[result.interrupted_by])
