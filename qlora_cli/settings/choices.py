"""The settings that take one of several words, by the names that the field gives them, and how these are read.

What settings and texts need to know of a choice is defined with it, so that nothing else asks for it by name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from pydantic import GetJsonSchemaHandler
from pydantic_core import CoreSchema

# What a dtype is called: here, by llama.cpp, by PyTorch. A choice with one of a line's names goes by all of them.
DTYPE_NAMES = (
    ("bf16", "bfloat16", "torch.bfloat16"),
    ("fp16", "f16", "float16", "half", "torch.float16", "torch.half"),
    ("fp32", "f32", "float32", "float", "torch.float32", "torch.float"),
    ("uint8", "torch.uint8"),
)


class Choice(StrEnum):
    """A choice among words. Each is read in upper and in lower case, and by its synonyms."""

    @classmethod
    def synonyms(cls) -> dict[str, str]:
        """Return what else a choice is called, in lower case, with its own word."""
        return {}

    @classmethod
    def hint_for(cls, value: str) -> str | None:
        """Return what to choose where `value` is no choice, if more is known of it than its spelling."""
        del value
        return None

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        word = cls.synonyms().get(value.lower(), value.lower())
        return next((member for member in cls if member.value == word), None)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        words = [*schema.pop("enum"), *cls.synonyms()]
        # An editor offers the words of `enum`; the pattern is for those who write them in capitals.
        schema["anyOf"] = [{"enum": words}, {"pattern": f"^({'|'.join(map(_in_any_case, words))})$"}]
        return reference


def _in_any_case(word: str) -> str:
    """Return a regular expression for a word in any case; JSON schemas know no flag for it."""
    return "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else f"[{letter}]" for letter in word)


class DtypeChoice(Choice):
    """A choice among dtypes, which also goes by the names that others give them."""

    @classmethod
    def synonyms(cls) -> dict[str, str]:
        """Return what else a dtype is called, with the name that it has here."""
        return {
            name: member.value
            for member in cls
            for names in DTYPE_NAMES
            if member.value in names
            for name in names
            if name != member.value
        }


@dataclass(frozen=True, kw_only=True)
class MethodTraits:
    """A quantization method as settings and texts know it; how it stores and restores weights is in its module.

    Attributes:
        module: Its module in `qlora_cli/quantization/methods`.
        label: What people call it.
        bits: What a weight takes, constants aside.
        measures_error: Whether what a weight loses can be measured while it is quantized.
        proposal: What changes for somebody who takes it to save memory; None if it is never proposed.
    """

    module: str
    label: str
    bits: int
    measures_error: bool = False
    proposal: str | None = None


class Quantization(Choice):
    """How the frozen base is stored. `none` keeps its linear layers in 16 or 32 bit."""

    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"
    NONE = "none"

    @classmethod
    def synonyms(cls) -> dict[str, str]:
        """Return the names of bits that one method alone stores a weight in; several are a matter of choice."""
        named = ((name, method) for method in cls for name in method.names_of_bits)
        return {name: method.value for name, method in named if name != method.value and cls.of_bits(name) == [method]}

    @classmethod
    def of_bits(cls, text: str) -> list["Quantization"]:
        """Return the methods that store a weight in the bits that `text` names, as `4bit`, `4-bit` or `int4` do."""
        return [method for method in cls if text.lower() in method.names_of_bits]

    @property
    def names_of_bits(self) -> tuple[str, ...]:
        """What people call the bits that a weight is stored in; none if it is not quantized."""
        forms = ("int{}", "{}bit", "{}-bit", "{}_bit", "{} bit", "{}bits", "{}-bits", "{} bits")
        return tuple(form.format(self.traits.bits) for form in forms) if self.is_quantized else ()

    @classmethod
    def hint_for(cls, value: str) -> str | None:
        """Return what to choose from where `value` names bits that several methods store a weight in."""
        found = cls.of_bits(value)
        default = f"; {DEFAULT_METHOD.value} is the default" if DEFAULT_METHOD in found else ""
        return f"Choose {' or '.join(found)}{default}." if found else None

    @property
    def traits(self) -> MethodTraits:
        """What settings and texts need to know of it."""
        return METHODS[self]

    @property
    def is_quantized(self) -> bool:
        """Whether linear layers are stored in fewer bits than they come in."""
        return self.traits.bits < UNQUANTIZED_BITS

    def smaller(self) -> list["Quantization"]:
        """Return the methods that are proposed where this one takes too much, what changes the model least first."""
        found = [method for method in Quantization if method.traits.proposal and method.traits.bits < self.traits.bits]
        return sorted(found, key=lambda method: -method.traits.bits)


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
    ),
    Quantization.NONE: MethodTraits(module="unquantized", label="not quantized", bits=UNQUANTIZED_BITS),
}
DEFAULT_METHOD, UNQUANTIZED_METHOD = Quantization.NF4, Quantization.NONE
QUANTIZED = tuple(method for method in Quantization if method.is_quantized)


def methods_of(module: str) -> tuple[Quantization, ...]:
    """Return the methods that `module`, of `qlora_cli/quantization/methods`, stores weights by."""
    return tuple(method for method in Quantization if method.traits.module == module)


def quant_flag(methods: Iterable[Quantization]) -> str:
    """Return what to type for one of `methods`: `--quant nf4 or fp4`."""
    return f"--quant {' or '.join(methods)}"


class Storage(DtypeChoice):
    """The dtype that packed 4-bit codes are kept in. FSDP shards only floating-point tensors of one dtype."""

    UINT8 = "uint8"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Dtype(DtypeChoice):
    """The dtype that matrix products are computed in."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Device(Choice):
    """Where the model lives."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Attention(Choice):
    """The attention kernel."""

    AUTO = "auto"
    EAGER = "eager"
    SDPA = "sdpa"
    FLASH_ATTENTION_2 = "flash_attention_2"


# What axolotl (`type`), LLaMA-Factory (`formatting`), ms-swift, TRL and Unsloth call the ways to write rows.
FORMAT_NAMES = {
    "messages": ("chat_template", "chatml", "chat", "openai", "conversational", "conversation"),
    "sharegpt": ("vicuna",),
    "prompt_completion": ("prompt-completion",),
    "alpaca": ("alpaca_chat", "alpaca_w_system", "gpteacher"),
    "question_answer": (
        "question-answer",
        "query-response",
        "qa",
        "jeopardy",
        "alpaca_chat.load_qa",
        "context_qa.load_v2",
    ),
    "text": ("completion", "pretrain", "pretraining", "language_modeling", "language-modeling"),
    "tokens": ("tokenized", "pretokenized"),
}
SEGMENTS_HINT = (
    "Write each row of segments as prompt and completion, or as its tokens with labels: -100 where nothing is trained "
    "(--format tokens)."
)
COMPARISONS = ("dpo", "kto", "orpo", "ipo", "simpo", "preference", "ranking", "reward")


class DataFormat(Choice):
    """How a row is read. `auto` recognises it by its columns."""

    AUTO = "auto"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PROMPT_COMPLETION = "prompt_completion"
    ALPACA = "alpaca"
    QUESTION_ANSWER = "question_answer"
    TEXT = "text"
    TOKENS = "tokens"

    @classmethod
    def synonyms(cls) -> dict[str, str]:
        """Return what other tools call a format, with the name that it has here."""
        return {name: fmt for fmt, names in FORMAT_NAMES.items() for name in names}

    @classmethod
    def hint_for(cls, value: str) -> str | None:
        """Return what to do with rows that other tools have a format for, and that are none here."""
        if value.lower() in ("input_output", "segments"):
            return SEGMENTS_HINT
        if value.lower().partition(".")[0] in COMPARISONS:
            return "These are for training by comparison. To train on the better answers, name them with --columns."
        return None


class LossOn(Choice):
    """Which tokens are trained: all answers, the last answer of a row only, or every token of it."""

    COMPLETIONS = "completions"
    LAST = "last"
    ALL = "all"


class OnLong(Choice):
    """What becomes of a row that is longer than `max_length`."""

    TRUNCATE = "truncate"
    DROP = "drop"
    ERROR = "error"


class OnBadRow(Choice):
    """What becomes of a row that can't be read."""

    ERROR = "error"
    SKIP = "skip"


