"""Verify that the written model is the intended merge.

Two questions are separate. Arithmetic, names and files must be exact, whatever the dtype of the files and however
small the adapter's effect; anything else is an error. The cost of rounding to that dtype is a figure. It grows with
the model, and no bound on it separates right merges from wrong ones, so there is none unless the user sets one.
"""

import math
import time
from pathlib import Path

import torch

from qlora_cli.errors import MergeError
from qlora_cli.events import Noted, Reporter
from qlora_cli.merging.merge_result import BaseChoice, Divergence, Rounding, Verification
from qlora_cli.merging.planning.merge_plan import MergePlan
from qlora_cli.merging.verifying.comparison import ModelComparer
from qlora_cli.model_files.merge_record import MERGE_FILE
from qlora_cli.settings.choices import MergeDtype
from qlora_cli.units import counted, format_bytes

# In nats, at the median token. Rounding in fp32 causes about 1e-10; an update missing in one layer far more.
# Not the mean: the last bit of fp32 may route a token to other experts in a mixture, which moves a few
# tokens far.
MAX_UNEXPLAINED = 1e-6
# In nats a token: above it, the cost of rounding and that of another dtype are reported.
NOTEWORTHY = 1e-3
NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def verify(
    comparer: ModelComparer, plan: MergePlan, choice: BaseChoice, model: Path, most: float | None, reporter: Reporter
) -> Verification:
    """Compare the files in `model` with the base with the adapters attached; `most` bounds rounding, unless None."""
    started = time.monotonic()
    if not comparer.runs_adapters:
        message = (
            "PEFT can't run these adapters together: the files are compared with their sum in fp32, and the "
            "sum itself is not verified"
        )
        reporter.report(Noted(message=message, level="warning"))
    reference = comparer.reference(plan)
    unrounded = comparer.compare(reference, comparer.unrounded(plan))
    written = comparer.written(model, plan)
    rounded = comparer.compare(reference, written.logits)
    modules = comparer.modules(plan)
    is_exact = (
        unrounded.median_kl <= MAX_UNEXPLAINED  # NaN is not
        and (modules is None or modules.passed)
        and not written.differing
    )
    less = _less_rounded(comparer, plan, reference, unrounded) if is_exact and rounded.mean_kl > NOTEWORTHY else None
    if less is not None:
        reporter.report(Noted(message=_note_on_rounding(plan, choice, rounded, less), level="warning"))
    return Verification(
        passed=is_exact and not math.isnan(rounded.mean_kl) and (most is None or rounded.mean_kl <= most),
        is_exact=is_exact,
        ran_adapters=comparer.runs_adapters,
        max_divergence=most,
        max_unexplained=MAX_UNEXPLAINED,
        divergence=rounded,
        unrounded=unrounded,
        modules=modules,
        less_rounded=less,
        num_parameters=written.num_parameters,
        differing_parameters=written.differing,
        num_prompts=comparer.texts.num_prompts,
        num_rows=comparer.texts.num_rows,
        device=str(comparer.device),
        seconds=time.monotonic() - started,
    )


def _less_rounded(
    comparer: ModelComparer, plan: MergePlan, reference: torch.Tensor, unrounded: Divergence
) -> Rounding | None:
    """Return the merge in the next more precise dtype: fp16, of the same size, if its range suffices, else fp32.

    Return None if the files are in fp32 already.
    """
    if plan.main_dtype == "float32":
        return None
    if plan.main_dtype == "bfloat16" and comparer.may_be_fp16:
        in_fp16 = comparer.compare(reference, comparer.in_dtype(plan, MergeDtype.FP16))
        if in_fp16.mean_kl < NOTEWORTHY:  # an overflow gives NaN
            return Rounding(dtype="fp16", mean_kl=in_fp16.mean_kl, num_bytes=plan.num_bytes)
    exact = comparer.in_fp32(plan.base)
    return Rounding(dtype="fp32", mean_kl=unrounded.mean_kl, num_bytes=exact.num_bytes)


def _note_on_rounding(plan: MergePlan, choice: BaseChoice, rounded: Divergence, less: Rounding) -> str:
    size = "the same size" if less.num_bytes == plan.num_bytes else format_bytes(less.num_bytes)
    other = choice.original  # the same adapter on the unquantized base
    cost = "" if other is None else f" (quantizing the base had moved it by {other.mean_kl:.2g})"
    return (
        f"rounding to {NAMES[plan.main_dtype]} moves the merged model by {rounded.mean_kl:.2g} nats a token{cost}, "
        f"and another token comes first at {1 - rounded.top_token_agreement:.1%} of them; "
        f"--dtype {less.dtype} moves it by {less.mean_kl:.2g}, at {size}"
    )


def failure(verification: Verification, path: Path) -> MergeError:
    """Return the error for a merge that did not pass, and was moved to `path`."""
    divergence = verification.divergence
    if math.isnan(divergence.mean_kl):
        return MergeError(
            "the base with its adapter, or the merged model, computes NaN, so that the two can't be compared",
            hint=f"The merged model is in {path}, for inspection. Does the base hold NaN, or the adapter huge values?",
        )
    if not verification.is_exact:
        report = f"It is in {path}, for inspection. Please report it with its {MERGE_FILE}."
        return MergeError(_inexact(verification), hint=report)
    assert verification.max_divergence is not None, "nothing else fails"
    return MergeError(
        f"rounding moves the merged model by a mean KL divergence of {divergence.mean_kl:.2g} nats a token, "
        f"more than {verification.max_divergence:.2g} (--max-divergence; "
        f"top token the same at {divergence.top_token_agreement:.1%})",
        hint=f"The merge itself is right, and in {path}. {_less(verification)}",
    )


def _less(verification: Verification) -> str:
    less = verification.less_rounded
    dtype, how = ("fp32", "rounds least") if less is None else (less.dtype, f"moves it by {less.mean_kl:.2g}")
    return f"--dtype {dtype} {how}; a larger --max-divergence accepts it."


def _inexact(verification: Verification) -> str:
    if differing := verification.differing_parameters:
        return f"{counted(len(differing), 'weight')} not in the files as merged, such as {differing[0]}"
    wrong = "the merged model is not the base with its adapter, and rounding does not explain it"
    modules = verification.modules
    if modules is not None and not modules.passed:
        return (
            f"{wrong}: on the same input, {modules.worst} computes something else with the adapter merged; the "
            f"difference is {modules.difference:.2g} times the adapter's effect there"
        )
    return f"{wrong}: in fp32 the median KL divergence is {verification.unrounded.median_kl:.2g} nats a token"
