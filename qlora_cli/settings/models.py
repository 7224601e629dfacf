"""Every setting, defined once: its name, type, bounds, default and one line of help.

The command line, `qlora config schema`, the settings file and `run.json` all read these models. Names are
the field's own: rank, alpha, micro_batch_size, max_length.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator


class Quantization(StrEnum):
    """How the frozen base is stored. `none` keeps its linear layers in 16 or 32 bit."""

    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"
    NONE = "none"

    @property
    def is_4bit(self) -> bool:
        """Whether two weights share a byte."""
        return self in {Quantization.NF4, Quantization.FP4}


class Storage(StrEnum):
    """The dtype that packed 4-bit codes are kept in. FSDP shards only floating-point tensors of one dtype."""

    UINT8 = "uint8"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Dtype(StrEnum):
    """The dtype that matrix products are computed in."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Device(StrEnum):
    """Where the model lives."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Attention(StrEnum):
    """The attention kernel."""

    AUTO = "auto"
    EAGER = "eager"
    SDPA = "sdpa"
    FLASH_ATTENTION_2 = "flash_attention_2"


class DataFormat(StrEnum):
    """How a row is read. `auto` recognises it by its columns."""

    AUTO = "auto"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PROMPT_COMPLETION = "prompt_completion"
    ALPACA = "alpaca"
    QUESTION_ANSWER = "question_answer"
    TEXT = "text"
    TOKENS = "tokens"


class LossOn(StrEnum):
    """Which tokens are trained: all answers, the last answer of a row only, or every token of it."""

    COMPLETIONS = "completions"
    LAST = "last"
    ALL = "all"


class OnLong(StrEnum):
    """What becomes of a row that is longer than `max_length`."""

    TRUNCATE = "truncate"
    DROP = "drop"
    ERROR = "error"


class OnBadRow(StrEnum):
    """What becomes of a row that can't be read."""

    ERROR = "error"
    SKIP = "skip"


class Sampling(StrEnum):
    """The order of rows, by the name that transformers gives it."""

    RANDOM = "random"
    SEQUENTIAL = "sequential"
    GROUP_BY_LENGTH = "group_by_length"


class Checkpointing(StrEnum):
    """Whether activations are recomputed in the backward pass; `offload` keeps the layers' inputs in host memory."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"
    OFFLOAD = "offload"


class Optimizer(StrEnum):
    """The optimizer, by the name that transformers gives it."""

    ADAMW_TORCH = "adamw_torch"
    ADAMW_TORCH_FUSED = "adamw_torch_fused"
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    PAGED_ADAMW_32BIT = "paged_adamw_32bit"

    @property
    def is_paged(self) -> bool:
        """Whether the state lives in CUDA unified memory."""
        return self.value.startswith("paged_")


class Schedule(StrEnum):
    """How the learning rate runs after warm-up."""

    CONSTANT = "constant_with_warmup"
    LINEAR = "linear"
    COSINE = "cosine"


class ReportTo(StrEnum):
    """A tracker that the run is also reported to."""

    NONE = "none"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"
    MLFLOW = "mlflow"


def _switch(value: object) -> object:
    # YAML 1.1 reads a bare `on` and `off` as booleans.
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _split_commas(value: object) -> object:
    if not isinstance(value, str) or value in {"all-linear", "all-experts"}:
        return value
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not parts:
        raise ValueError("must name at least one")
    return parts


def _check_rope_scaling(value: str | None) -> str | None:
    if value is None:
        return None
    kind, _, factor = value.partition(":")
    if kind not in ROPE_TYPES or not re.fullmatch(r"[0-9]+(\.[0-9]+)?", factor) or float(factor) <= 1:
        raise ValueError(f"expected TYPE:FACTOR, TYPE one of {', '.join(ROPE_TYPES)} and FACTOR above 1")
    return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _read_pairs(value: object) -> object:
    """Read `ours=theirs,…` into a mapping; a settings file may hold the mapping itself."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if not pairs or any(not equals or not ours.strip() or not theirs.strip() for ours, equals, theirs in pairs):
        raise ValueError("expected pairs such as prompt=question,completion=reply")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def held_out_share(text: str) -> float | int | None:
    """Return what `eval_split` asks to hold out: a share below 1, or a number of rows; None for a split's name.

    Raises:
        ValueError: it is a share or a number that makes no sense.
    """
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)? *%?", text):
        return None
    number = float(text.removesuffix("%"))
    if text.endswith("%") and 0 < number < 100:
        return number / 100
    if not text.endswith("%") and number >= 1 and number == int(number):
        return int(number)
    raise ValueError("expected a share above 0% and below 100%, a whole number of rows, or the name of a split")


