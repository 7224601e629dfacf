"""Enumerated settings, by the field's own names, with their synonyms.

The properties of a choice that settings and messages depend on are defined with it, so that no other code has to
compare names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qlora_cli.settings.enumerated import Choice, DtypeChoice


@dataclass(frozen=True, kw_only=True)
class MethodTraits:
    """The properties of a quantization method that settings and messages depend on; its module implements it.

    Attributes:
        module: Its module in `qlora_cli/quantization/methods`.
        label: Its name for people.
        bits: The bits of a weight, without constants.
        measures_error: Whether the error of a weight can be measured while it is quantized.
        proposal: Its effect, if it is suggested to save memory; None if it never is.
        sharding_problem: Why a base that is stored so can't be sharded; None if it can.
    """

    module: str
    label: str
    bits: int
    measures_error: bool = False
    proposal: str | None = None
    sharding_problem: str | None = None


class Quantization(Choice):
    """How the frozen base is stored. `none` keeps its linear layers in 16 or 32 bit.

    `auto` leaves it open until the memory of the run is known; the others are methods, and keys of `METHODS`.
    """

    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"
    NONE = "none"
    AUTO = "auto"

    @classmethod
    def synonyms(cls) -> dict[str, str]:
        """Return the methods by names of their bit width, if no other method has the same."""
        names = ((name, method) for method in METHODS for name in method.names_of_bits)
        return {name: method.value for name, method in names if name != method.value and cls.of_bits(name) == [method]}

    @classmethod
    def of_bits(cls, text: str) -> list["Quantization"]:
        """Return the methods with the bit width that `text` names, such as `4bit`, `4-bit` or `int4`."""
        return [method for method in METHODS if text.lower() in method.names_of_bits]

    @property
    def names_of_bits(self) -> tuple[str, ...]:
        """Common names of the bit width; empty if weights are not quantized."""
        forms = ("int{}", "{}bit", "{}-bit", "{}_bit", "{} bit", "{}bits", "{}-bits", "{} bits")
        return tuple(form.format(self.traits.bits) for form in forms) if self.is_quantized else ()

    @classmethod
    def hint_for(cls, value: str) -> str | None:
        """Return which methods to choose from if `value` names the bit width of several."""
        methods = cls.of_bits(value)
        default = f"; {DEFAULT_METHOD.value} is the default" if DEFAULT_METHOD in methods else ""
        return f"Choose {' or '.join(methods)}{default}." if methods else None

    @property
    def traits(self) -> MethodTraits:
        """The properties that settings and messages depend on; `auto` has none until it is settled."""
        return METHODS[self]

    @property
    def is_quantized(self) -> bool:
        """Whether linear layers are stored in fewer than 16 bits."""
        return self.traits.bits < UNQUANTIZED_BITS

    def smaller(self) -> list["Quantization"]:
        """Return the methods to suggest if this one takes too much memory, the most exact first."""
        smaller = [method for method in METHODS if method.traits.proposal and method.traits.bits < self.traits.bits]
        return sorted(smaller, key=lambda method: -method.traits.bits)


UNQUANTIZED_BITS = 16
METHODS: Mapping[Quantization, MethodTraits] = {
    Quantization.NF4: MethodTraits(
        module="four_bit",
        label="NF4",
        bits=4,
        measures_error=True,
        proposal="weights in 4 bit, less exact",
    ),
    Quantization.FP4: MethodTraits(module="four_bit", label="FP4", bits=4, measures_error=True),
    Quantization.INT8: MethodTraits(
        module="int8",
        label="LLM.int8()",
        bits=8,
        proposal="weights in 8 bit, a little less exact",
        sharding_problem="bitsandbytes keeps a copy of each weight of its own",
    ),
    Quantization.NONE: MethodTraits(module="unquantized", label="not quantized", bits=UNQUANTIZED_BITS),
}
DEFAULT_METHOD, UNQUANTIZED_METHOD = Quantization.NF4, Quantization.NONE
LEAST_FIRST = (UNQUANTIZED_METHOD, *UNQUANTIZED_METHOD.smaller())  # the methods that `auto` chooses from
QUANTIZED = tuple(method for method in METHODS if method.is_quantized)


def methods_of(module: str) -> tuple[Quantization, ...]:
    """Return the methods that `module`, in `qlora_cli/quantization/methods`, implements."""
    return tuple(method for method in METHODS if method.traits.module == module)


def quant_flag(methods: Iterable[Quantization]) -> str:
    """Return the flag for one of `methods`, as text: `--quant nf4 or fp4`."""
    return f"--quant {' or '.join(methods)}"


class Storage(DtypeChoice):
    """The dtype that packed 4-bit codes are stored in. FSDP shards only floating-point tensors of one dtype."""

    UINT8 = "uint8"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Dtype(DtypeChoice):
    """The dtype of matrix products."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Device(Choice):
    """The device that the model runs on."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Attention(Choice):
    """The attention kernel. `blockwise`: the model's own attention, for a block of queries at a time.

    Those after it run on a GPU only. `flex_attention` is generated by PyTorch's compiler, the others are packages.
    """

    AUTO = "auto"
    EAGER = "eager"
    SDPA = "sdpa"
    BLOCKWISE = "blockwise"
    FLEX_ATTENTION = "flex_attention"
    FLASH_ATTENTION_2 = "flash_attention_2"
    FLASH_ATTENTION_3 = "flash_attention_3"

    @property
    def is_compiled(self) -> bool:
        """Whether PyTorch's compiler generates it: it can't keep single products of what it computes."""
        return self == Attention.FLEX_ATTENTION

    @property
    def package(self) -> str | None:
        """The package that it needs in addition to PyTorch itself; None for nothing."""
        return ATTENTION_PACKAGES.get(self)


ATTENTION_PACKAGES: Mapping[Attention, str] = {
    Attention.FLEX_ATTENTION: "triton",
    Attention.FLASH_ATTENTION_2: "flash-attn",
    Attention.FLASH_ATTENTION_3: "flash-attn-3",
}


class LossOn(Choice):
    """Which tokens are trained: all answers, the last answer of a row only, or every token of it."""

    COMPLETIONS = "completions"
    LAST = "last"
    ALL = "all"


class OnLong(Choice):
    """What to do with a row that is longer than `max_length`."""

    TRUNCATE = "truncate"
    DROP = "drop"
    ERROR = "error"


class OnBadRow(Choice):
    """What to do with a row that can't be read."""

    ERROR = "error"
    SKIP = "skip"


