"""The prediction for a run, as plain values. Imports no torch: a cached prediction is shown without it."""

from dataclasses import dataclass, fields

from qlora_cli.memory.report_parts import FittingModel, LargerModel, LockCheck, SpareMemory
from qlora_cli.timing.run_ratios import RunKey

# The error bands, as a share. On the public rows that `benchmarks/measured_rows.py` compares with, the largest errors
# were 0.25 % of allocated and 5.7 % of reserved memory; the band of allocated is wider, for other GPUs and kernels.
ALLOCATED_ERROR = 0.01
RESERVED_ERROR = 0.06

COMPONENTS = (
    "quantized_weights",
    "quantization_constants",
    "unquantized_weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "gathered",
    "workspaces",
    "slack",
    "context",
)
PHASES = ("load", "forward", "backward", "optimizer", "evaluation")


@dataclass(frozen=True, kw_only=True)
class Components:
    """The components of the process's memory at its peak, in bytes; they add up to `Figures.process_bytes`.

    Attributes:
        quantized_weights_bytes: Packed codes.
        quantization_constants_bytes: Scales of blocks, their own scales, code tables.
        unquantized_weights_bytes: Weights in 16 or 32 bit, and buffers.
        adapters_bytes: LoRA matrices and other trained weights.
        gradients_bytes: Of the adapters.
        optimizer_bytes: Its state, and the temporaries of a step.
        activations_bytes: Saved for the backward pass, and temporary.
        loss_bytes: Logits, and what the loss computes from them.
        gathered_bytes: Weights of other processes: of the layer that computes and the next, if the base is sharded.
        workspaces_bytes: Of cuBLAS and inside kernels: dequantized weights among them.
        slack_bytes: Reserved by PyTorch's allocator, and used by no tensor.
        context_bytes: The CUDA context and loaded kernels, outside the allocator.
    """

    quantized_weights_bytes: int
    quantization_constants_bytes: int
    unquantized_weights_bytes: int
    adapters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    loss_bytes: int
    gathered_bytes: int
    workspaces_bytes: int
    slack_bytes: int
    context_bytes: int

    @property
    def weights_bytes(self) -> int:
        """The bytes of the base's weights, with the constants of those that are quantized."""
        return self.quantized_weights_bytes + self.quantization_constants_bytes + self.unquantized_weights_bytes


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The three peaks of a process, in bytes, each with its error band: allocated < reserved < process."""

    allocated_bytes: int
    allocated_low_bytes: int
    allocated_high_bytes: int
    reserved_bytes: int
    reserved_low_bytes: int
    reserved_high_bytes: int
    process_bytes: int
    process_low_bytes: int
    process_high_bytes: int


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The peak of one phase, in bytes. `reserved_bytes` never falls from one phase to the next."""

    name: str
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The time of an optimizer step, by arithmetic on rates of the device.

    `limited_by` is what takes most of it: `compute`, `memory` or `host`, the Python code that starts the kernels.
    `device_seconds` and `host_seconds` are the GPU's and those of one core of the host, which work at the same time.
    `rates` says where the rates come from: a data sheet, or a measurement on this machine. `learnt_ratio` is the
    factor by which `learnt_runs` earlier runs on this machine correct the time; None without any. `key` is what a run
    is stored under that is compared with it.
    """

    micro_batch_seconds: float
    update_seconds: float
    step_seconds: float
    step_seconds_low: float
    step_seconds_high: float
    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    limited_by: str
    device_seconds: float
    host_seconds: float
    rates: str
    key: RunKey
    learnt_ratio: float | None = None
    learnt_runs: int = 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The memory and the time of a run on one GPU.

    Attributes:
        gpu: Its name in the catalogue.
        dtype: The compute dtype on this GPU.
        attention_backends: The attention kernels that run on it, by name.
        paged_bytes: Optimizer state in unified memory, which the figures leave out.
        pinned_host_bytes: Activations that are offloaded to host memory.
        ruling_phase: The phase with the peak.
        reason: A sentence that says why.
        time: None for a GPU that is not in the catalogue.
    """

    gpu: str
    dtype: str
    attention_backends: tuple[str, ...]
    gradient_checkpointing: str
    predicted: Figures
    components: Components
    phases: tuple[Phase, ...]
    paged_bytes: int
    pinned_host_bytes: int
    ruling_phase: str
    reason: str
    time: StepTime | None = None


