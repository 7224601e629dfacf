"""Which base to merge into: the one whose merged model is nearer to the model that was trained, measured."""

import math
from collections.abc import Sequence

from qlora_cli.errors import ModelError
from qlora_cli.events import Noted, Reporter
from qlora_cli.merging.merge_result import BaseChoice, Divergence
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.merging.planning.merge_plan import MergePlan
from qlora_cli.merging.verifying.comparison import ModelComparer
from qlora_cli.settings.choices import BaseWeights


def settled_base(inputs: Inputs) -> BaseChoice | None:
    """Return what is merged into, if nothing has to be measured to know it.

    Raises:
        ModelError: the base asked for is not there.
    """
    asked = inputs.request.merge.base
    if inputs.base.packed:
        if asked == BaseWeights.ORIGINAL:
            raise ModelError(
                f"{inputs.source.base_name} is there only quantized",
                hint="Name the 16-bit model that it was made from with --base-model, or use --base dequantized.",
                setting="merge.base",
            )
        return _chosen(BaseWeights.DEQUANTIZED, "the base is there only quantized")
    if not inputs.was_quantized:
        if asked == BaseWeights.DEQUANTIZED:
            raise ModelError(
                f"{inputs.source.name} was trained on a base that was not quantized",
                hint="Leave --base out.",
                setting="merge.base",
            )
        return _chosen(BaseWeights.ORIGINAL, "training did not quantize it")
    if asked != BaseWeights.AUTO:
        return _chosen(asked, "as asked")
    if not inputs.is_recorded:
        return _chosen(
            BaseWeights.ORIGINAL,
            "the adapter does not say how its base was stored in training (--base dequantized is for NF4)",
        )
    return None


def choose_base(comparer: ModelComparer, plans: Sequence[MergePlan], reporter: Reporter) -> BaseChoice:
    """Measure how far each merge would be from the model that was trained, and return the nearer one.

    Raises:
        ModelError: one of them computes what is no number.
    """
    found: dict[BaseWeights, Divergence] = {
        plan.base: comparer.compare(comparer.trained(), comparer.planned(plan)) for plan in plans
    }
    if any(math.isnan(one.mean_kl) for one in found.values()):
        raise ModelError(
            "the model that was trained, or a merge of it, computes NaN: nothing can be measured",
            hint="Does the adapter still answer? Try: qlora generate RUN --prompt … --compare",
        )
    base = min(found, key=lambda kind: found[kind].mean_kl)
    told = ", ".join(f"{one.mean_kl:.2g} into the {kind.value} base" for kind, one in found.items())
    reason = f"from the model that was trained, the mean KL divergence in nats a token is {told}"
    reporter.report(Noted(message=f"merging into the {base.value} base: {reason}"))
    return BaseChoice(
        base=base.value,
        reason=reason,
        original=found[BaseWeights.ORIGINAL],
        dequantized=found[BaseWeights.DEQUANTIZED],
    )


def _chosen(base: BaseWeights, reason: str) -> BaseChoice:
    return BaseChoice(base=base.value, reason=reason, original=None, dequantized=None)
