"""Every setting, defined once: its name, type, bounds, default and one line of help.

The command line, `qlora config schema`, the settings file and `run.json` all read these models. Names are
the field's own: rank, alpha, micro_batch_size, max_length.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from qlora_cli.settings.choices import (
    DEFAULT_METHOD,
    UNQUANTIZED_METHOD,
    Attention,
    Checkpointing,
    DataFormat,
    Device,
    Dtype,
    LoraInit,
    LossOn,
    OnBadRow,
    OnLong,
    OnNan,
    Optimizer,
    Quantization,
    ReportTo,
    Sampling,
    Schedule,
    Storage,
)
from qlora_cli.settings.values import (
    Alphas,
    Columns,
    Datasets,
    Name,
    NameList,
    Ranks,
    RopeScaling,
    TargetModules,
    TargetParameters,
    Texts,
    check_eval_split,
    read_switch,
)

NUMBERS = (int, float, int | None, float | None)


class Section(BaseModel):
    """A group of settings: frozen, its numbers finite, and an unknown name in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_a_switch_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        # Python counts True as 1, so a bare `yes` in YAML would silently be a seed.
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in NUMBERS:
            raise ValueError("expected a number")
        return value


class ModelSettings(Section):
    """The base model."""

    name: str = Field(min_length=1, description="Base model: a local directory or a hub id.")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub id; the default branch if not given."
    )
    base_model: str | None = Field(
        default=None,
        min_length=1,
        description="Base of the adapter or run, as a directory or a hub id, instead of the one that it names.",
    )
    dtype: Dtype = Field(
        default=Dtype.AUTO,
        description="Compute dtype. auto: bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU.",
    )
    device: Device = Field(default=Device.AUTO, description="auto: the GPU if there is one, else the CPU.")
    attention: Attention = Field(default=Attention.AUTO, description="Attention kernel. auto: sdpa, PyTorch's own.")
    offload_embedding: bool = Field(
        default=False, description="Keep the embedding in host memory and look tokens up there; needs a GPU."
    )
    new_tokens: NameList = Field(
        default=None, description="Comma-separated tokens to add to the vocabulary; their rows are trained."
    )
    resize_vocab: bool = Field(
        default=False, description="Grow the embedding (and head) when the tokenizer has more ids than rows."
    )
    rope_scaling: RopeScaling = Field(
        default=None,
        description="Stretch the rotary positions, as TYPE:FACTOR (linear, dynamic or yarn), such as yarn:4.",
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="Chat template: a .jinja file, a name that the tokenizer has, or chatml.",
    )
    allow_pickle: bool = Field(
        default=False, description="Read pickled .bin weights if there are no safetensors; never from a file."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run the Python code that comes with the model; never from a file."
    )


class QuantizationSettings(Section):
    """How the frozen base is quantized on loading."""

    method: Quantization = Field(
        default=DEFAULT_METHOD, description="Data type of the frozen linear layers; none keeps 16 or 32 bit."
    )
    double_quant: bool = Field(
        default=True, description="Quantize the quantization constants too (saves 0.37 bit a parameter)."
    )
    compute_dtype: Dtype = Field(
        default=Dtype.AUTO, description="Dtype that 4-bit layers multiply in. auto: the same as model.dtype."
    )
    quant_storage: Storage = Field(
        default=Storage.UINT8, description="Dtype that holds the packed 4-bit codes; FSDP needs that of the model."
    )
    skip_modules: NameList = Field(
        default=None, description="Comma-separated modules to keep unquantized, besides heads, routers and the like."
    )
    int8_threshold: float = Field(
        default=6.0, ge=0, description="LLM.int8: input features with a larger value are multiplied in 16 bit."
    )
    int8_has_fp16_weight: bool = Field(
        default=False, description="LLM.int8: keep 16-bit weights and quantize them in every product; saves no memory."
    )
    int8_cpu_offload: bool = Field(
        default=False, description="LLM.int8: keep what does not fit on the GPU on the CPU, in fp32; not for training."
    )


UNQUANTIZED = QuantizationSettings(method=UNQUANTIZED_METHOD)


