"""Whether what was written is the model that was to be merged.

Two questions are kept apart. Arithmetic, names and files have to be exact, whatever the dtype of the files and however
little the adapter does: else it is an error. What rounding to that dtype costs is a figure. It grows with the model:
no bound on it tells right merges from wrong ones, so there is none unless the user sets one.
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

# Nats, of the median token. Rounding in fp32 makes 1e-10 or so; an update missing from one layer makes far more.
# Not of the mean: a mixture of experts may send a token to other experts for the last bit of fp32, which moves a few
# tokens far.
MAX_UNEXPLAINED = 1e-6
# Nats a token, from which on it is said what rounding costs, and what another dtype would.
NOTEWORTHY = 1e-3
NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def verify(
    comparer: ModelComparer, plan: MergePlan, choice: BaseChoice, model: Path, most: float | None, reporter: Reporter
) -> Verification:
    """Compare the files in `model` with the base with the adapters on it; `most` bounds rounding, if it is set."""
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
    found = comparer.compare(reference, written.logits)
    modules = comparer.modules(plan)
    is_exact = (
        unrounded.median_kl <= MAX_UNEXPLAINED  # NaN is not
        and (modules is None or modules.passed)
        and not written.differing
    )
    less = _less_rounded(comparer, plan, reference, unrounded) if is_exact and found.mean_kl > NOTEWORTHY else None
    if less is not None:
        reporter.report(Noted(message=_on_rounding(plan, choice, found, less), level="warning"))
    return Verification(
        passed=is_exact and not math.isnan(found.mean_kl) and (most is None or found.mean_kl <= most),
        is_exact=is_exact,
        ran_adapters=comparer.runs_adapters,
        max_divergence=most,
        max_unexplained=MAX_UNEXPLAINED,
        divergence=found,
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
    """Return what the next dtype that rounds less would make of it: fp16, of the same size, where its range is enough.

    None if the files are in fp32 already.
    """
    if plan.main_dtype == "float32":
        return None
    if plan.main_dtype == "bfloat16" and comparer.may_be_fp16:
        in_fp16 = comparer.compare(reference, comparer.in_dtype(plan, MergeDtype.FP16))
        if in_fp16.mean_kl < NOTEWORTHY:  # not of what overflows, which is NaN
            return Rounding(dtype="fp16", mean_kl=in_fp16.mean_kl, num_bytes=plan.num_bytes)
    exact = comparer.in_fp32(plan.base)
    return Rounding(dtype="fp32", mean_kl=unrounded.mean_kl, num_bytes=exact.num_bytes)


def _on_rounding(plan: MergePlan, choice: BaseChoice, found: Divergence, less: Rounding) -> str:
    size = "the same size" if less.num_bytes == plan.num_bytes else format_bytes(less.num_bytes)
    other = choice.original  # the same adapter on the base that was never quantized
    cost = "" if other is None else f" (quantizing the base had moved it by {other.mean_kl:.2g})"
    return (
        f"rounding to {NAMES[plan.main_dtype]} moves the merged model by {found.mean_kl:.2g} nats a token{cost}, "
        f"and another token comes first at {1 - found.top_token_agreement:.1%} of them; "
        f"--dtype {less.dtype} moves it by {less.mean_kl:.2g}, at {size}"
    )


def failure(verification: Verification, kept: Path) -> MergeError:
    """Return the error for a merge that did not pass, and is in `kept` now."""
    found = verification.divergence
    if math.isnan(found.mean_kl):
        return MergeError(
            "the base with its adapter, or the merged model, computes NaN, so that the two can't be compared",
            hint=f"The merged model is in {kept}, to look at. Does the base hold NaN, or the adapter huge values?",
        )
    if not verification.is_exact:
        report = f"It is kept in {kept}, to look at. Please report it with its {MERGE_FILE}."
        return MergeError(_inexact(verification), hint=report)
    assert verification.max_divergence is not None, "nothing else fails"
    return MergeError(
        f"rounding moves the merged model by a mean KL divergence of {found.mean_kl:.2g} nats a token, more than "
        f"{verification.max_divergence:.2g} (--max-divergence; top token the same at {found.top_token_agreement:.1%})",
        hint=f"It is the right merge, and kept in {kept}. {_less(verification)}",
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
            f"{wrong}: on the same input, {modules.worst} computes something else with the adapter merged; what lies "
            f"between is {modules.difference:.2g} times what the adapter does there"
        )
    return f"{wrong}: in fp32 the median KL divergence is {verification.unrounded.median_kl:.2g} nats a token"