class Mixing(Choice):
    """What the weights of several data sets say: how often each of their rows is fed, or their shares of all rows.

    Shares are kept until the first data set is exhausted, or the last one, by the names that `datasets` gives that.
    """

    WEIGHTS = "weights"
    FIRST_EXHAUSTED = "first_exhausted"
    ALL_EXHAUSTED = "all_exhausted"


class Sampling(Choice):
    """The order of rows, by the name that transformers gives it."""

    RANDOM = "random"
    SEQUENTIAL = "sequential"
    GROUP_BY_LENGTH = "group_by_length"


class Checkpointing(Choice):
    """Whether activations are recomputed in the backward pass; `offload` keeps the layers' inputs in host memory."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"
    OFFLOAD = "offload"


class LoraInit(Choice):
    """How the LoRA matrices begin, by the name that PEFT gives it; `default` is a random A and a B of zeros."""

    DEFAULT = "default"
    GAUSSIAN = "gaussian"
    ORTHOGONAL = "orthogonal"
    PISSA = "pissa"
    LOFTQ = "loftq"

    @property
    def needs_layers(self) -> bool:
        """Whether it is made for the weight of a layer, `(out, in)`, and not for a stack of experts'."""
        return self in {LoraInit.ORTHOGONAL, LoraInit.PISSA, LoraInit.LOFTQ}


class OnNan(Choice):
    """What becomes of a step whose loss or gradient norm is not a finite number."""

    STOP = "stop"
    SKIP = "skip"


class Optimizer(Choice):
    """The optimizer, by the name that transformers gives it."""

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
        """Whether the state of large parameters is kept in 8 bit."""
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
    """How the learning rate runs, after warm-up in all but `constant`; by the name that transformers gives it."""

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


class BaseWeights(Choice):
    """What an adapter is merged into: the weights as stored, or as training saw them, quantized and dequantized."""

    AUTO = "auto"
    ORIGINAL = "original"
    DEQUANTIZED = "dequantized"


class MergeDtype(DtypeChoice):
    """What a merged model is written in; `keep` is each tensor's own."""

    KEEP = "keep"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class SdpaBackend(Choice):
    """A backend of `scaled_dot_product_attention`. `auto`: the one that PyTorch takes on the GPU."""

    AUTO = "auto"
    FLASH = "flash"
    EFFICIENT = "efficient"
    MATH = "math"


class Solvable(Choice):
    """What a prediction can find the largest value of, and be swept over, by the flag's name without dashes."""

    MAX_LENGTH = "max-length"
    MICRO_BATCH_SIZE = "micro-batch-size"
    RANK = "rank"


class ExportFormat(Choice):
    """What a merged model is written as: for transformers in 16 bit or in NF4, for llama.cpp, or for Ollama."""

    HF = "hf"
    NF4 = "nf4"
    GGUF = "gguf"
    OLLAMA = "ollama"


class GgufType(DtypeChoice):
    """The type of the weights in a GGUF file, by llama.cpp's name; `auto` is that of the merged model."""

    AUTO = "auto"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