class Mixing(Choice):
    """The meaning of the weights of several data sets: how often each row is used, or the shares of all rows.

    Shares hold until the first or the last data set is exhausted; the names are those of `datasets`.
    """

    WEIGHTS = "weights"
    FIRST_EXHAUSTED = "first_exhausted"
    ALL_EXHAUSTED = "all_exhausted"


class Sampling(Choice):
    """The order of rows, by its name in transformers."""

    RANDOM = "random"
    SEQUENTIAL = "sequential"
    GROUP_BY_LENGTH = "group_by_length"


class Checkpointing(Choice):
    """Whether activations are recomputed in the backward pass.

    `selective` keeps those that are expensive to recompute; `offload` keeps the layers' inputs in host memory.
    """

    AUTO = "auto"
    ON = "on"
    SELECTIVE = "selective"
    OFF = "off"
    OFFLOAD = "offload"


class LoraInit(Choice):
    """How LoRA matrices begin, by the name in PEFT if it has one; `default` is a random A and a B of zeros."""

    DEFAULT = "default"
    GAUSSIAN = "gaussian"
    ORTHOGONAL = "orthogonal"
    PISSA = "pissa"
    LOFTQ = "loftq"
    CALIBRATED = "calibrated"

    @property
    def needs_layers(self) -> bool:
        """Whether it is defined for the weight of a single layer, `(out, in)`, only, not for stacked experts."""
        return self not in {LoraInit.DEFAULT, LoraInit.GAUSSIAN}

    @property
    def fits_quantization_error(self) -> bool:
        """Whether it makes up for what 4-bit quantization lost."""
        return self in {LoraInit.LOFTQ, LoraInit.CALIBRATED}


