"""What a merge is about to do, and what it did, as plain values. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Action(StrEnum):
    """What becomes of a tensor of the base."""

    COPY = "copy"
    CAST = "cast"
    DEQUANTIZE = "dequantize"
    MERGE = "merge"


@dataclass(frozen=True, kw_only=True)
class AppliedAdapter:
    """An adapter that is merged: `weight` is how much it counts, `kind` what it is, such as LoRA of rank 8.

    Of a run, `step` is the step of its weights, and `run_is_done` whether it was trained to its end.
    """

    name: str
    path: Path
    weight: float
    kind: str
    step: int | None = None
    run_is_done: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ActionCount:
    """How many tensors meet the same, and what they take: in the files of the base, and in those of the result."""

    action: Action
    num_tensors: int
    base_bytes: int
    written_bytes: int


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """A tensor of the result: the file that it is written to, and what becomes of the one of the base."""

    name: str
    file: str
    action: Action
    base_dtype: str
    dtype: str
    shape: tuple[int, ...]
    written_bytes: int


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge will do. `disk_bytes` is the space that it needs; `base` is `auto` if it is yet to be measured."""

    output: Path
    base_model: str
    commit: str | None
    adapters: tuple[AppliedAdapter, ...]
    base: str
    formats: tuple[str, ...]
    num_tensors: int
    num_merged_tensors: int
    base_bytes: int
    disk_bytes: int
    actions: tuple[ActionCount, ...]
    tensors: tuple[TensorPlan, ...]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """How far one model is from another, over the same tokens.

    Differences are of logits; divergences are Kullback-Leibler, in nats a token, of the other from the reference.
    """

    num_tokens: int
    max_logit_difference: float
    mean_logit_difference: float
    max_kl: float
    mean_kl: float
    median_kl: float
    top_token_agreement: float
    reference_perplexity: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class BaseChoice:
    """Which base was merged into, and why; the divergences are from the model that was trained, if measured."""

    base: str
    reason: str
    original: Divergence | None
    dequantized: Divergence | None


@dataclass(frozen=True, kw_only=True)
class ModuleCheck:
    """Each adapted module, merged in fp32, against itself with the adapter on it, both given the same input.

    Attributes:
        num_modules: How many were compared.
        worst: The one that differs most, by its name in the base.
        difference: What its outputs differ by there, as a share of what the adapter does to them.
        max_difference: The largest that passes.
        floor: What passes besides, as a share of the module's output: an adapter that does less is not seen.
    """

    num_modules: int
    worst: str
    difference: float
    max_difference: float
    floor: float

    @property
    def passed(self) -> bool:
        """Whether all of them compute the same; NaN is not."""
        return self.difference <= self.max_difference


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What another dtype would make of the same merge: the mean KL divergence, and the bytes of the weights."""

    dtype: str
    mean_kl: float
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The merged files against the base with the adapter on it. All is computed in fp32.

    Several adapters that PEFT can't run together are summed in fp32 instead, by the merge's own arithmetic:
    what is verified then are the files and the rounding, not the sum. `ran_adapters` says so.

    What must be exact is the arithmetic (`modules`, `unrounded`) and what lies in the files (`differing_parameters`),
    however little the adapter does. What rounding to the dtype of the files costs on top of it is a figure,
    `divergence`, which fails only where a bound was set.

    Attributes:
        is_exact: Whether all that must be exact is.
        ran_adapters: Whether the reference is the base with the adapters on it, as PEFT runs them.
        max_divergence: The largest mean KL divergence that passes; None if no bound was set.
        max_unexplained: The largest median KL divergence of `unrounded` that passes.
        divergence: Of the files from the base with the adapter on it: the cost of rounding.
        unrounded: Of the merge, if it were written in fp32, from the same.
        modules: The adapted modules, one by one; None if the adapters did not run.
        less_rounded: The same merge in the dtype that rounds less, measured where rounding costs much; else None.
        num_parameters: How many parameters were read from the files, and compared with the merge bit by bit.
        differing_parameters: What is in the files otherwise than it was to be written; nothing, if it passes.
        num_prompts: How many fixed prompts were compared on.
        num_rows: How many rows of the data.
    """

    passed: bool
    is_exact: bool
    ran_adapters: bool
    max_divergence: float | None
    max_unexplained: float
    divergence: Divergence
    unrounded: Divergence
    modules: ModuleCheck | None
    less_rounded: Rounding | None
    num_parameters: int
    differing_parameters: tuple[str, ...]
    num_prompts: int
    num_rows: int
    device: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Requantized:
    """A format whose weights are quantized anew: `to` what, in words, and how far it is from the merged 16-bit model.

    `divergence` is None if that was not measured.
    """

    to: str
    divergence: Divergence | None


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """A merge that was done.

    Attributes:
        output: The directory that holds the result, or one directory a format.
        outputs: Where each format is.
        base: What was merged into: `original` or `dequantized`.
        num_merged_tensors: Tensors that an adapter has changed.
        bytes_written: What is in the output, all files.
        merge_seconds: Reading, merging and writing the 16-bit model; without comparing and exporting.
        peak_host_bytes: The largest resident set of the process until the model was written.
        verification: None if it was not asked for.
        requantized: The formats whose weights are quantized anew, by name.
        notes: What was said on the way.
    """

    output: Path
    outputs: Mapping[str, Path]
    base_model: str
    commit: str | None
    adapters: tuple[AppliedAdapter, ...]
    base: str
    base_choice: BaseChoice
    dtype: str
    num_tensors: int
    num_merged_tensors: int
    bytes_written: int
    merge_seconds: float
    total_seconds: float
    peak_host_bytes: int
    verification: Verification | None
    requantized: Mapping[str, Requantized]
    pushed_to: str | None
    notes: tuple[str, ...]
