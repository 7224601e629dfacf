"""The plan and the result of a merge as plain values. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Action(StrEnum):
    """What is done with a tensor of the base."""

    COPY = "copy"
    CAST = "cast"
    DEQUANTIZE = "dequantize"
    MERGE = "merge"


@dataclass(frozen=True, kw_only=True)
class AppliedAdapter:
    """An adapter that is merged: `weight` is its factor in the sum, `kind` describes it, such as LoRA of rank 8.

    For a run, `step` is the step of its weights, and `run_is_done` whether it was trained to its end.
    """

    name: str
    path: Path
    weight: float
    kind: str
    step: int | None = None
    run_is_done: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ActionCount:
    """The number of tensors with the same action, and their bytes in the files of the base and of the result."""

    action: Action
    num_tensors: int
    base_bytes: int
    written_bytes: int


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """A tensor of the result: the file that it is written to, and what is done with the tensor of the base."""

    name: str
    file: str
    action: Action
    base_dtype: str
    dtype: str
    shape: tuple[int, ...]
    written_bytes: int


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """The plan of a merge. `disk_bytes` is the space that it needs; `base` is `auto` if it is still to be measured."""

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
    """The divergence of one model from another, over the same tokens.

    Differences are of logits; divergences are Kullback-Leibler, in nats per token, of the model from the reference.
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
    """The base that was merged into, and the reason; the divergences are from the trained model, if measured."""

    base: str
    reason: str
    original: Divergence | None
    dequantized: Divergence | None


@dataclass(frozen=True, kw_only=True)
class ModuleCheck:
    """The comparison of each adapted module, merged in fp32, with itself under the adapter, on the same input.

    Attributes:
        num_modules: The number of modules compared.
        worst: The module that differs most, by its name in the base.
        difference: The difference of its outputs, as a share of the adapter's effect on them.
        max_difference: The largest difference that passes.
        floor: A difference that always passes, as a share of the module's output: smaller effects are not verified.
    """

    num_modules: int
    worst: str
    difference: float
    max_difference: float
    floor: float

    @property
    def passed(self) -> bool:
        """Whether all modules agree; NaN does not."""
        return self.difference <= self.max_difference


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """The same merge in another dtype: its mean KL divergence, and the bytes of its weights."""

    dtype: str
    mean_kl: float
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The comparison of the merged files with the base under the adapter, all computed in fp32.

    Several adapters that PEFT can't run together are summed in fp32 instead, by the merge's own arithmetic:
    then the files and the rounding are verified, not the sum, and `ran_adapters` is false.

    The arithmetic (`modules`, `unrounded`) and the contents of the files (`differing_parameters`) must be exact,
    however small the adapter's effect. The additional cost of rounding to the dtype of the files, `divergence`, is
    reported, and fails only if a bound was set.

    Attributes:
        is_exact: Whether everything that must be exact is exact.
        ran_adapters: Whether the reference is the base with the adapters attached, as PEFT runs them.
        max_divergence: The largest mean KL divergence that passes; None if no bound was set.
        max_unexplained: The largest median KL divergence of `unrounded` that passes.
        divergence: The divergence of the files from the reference: the cost of rounding.
        unrounded: The divergence of the merge, as if written in fp32, from the reference.
        modules: The comparison module by module; None if the adapters did not run.
        less_rounded: The same merge in a more precise dtype, measured if rounding costs much; else None.
        num_parameters: The number of parameters read from the files and compared with the merge bit by bit.
        differing_parameters: The parameters that differ in the files; empty if it passes.
        num_prompts: The number of fixed prompts compared on.
        num_rows: The number of rows of the data compared on.
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
    """A format that is not the merged 16-bit model itself: `divergence` is that from it, None if not measured.

    `to` describes what its weights are quantized to; it is None for one in 16 bit or more, which another program ran.
    """

    to: str | None
    divergence: Divergence | None


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """The result of a merge.

    Attributes:
        output: The directory that holds the result, or one directory per format.
        outputs: The directory of each format.
        base: The base that was merged into: `original` or `dequantized`.
        num_merged_tensors: The tensors that an adapter has changed.
        bytes_written: The bytes of all files in the output.
        merge_seconds: The time to read, merge and write the 16-bit model, without comparing and exporting.
        peak_host_bytes: The largest resident set of the process until the model was written.
        verification: None if it was not requested.
        requantized: The formats that were quantized again, or run by another program, by name.
        notes: The notes that were reported.
        already_merged_at: When an earlier merge wrote all this, in ISO 8601; None if this one did.
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
    already_merged_at: str | None = None
