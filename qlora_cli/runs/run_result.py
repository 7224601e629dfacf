"""The plan and the result of a run, as plain values. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from qlora_cli.events import Rewards
from qlora_cli.runs.adapter_health import AdapterHealth
from qlora_cli.runs.checkpoints import list_checkpoints
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.forgetting import Forgetting
from qlora_cli.runs.record import RunRecord, recorded_path
from qlora_cli.units import counted, format_bytes


@dataclass(frozen=True, kw_only=True)
class PredictedMemory:
    """The predicted memory of a run on its GPU, in bytes; `allocated_bytes` is the peak after loading.

    `fits` is `yes`, `tight` or `no`. `consumers` are the parts of the process's memory at its peak, the largest first.
    """

    gpu: str
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    fits: str
    consumers: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class PredictedTime:
    """The predicted seconds of an optimizer step with the run's own rows, on average, and their band.

    `rates` says where the rates of the device come from. `learnt_ratio` is the factor by which `learnt_runs` earlier
    runs on this machine correct the prediction; None without any.
    """

    step_seconds: float
    step_seconds_low: float
    step_seconds_high: float
    rates: str
    learnt_ratio: float | None = None
    learnt_runs: int = 0

    def ratio_of(self, measured_seconds: float) -> float:
        """Return the measured seconds of a step, as a multiple of those predicted without a correction."""
        return measured_seconds / self.step_seconds * (self.learnt_ratio or 1.0)


@dataclass(frozen=True, kw_only=True)
class KeptLayers:
    """The `modules`, of `num_layers` that would be quantized, that stay unquantized by a run's memory budget.

    They take `extra_bytes` of the `spare_bytes` that the plan left of `budget_bytes`. On `num_tokens` of rows that
    they were not chosen by, `mean_kl_quantized` is the divergence from the unquantized model, in nats a token, with
    all layers quantized, and `mean_kl` that with these unquantized.
    """

    budget_bytes: int
    spare_bytes: int
    extra_bytes: int
    num_layers: int
    modules: tuple[str, ...]
    mean_kl_quantized: float
    mean_kl: float
    num_tokens: int

    @classmethod
    def of_run(cls, record: RunRecord) -> "KeptLayers | None":
        """Return those of a recorded run; None if it has none, or they can't be read."""
        try:
            return TypeAdapter(cls).validate_python(record.plan.content.get("kept_layers"))
        except ValidationError:
            return None

    @property
    def sentence(self) -> str:
        """What is kept, and what it gains, in words."""
        layers = f"{len(self.modules):,} of {counted(self.num_layers, 'layer')} stay unquantized"
        gain = f"{self.mean_kl_quantized:.3g} → {self.mean_kl:.3g} nats a token on other rows"
        return f"{layers}, {format_bytes(self.extra_bytes)} more; the divergence from the unquantized model: {gain}"


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """The plan of a run before the first step. Sizes in bytes, lengths in tokens.

    `predicted_memory` is None without a GPU, `predicted_time` where the speed of the device is not known,
    `num_packed_rows` without packing, `num_epochs` for a stream, whose numbers of rows and tokens are those of its
    first rows. `padding_share` is the share of the tokens in the first epoch. `micro_batch_tokens` is None if
    micro-batches have `micro_batch_size` rows each, `kept_layers` without a memory budget, or if it leaves none.
    """

    model: str
    output: Path
    device: str
    quantization: str
    compute_dtype: str
    compute_dtype_reason: str
    attention: str
    gradient_checkpointing: str
    optimizer: str
    num_parameters: int
    num_trainable_parameters: int
    data_format: str
    num_train_rows: int
    num_packed_rows: int | None
    num_eval_rows: int | None
    num_train_tokens: int
    num_supervised_tokens: int
    longest_row_tokens: int
    num_truncated_rows: int
    num_dropped_rows: int
    num_lost_supervised_tokens: int
    padding_share: float
    micro_batch_size: int
    gradient_accumulation_steps: int
    num_devices: int
    examples_per_step: int
    num_steps: int
    save_steps: int
    num_epochs: float | None
    adapter_bytes: int
    optimizer_bytes: int
    checkpoint_bytes: int
    disk_bytes: int
    predicted_memory: PredictedMemory | None
    notes: tuple[str, ...] = ()
    micro_batch_tokens: int | None = None
    predicted_time: PredictedTime | None = None
    kept_layers: KeptLayers | None = None

    @property
    def batch(self) -> str:
        """The rows of a step and their division, in words."""
        examples = f"{counted(self.examples_per_step, 'example')} a step"
        shared = "" if self.num_devices == 1 else f", shared by {self.num_devices} devices"
        if self.micro_batch_tokens is not None:
            return f"{examples} in micro-batches of up to {counted(self.micro_batch_tokens, 'token')}{shared}"
        if shared:
            size = counted(self.micro_batch_size, "row")
            return f"{examples} in {self.gradient_accumulation_steps} micro-batches of {size}{shared}"
        return (
            f"{self.micro_batch_size} micro-batch x {self.gradient_accumulation_steps} accumulation x 1 device = "
            f"{examples}"
        )


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """The largest memory seen, in bytes; the device figures are None without a GPU."""

    host_bytes: int
    device_allocated_bytes: int | None
    device_reserved_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a run that ended: all its steps are done, or a signal stopped it after a checkpoint.

    `epochs` is None for a stream. `final_loss` is that of the last reported step, `train_loss` the mean over all
    steps; both are means over trained tokens, or over what is compared, which alone has rewards: `rewards` at the last
    reported step, `eval_rewards` of those held out at the end. `num_tokens` counts the tokens without padding.
    `train_seconds` is the duration of the loop with its evaluations and checkpoints, `total_seconds` includes loading,
    `tokens_per_second` is computed from the durations of the steps only, and `step_seconds` is the median of the first
    ten steps after the first one in this process. The peaks of a resumed run are those of its
    last process; all other figures count each step once: what a killed process did after its last checkpoint is in
    neither tokens nor seconds. `best_step` is the step with the lowest held-out loss, `pushed_to` the adapter's
    repository on the hub, and `notes` are those on model and tokenizer. `adapter_health` is None for a run that
    was stopped, and `forgetting` where general text was not measured. Values that an older version did not record
    are None, or else 0.
    """

    output: Path
    adapter: Path
    steps: int
    num_steps: int
    epochs: float | None
    final_loss: float | None
    train_loss: float | None
    eval_loss: float | None
    num_tokens: int
    tokens_per_second: float
    train_seconds: float
    total_seconds: float
    peak_memory: PeakMemory
    predicted_memory: PredictedMemory | None
    num_trainable_parameters: int
    interrupted_by: str | None
    checkpoints: tuple[Path, ...]
    resumed_from_step: int | None
    stopped_early: bool
    best_step: int | None
    best_eval_loss: float | None
    num_skipped_steps: int
    pushed_to: str | None
    notes: tuple[str, ...] = ()
    step_seconds: float | None = None
    predicted_time: PredictedTime | None = None
    adapter_health: AdapterHealth | None = None
    forgetting: Forgetting | None = None
    rewards: Rewards | None = None
    eval_rewards: Rewards | None = None

    def recorded(self) -> dict[str, object]:
        """Return the result as `run.json` records it, with relative paths, so that the run may be moved."""
        directory = RunDirectory(self.output)
        own = {
            "output": recorded_path(directory, self.output),
            "adapter": recorded_path(directory, self.adapter),
            "checkpoints": [recorded_path(directory, path) for path in self.checkpoints],
        }
        return {**asdict(self), **own}

    @classmethod
    def of_run(cls, directory: RunDirectory, record: RunRecord) -> "TrainResult | None":
        """Return the recorded result of a run; None if there is none.

        Missing values, as in runs of older versions, and invalid ones are replaced by defaults: a run that is done
        stays done.
        """
        if record.result is None:
            return None
        own = {
            "output": directory.path,
            "adapter": directory.adapter,
            "checkpoints": list_checkpoints(directory.checkpoints),
        }
        num_steps = record.plan.num_steps or 0
        gaps = {**_gaps_of(cls), "steps": num_steps, "num_steps": num_steps, **own}
        content = {**gaps, **record.result.content, **own}
        try:
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            damaged = {str(problem["loc"][0]) for problem in error.errors(include_url=False)}
            return TypeAdapter(cls).validate_python({**content, **{key: gaps[key] for key in damaged}})


def _gaps_of(kind: Any) -> dict[str, object]:
    return {field.name: _gap_of(field.type) for field in fields(kind)}


def _gap_of(kind: Any) -> object:
    """Return the default for an unknown value."""
    if type(None) in get_args(kind):
        return None
    if isinstance(kind, type) and is_dataclass(kind):
        return kind(**_gaps_of(kind))
    return kind()
