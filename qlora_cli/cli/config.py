"""`qlora config`: the resolved settings with their origins, and the schema of a settings file."""

import typer

from qlora_cli.cli import options
from qlora_cli.cli.output import print_json
from qlora_cli.settings.models import json_schema
from qlora_cli.settings.resolve import describe

config_app = typer.Typer(
    name="config", no_args_is_help=True, rich_markup_mode=None, help="Show settings and where they come from."
)


@config_app.command()
def show(
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
    json: options.Json = False,
) -> None:
    """Print every setting, its value and where the value comes from. Takes the flags of train."""
    rows = describe(options.read_sources(context))
    if json:
        print_json({path: {"value": value, "origin": origin.where} for path, value, origin in rows})
        return
    from qlora_cli.cli.render import render_settings

    render_settings(rows)


@config_app.command()
def schema() -> None:
    """Print the JSON schema of a settings file, for editors."""
    print_json(json_schema())