class LoraSettings(Section):
    """The adapter, the only part that trains."""

    rank: int = Field(default=16, ge=1, le=4096, description="Rank of the LoRA matrices.")
    alpha: float = Field(default=32, gt=0, description="LoRA's scale: updates are multiplied by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the input of the LoRA branch.")
    target_modules: TargetModules = Field(
        default="all-linear",
        description="Comma-separated names of the linear layers that get an adapter, or all-linear.",
    )
    target_parameters: TargetParameters = Field(
        default=None,
        description="Comma-separated names of fused expert parameters that get an adapter too, or all-experts.",
    )
    rank_pattern: Ranks = Field(
        default=None, description="Other ranks for some layers, as q_proj=32,layers.0.mlp.down_proj=8."
    )
    alpha_pattern: Alphas = Field(default=None, description="Other alphas for some layers, given the same way.")
    use_rslora: bool = Field(
        default=False, description="Scale by alpha / sqrt(rank), so that a large rank keeps learning (rsLoRA)."
    )
    use_dora: bool = Field(
        default=False, description="Train the magnitude of each weight apart from its direction (DoRA); slower."
    )
    init_lora_weights: LoraInit = Field(
        default=LoraInit.DEFAULT,
        description="How the LoRA matrices begin: pissa takes the principal parts of an unquantized base, loftq what "
        "4-bit quantization lost.",
    )
    modules_to_save: NameList = Field(
        default=None, description="Comma-separated modules to train whole, in fp32, and save with the adapter."
    )


class DataSettings(Section):
    """The rows to train and evaluate on."""

    dataset: Datasets = Field(
        description="Training data: a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, a directory or a glob of "
        "them, or a hub id as ID[@REVISION][:CONFIG[:SPLIT]]; #500 behind it takes a sample, *2 every row twice. "
        "May be given several times.",
    )
    eval_dataset: Datasets | None = Field(default=None, description="Held-out data, named the same way.")
    split: str = Field(default="train", min_length=1, description="Split of a hub data set to train on.")
    eval_split: Annotated[Name | None, BeforeValidator(check_eval_split)] = Field(
        default=None,
        description="Rows to hold out of the training data, as a share (5%) or a number; or the split of a hub data "
        "set to evaluate on.",
    )
    format: DataFormat = Field(default=DataFormat.AUTO, description="How rows are read; auto goes by the columns.")
    columns: Columns = Field(
        default=None, description="What the columns of a format are called here, as prompt=question,completion=reply."
    )
    loss_on: LossOn = Field(
        default=LossOn.COMPLETIONS,
        description="Train on all answers (completions, assistant turns), on the last one of a row, or on all tokens.",
    )
    max_length: int = Field(default=2048, ge=8, description="Longest row in tokens.")
    on_long: OnLong = Field(
        default=OnLong.TRUNCATE,
        description="What becomes of longer rows: cut, dropped, or an error; said in any case.",
    )
    accept_lost: bool = Field(
        default=False,
        description="Go on although more than 1 % of the tokens to train are lost with what is too long.",
    )
    on_bad_row: OnBadRow = Field(
        default=OnBadRow.ERROR,
        description="What becomes of a row that can't be read; skipped ones are written to a file.",
    )
    drop_duplicates: bool = Field(default=False, description="Train on each distinct row once.")
    packing: bool = Field(
        default=False, description="Fill rows up to max_length with several short ones, kept apart from each other."
    )
    streaming: bool = Field(
        default=False,
        description="Read and tokenize rows while training, for what does not fit on the disk; needs max_steps.",
    )