class Strategy(Choice):
    """What each of several processes holds of the base, by PyTorch's names: all of it, or a shard."""

    AUTO = "auto"
    DDP = "ddp"
    FSDP = "fsdp"


class TrainingLoss(Choice):
    """How the losses of trained tokens are weighted; each by the probability of its token, or not at all."""

    NLL = "nll"
    DFT = "dft"


class OnNan(Choice):
    """What to do with a step whose loss or gradient norm is not finite."""

    STOP = "stop"
    SKIP = "skip"


class Optimizer(Choice):
    """The optimizer, by its name in transformers."""

    ADAMW_TORCH = "adamw_torch"
    ADAMW_TORCH_FUSED = "adamw_torch_fused"
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    PAGED_ADAMW_32BIT = "paged_adamw_32bit"
    LION_8BIT = "lion_8bit"
    LION_32BIT = "lion_32bit"
    PAGED_LION_8BIT = "paged_lion_8bit"
    PAGED_LION_32BIT = "paged_lion_32bit"
    ADAFACTOR = "adafactor"
    SGD = "sgd"

    @property
    def is_paged(self) -> bool:
        """Whether the state lives in CUDA unified memory."""
        return self.value.startswith("paged_")

    @property
    def is_8bit(self) -> bool:
        """Whether the state of large parameters is stored in 8 bit."""
        return self.value.endswith("_8bit")

    @property
    def is_adam(self) -> bool:
        """Whether it is AdamW, which keeps a first and a second moment of each gradient."""
        return "adamw" in self.value

    @property
    def is_lion(self) -> bool:
        """Whether it is Lion (arXiv 2302.06675), which keeps one moment and steps by its sign."""
        return "lion" in self.value


class Schedule(Choice):
    """The learning-rate schedule, by its name in transformers; all but `constant` have a warm-up."""

    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_MIN_LR = "cosine_with_min_lr"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"
    INVERSE_SQRT = "inverse_sqrt"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"


class ReportTo(Choice):
    """A tracker that the run is also reported to."""

    NONE = "none"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"
    MLFLOW = "mlflow"
    COMET = "comet_ml"
    SWANLAB = "swanlab"


class BaseWeights(Choice):
    """The weights to merge an adapter into: as stored, or quantized and dequantized, as in training."""

    AUTO = "auto"
    ORIGINAL = "original"
    DEQUANTIZED = "dequantized"


class MergeDtype(DtypeChoice):
    """The dtype of a merged model; `keep` is that of each tensor in the base."""

    KEEP = "keep"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class SdpaBackend(Choice):
    """A backend of `scaled_dot_product_attention`. `auto`: the one that PyTorch selects on the GPU."""

    AUTO = "auto"
    FLASH = "flash"
    EFFICIENT = "efficient"
    MATH = "math"


class Solvable(Choice):
    """What a prediction can look for: the largest value of a setting, by the flag's name without dashes, or cards."""

    MAX_LENGTH = "max-length"
    MICRO_BATCH_SIZE = "micro-batch-size"
    RANK = "rank"
    GPU = "gpu"


class CardOrder(Choice):
    """By what the cards are ranked on which a run fits."""

    COST = "cost"
    TIME = "time"


class ExportFormat(Choice):
    """The format of a merged model: for transformers in 16 bit or NF4, llama.cpp (whole or the adapter), Ollama."""

    HF = "hf"
    NF4 = "nf4"
    GGUF = "gguf"
    GGUF_LORA = "gguf-lora"
    OLLAMA = "ollama"


class GgufType(DtypeChoice):
    """The type of the weights in a GGUF file, by its name in llama.cpp; `auto` is the dtype of the merged model."""

    AUTO = "auto"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q6_K = "q6_k"
    Q5_K_M = "q5_k_m"
    Q5_K_S = "q5_k_s"
    Q4_K_M = "q4_k_m"
    Q4_K_S = "q4_k_s"
    Q3_K_M = "q3_k_m"
    IQ4_XS = "iq4_xs"