@dataclass(frozen=True, kw_only=True)
class GpuFit:
    """Whether a run fits on a GPU: `yes` with the whole error band, `no` even at its lower end, else `tight`.

    `margin_bytes` is the usable memory less that of the process; negative if it is too small.
    `gradient_checkpointing` is that of the run, which may be chosen for the GPU. `step_seconds` is the time of its
    optimizer step; None for a GPU that is not in the catalogue.
    """

    gpu: str
    group: str
    fits: str
    usable_bytes: int
    process_bytes: int
    process_high_bytes: int
    margin_bytes: int
    gradient_checkpointing: str
    step_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Product:
    """The products of all linear layers of one name in a micro-batch: the size of their results, and their cost."""

    name: str
    kept_bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class PlanOption:
    """One way to run: what is chosen for the settings left open, its memory and time, and whether it fits.

    `recomputed_products` are the linear layers whose products `selective` recomputes for want of memory.
    `micro_batch_tokens` are None where micro-batches are not filled, or how they are was given. `step_seconds` is None
    for a GPU whose speed is not known.
    """

    gradient_checkpointing: str
    recomputed_products: tuple[str, ...]
    micro_batch_tokens: int | None
    process_bytes: int
    process_high_bytes: int
    fits: str
    step_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The fastest run that fits on a GPU, and the two nearest to it in memory, the larger first."""

    chosen: PlanOption
    alternatives: tuple[PlanOption, ...]


@dataclass(frozen=True, kw_only=True)
class MethodOption:
    """A run with its base stored by one method.

    Attributes:
        quantization: The method.
        weights_bytes: What the weights take of the GPU's memory, and the CUDA context.
        run: How it would run; None if the weights alone do not fit.
    """

    quantization: str
    weights_bytes: int
    run: PlanOption | None


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A change of flags that makes a run fit, or brings it nearer to that."""

    flags: str
    effect: str
    saved_bytes: int
    process_bytes: int
    fits: str


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The largest value of a setting with which the run fits on a GPU; None if it fits with none."""

    setting: str
    gpu: str
    value: int | None
    process_bytes: int | None
    limited_by: str | None


@dataclass(frozen=True, kw_only=True)
class RankedCard:
    """A card, or several of it, on which a run fits, with the time, cost and energy of the whole run.

    These are as in `RunFigures`. `price` is that of an hour of one; it and `cost` are None if none was given for the
    card. `strategy` is what each of several holds of the base.
    """

    gpu: str
    num_gpus: int
    strategy: str
    price: float | None
    run_seconds: float
    run_seconds_low: float
    run_seconds_high: float
    cost: float | None
    cost_low: float | None
    cost_high: float | None
    energy_wh: float | None
    process_bytes: int
    process_high_bytes: int
    gradient_checkpointing: str
    micro_batch_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class CardClass:
    """All cards that are sold with as many GB, on each of which a run fits with its whole error band.

    `gpus` are their names, the most common first; the other figures are those of the class, as of a GPU with the least
    memory and the largest CUDA context of them.
    """

    size_gb: int
    gpus: tuple[str, ...]
    usable_bytes: int
    process_bytes: int
    process_high_bytes: int


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """The memory of a run with other `values` of some settings, keyed by the flag's name without dashes.

    `gradient_checkpointing` is not planned for each of them. What is about the time of a step is as in `StepTime`,
    and None for a GPU whose speed is not known.
    """

    values: dict[str, int]
    gradient_checkpointing: str
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    ruling_phase: str
    step_seconds: float | None
    step_seconds_low: float | None
    step_seconds_high: float | None
    tokens_per_second: float | None
    tokens_per_second_low: float | None
    tokens_per_second_high: float | None
    limited_by: str | None


@dataclass(frozen=True, kw_only=True)
class RunFigures(Figures):
    """The peaks of a run, the time of its optimizer step and of all its steps, with the ends of the error bands.

    What is about time is None for a GPU that is not in the catalogue and was not measured; `limited_by`, `rates`,
    `learnt_ratio` and `learnt_runs` are those of `StepTime`. From `num_steps` on, it is also None if neither rows nor
    a data set were given. `run_limited_by` is what takes most of the run, which has shorter rows than the step. `cost`
    is in the currency of the price that was given, and `energy_wh` the GPU's at its rated power, in watt-hours; None
    where that is unknown. `disk_bytes` is the largest size of the run directory, and `download_bytes` that of the
    base's weight files; 0 if they are on this disk.
    """

    step_seconds: float | None = None
    step_seconds_low: float | None = None
    step_seconds_high: float | None = None
    tokens_per_second: float | None = None
    tokens_per_second_low: float | None = None
    tokens_per_second_high: float | None = None
    limited_by: str | None = None
    rates: str | None = None
    learnt_ratio: float | None = None
    learnt_runs: int = 0
    num_steps: int | None = None
    run_seconds: float | None = None
    run_seconds_low: float | None = None
    run_seconds_high: float | None = None
    run_limited_by: str | None = None
    cost: float | None = None
    cost_low: float | None = None
    cost_high: float | None = None
    energy_wh: float | None = None
    energy_wh_low: float | None = None
    energy_wh_high: float | None = None
    host_bytes: int | None = None
    host_bytes_low: int | None = None
    host_bytes_high: int | None = None
    disk_bytes: int | None = None
    download_bytes: int | None = None


def figures_of_run(estimate: Estimate) -> RunFigures:
    """Return the figures of an estimate with those of its time."""
    time = {} if estimate.time is None else vars(estimate.time)
    names = {field.name for field in fields(RunFigures)}
    return RunFigures(**vars(estimate.predicted), **{name: value for name, value in time.items() if name in names})


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """The parts of the memory that one process takes from its host, in bytes; they do not all peak at the same time.

    Attributes:
        num_processes: Processes of the run on one host, each of which takes them; only the first one saves.
        process_bytes: Python, the libraries and the CUDA driver's part: a guess.
        embedding_bytes: Of an embedding that stays on the host.
        shard_bytes: Of the base, if it is kept on the host.
        rows_bytes: What is known of each row of the data.
        reading_bytes: The largest weight, while the base is read; the whole embedding and head, if they are sharded.
        pinned_bytes: Offloaded activations.
        saving_bytes: A checkpoint that is written.
        paged_bytes: Optimizer state that may move to the host.
    """

    process_bytes: int
    embedding_bytes: int
    rows_bytes: int
    reading_bytes: int
    pinned_bytes: int
    saving_bytes: int
    paged_bytes: int
    shard_bytes: int = 0
    num_processes: int = 1


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What each of several GPUs holds of a sharded base, and receives of the others.

    Attributes:
        shard_bytes: Of the base, with the whole embedding twice where the head shares it.
        received_bytes_per_step: Weights that each GPU receives in an optimizer step, forward and backward.
        link: What they are sent over.
        receiving_seconds: Of a step, at the rate of the link; hidden by computation where that takes longer.
        copied_bytes_per_step: Of the shard, from host memory to the GPU in a step; 0 if it is kept on the GPU.
        copying_seconds: Of a step, at the rate of the GPU's own link to the host; None if that is not known.
    """

    num_gpus: int
    shard_bytes: int
    received_bytes_per_step: int
    link: str
    receiving_seconds: float
    copied_bytes_per_step: int = 0
    copying_seconds: float | None = 0.0


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """The rows of a data set as `train` would feed them, counted as in its plan; lengths in tokens.

    `num_packed_rows` is None without packing, `num_eval_rows` without held-out rows. `padding_share` is that of the
    first epoch; `num_micro_batches` are those of the whole run.
    """

    name: str
    num_train_rows: int
    num_packed_rows: int | None
    num_eval_rows: int | None
    num_train_tokens: int
    longest_row_tokens: int
    num_truncated_rows: int
    padding_share: float
    num_micro_batches: int


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The result of `qlora inspect-memory`.

    Attributes:
        data: None if no data set was read.
        fits: For the requested GPUs, or for every GPU of the catalogue.
        sharding: None unless the base is sharded among several GPUs.
        plan: What was chosen for the first requested GPU; None if the settings leave nothing open, or none is named.
        methods: The methods that `--quant auto` looked at, the least quantization first; None if one was given.
        unquantized: The run with its base in 16 bit, if how it is stored was not asked for and that fits on the first
            requested GPU, too.
        spare: What a memory budget leaves on the first requested GPU; None without one, or if nothing is quantized.
        smallest_gpu: The smallest GPU of the catalogue on which the run fits; None if there is none.
        smallest_class: The smallest class on each card of which the run fits.
        roomy_class: The smallest class on which a quarter of the memory is left.
        suggestions: Changes that make the run fit on the first requested GPU, if it does not.
        longer_rows: The longest rows that fit on the first requested GPU, if the run fits there and they are longer
            than those of the run; whole layers are recomputed for them where checkpointing is open. `limited_by` is
            None if even longer ones were not tried.
        larger_model: The largest model with a preset that fits on that GPU, if the requested one does.
        fitting_model: The largest model of the catalogue that fits on that GPU, if no change does it.
        cards: The best cards for the run, best first; None if they were not asked for.
        assumptions: What the prediction takes for granted, in sentences.
        check: The comparison with an earlier prediction, if one was asked for.
    """

    model: str
    architecture: str
    num_parameters: int
    num_trainable_parameters: int
    settings: dict[str, str]
    data: DataSummary | None
    gpu: str
    dtype: str
    attention_backends: tuple[str, ...]
    predicted: RunFigures
    components: Components
    phases: tuple[Phase, ...]
    ruling_phase: str
    reason: str
    paged_bytes: int
    pinned_host_bytes: int
    host: HostMemory
    sharding: Sharding | None
    plan: Plan | None
    methods: tuple[MethodOption, ...] | None
    unquantized: PlanOption | None
    fits: tuple[GpuFit, ...]
    smallest_gpu: str | None
    smallest_class: CardClass | None
    roomy_class: CardClass | None
    suggestions: tuple[Suggestion, ...]
    longer_rows: Solution | None
    larger_model: LargerModel | None
    fitting_model: FittingModel | None
    solutions: tuple[Solution, ...]
    cards: tuple[RankedCard, ...] | None
    sweep: tuple[SweepPoint, ...]
    assumptions: tuple[str, ...]
    estimate_seconds: float
    spare: SpareMemory | None = None
    check: LockCheck | None = None