class TrainingSettings(Section):
    """The loop."""

    learning_rate: float = Field(default=2e-4, gt=0, lt=1, description="Peak learning rate.")
    schedule: Schedule = Field(default=Schedule.COSINE, description="Learning-rate schedule after warm-up.")
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps spent warming up.")
    min_lr_ratio: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Where cosine_with_min_lr, polynomial and warmup_stable_decay end: a share of the learning rate.",
    )
    decay_ratio: float = Field(
        default=0.1, gt=0, le=1, description="Share of the steps, at the end, in which warmup_stable_decay decays."
    )
    polynomial_power: float = Field(default=1.0, gt=0, description="Power of the schedule polynomial; 1 is a line.")
    cosine_cycles: int = Field(default=2, ge=2, description="How often cosine_with_restarts falls from the peak to 0.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="Weight decay: decoupled, but with sgd added to the gradient."
    )
    adam_beta2: float = Field(default=0.999, gt=0, lt=1, description="AdamW's second-moment decay.")
    max_grad_norm: float = Field(default=0.3, gt=0, description="Gradients are clipped to this norm.")
    epochs: float = Field(default=1.0, gt=0, description="Passes over the training data.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many steps; overrides epochs.")
    micro_batch_size: int = Field(default=1, ge=1, description="Rows in one forward and backward pass.")
    gradient_accumulation_steps: int = Field(
        default=16, ge=1, description="Micro-batches whose gradients are added up to one step."
    )
    gradient_checkpointing: Annotated[Checkpointing, BeforeValidator(read_switch)] = Field(
        default=Checkpointing.AUTO,
        description="Recompute activations in the backward pass. auto: on with a GPU, off on a CPU; "
        "offload: recompute, and keep what is saved for it in host memory.",
    )
    auto_micro_batch: bool = Field(
        default=False,
        description="Halve the micro-batch, and keep the batch, if the longest rows do not fit before the first step.",
    )
    optimizer: Optimizer = Field(default=Optimizer.ADAMW_TORCH, description="Optimizer of the adapter.")
    loraplus_lr_ratio: float | None = Field(
        default=None, gt=0, description="LoRA+: the B matrices learn at this multiple of the learning rate."
    )
    neftune_noise_alpha: float | None = Field(
        default=None, gt=0, description="NEFTune: scale of the noise on embeddings while training."
    )
    torch_compile: bool = Field(default=False, description="Compile the model with torch.compile.")
    use_liger_kernel: bool = Field(default=False, description="Liger's fused kernels; needs liger-kernel and a GPU.")
    sampling: Sampling = Field(
        default=Sampling.RANDOM,
        description="Order of rows; group_by_length puts rows of one length into a batch, which saves padding.",
    )
    longest_first: bool = Field(
        default=False, description="Begin with the longest rows, so that what does not fit in memory shows at once."
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seeds the adapter, samples and splits of the data, its order and dropout.",
    )
    full_determinism: bool = Field(
        default=False, description="Only deterministic kernels, where PyTorch has them; slower on a GPU."
    )
    on_nan: OnNan = Field(
        default=OnNan.STOP,
        description="What becomes of a step whose loss or gradient norm is no finite number: the run stops before "
        "it, or the step is skipped.",
    )
    max_nan_skips: int = Field(default=10, ge=1, description="More steps skipped for on_nan than this end the run.")
    logging_steps: int = Field(default=1, ge=1, description="Steps between two reports.")
    eval_steps: int | None = Field(
        default=None, ge=1, description="Steps between two evaluations; only at the end if not given."
    )
    save_steps: int | None = Field(
        default=None, ge=1, description="Steps between two checkpoints; a tenth of the run if not given."
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="Stop after this many evaluations without a better held-out loss."
    )
    load_best_model_at_end: bool = Field(
        default=False, description="Write the adapter of the best evaluation, not of the last step."
    )
    sample_prompts: Texts = Field(
        default=None,
        description="Prompts to answer before training and at each evaluation; may be given several times.",
    )
    sample_tokens: int = Field(default=64, ge=1, description="Longest answer to a sample prompt, in tokens.")


class OutputSettings(Section):
    """Where the run is written and reported to."""

    directory: Path = Field(description="Run directory: empty, not there yet, or of a run to resume.")
    resume: str = Field(
        default="auto",
        min_length=1,
        description="auto: go on from the last good checkpoint in the run directory, if there is one; never; or the "
        "path of a checkpoint.",
    )
    max_checkpoints: int = Field(
        default=2, ge=1, description="Older checkpoints than this many are deleted, but for the best one."
    )
    report_to: ReportTo = Field(default=ReportTo.NONE, description="Tracker that the run is also reported to.")
    push_to_hub: str | None = Field(
        default=None,
        min_length=1,
        description="Hub repository, as OWNER/NAME, that the adapter is pushed to at the end.",
    )
    hub_private: bool = Field(default=True, description="Whether that repository is private, if it is made.")


class LoadSettings(Section):
    """What `qlora load` needs."""

    model: ModelSettings
    quantization: QuantizationSettings = Field(default_factory=QuantizationSettings)


class TrainSettings(LoadSettings):
    """What `qlora train` needs: every section."""

    lora: LoraSettings = Field(default_factory=LoraSettings)
    data: DataSettings
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    output: OutputSettings


class InspectDataSettings(LoadSettings):
    """What `qlora inspect-data` needs: what of `train` decides which tokens are trained."""

    data: DataSettings
    training: TrainingSettings = Field(default_factory=TrainingSettings)


class EstimateDataSettings(DataSettings):
    """The rows, of which a prediction needs the length alone."""

    dataset: Datasets | None = Field(  # type: ignore[assignment]
        default=None, description="Not read: memory depends on the length of rows only."
    )


class EstimateSettings(LoadSettings):
    """What `qlora inspect-memory` needs: what `train` takes, less the data and where the run is written."""

    lora: LoraSettings = Field(default_factory=LoraSettings)
    data: EstimateDataSettings = Field(default_factory=EstimateDataSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "quantization": QuantizationSettings,
    "lora": LoraSettings,
    "data": DataSettings,
    "training": TrainingSettings,
    "output": OutputSettings,
}


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a settings file, in which nothing is required: flags may give the rest."""
    schema = TrainSettings.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    schema["title"] = "Settings of qlora"
    return schema