def _check_eval_split(value: object) -> object:
    # YAML reads a bare number as one.
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if isinstance(text, str):
        held_out_share(text)
    return text


ROPE_TYPES = ("linear", "dynamic", "yarn")
RopeScaling = Annotated[str | None, AfterValidator(_check_rope_scaling)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]
TargetModules = Annotated[Literal["all-linear"] | Names, BeforeValidator(_split_commas)]
TargetParameters = Annotated[Literal["all-experts"] | Names | None, BeforeValidator(_split_commas)]
NameList = Annotated[Names | None, BeforeValidator(_split_commas)]
Name = Annotated[str, Field(min_length=1)]
Datasets = Annotated[tuple[Name, ...], Field(min_length=1), BeforeValidator(_as_list)]
Columns = Annotated[Mapping[str, Name] | None, BeforeValidator(_read_pairs)]


NUMBERS = (int, float, int | None)


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
        default=Quantization.NF4, description="Data type of the frozen linear layers; none keeps 16 or 32 bit."
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


class DataSettings(Section):
    """The rows to train and evaluate on."""

    dataset: Datasets = Field(
        description="Training data: a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, a directory or a glob of "
        "them, or a hub id as ID[@REVISION][:CONFIG[:SPLIT]]; #500 behind it takes a sample, *2 every row twice. "
        "May be given several times.",
    )
    eval_dataset: Datasets | None = Field(default=None, description="Held-out data, named the same way.")
    split: str = Field(default="train", min_length=1, description="Split of a hub data set to train on.")
    eval_split: Annotated[Name | None, BeforeValidator(_check_eval_split)] = Field(
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
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    adam_beta2: float = Field(default=0.999, gt=0, lt=1, description="AdamW's second-moment decay.")
    max_grad_norm: float = Field(default=0.3, gt=0, description="Gradients are clipped to this norm.")
    epochs: float = Field(default=1.0, gt=0, description="Passes over the training data.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many steps; overrides epochs.")
    micro_batch_size: int = Field(default=1, ge=1, description="Rows in one forward and backward pass.")
    gradient_accumulation_steps: int = Field(
        default=16, ge=1, description="Micro-batches whose gradients are added up to one step."
    )
    gradient_checkpointing: Annotated[Checkpointing, BeforeValidator(_switch)] = Field(
        default=Checkpointing.AUTO,
        description="Recompute activations in the backward pass. auto: on with a GPU, off on a CPU; "
        "offload: recompute, and keep what is saved for it in host memory.",
    )
    optimizer: Optimizer = Field(default=Optimizer.ADAMW_TORCH, description="Optimizer of the adapter.")
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
    logging_steps: int = Field(default=1, ge=1, description="Steps between two reports.")
    eval_steps: int | None = Field(
        default=None, ge=1, description="Steps between two evaluations; only at the end if not given."
    )
    save_steps: int | None = Field(
        default=None, ge=1, description="Steps between two checkpoints; only at the end if not given."
    )


class OutputSettings(Section):
    """Where the run is written and reported to."""

    directory: Path = Field(description="Run directory to create; it must be empty or not exist.")
    max_checkpoints: int = Field(default=2, ge=1, description="Older checkpoints than this many are deleted.")
    report_to: ReportTo = Field(default=ReportTo.NONE, description="Tracker that the run is also reported to.")


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
