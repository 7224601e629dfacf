"""Choose the base to merge into: the one whose merged model is measured to be closer to the trained model."""

import math
from collections.abc import Sequence

from qlora_cli.errors import ModelError
from qlora_cli.events import Noted, Reporter
from qlora_cli.merging.merge_result import BaseChoice, Divergence
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.merging.planning.merge_plan import MergePlan
from qlora_cli.merging.verifying.comparison import ModelComparer
from qlora_cli.settings.choices import BaseWeights


def base_choice_without_measuring(inputs: Inputs) -> BaseChoice | None:
    """Return the base to merge into, if it is known without measuring.

    Raises:
        ModelError: the requested base does not exist.
    """
    asked = inputs.request.merge.base
    if inputs.base.packed:
        if asked == BaseWeights.ORIGINAL:
            raise ModelError(
                f"{inputs.source.base_name} is only available quantized",
                hint="Name the 16-bit model that it was made from with --base-model, or use --base dequantized.",
                setting="merge.base",
            )
        return _chosen(BaseWeights.DEQUANTIZED, "the base is only available quantized")
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
    """Measure how far each merge would be from the trained model, and return the closer one.

    Raises:
        ModelError: one of them computes NaN.
    """
    divergences: dict[BaseWeights, Divergence] = {
        plan.base: comparer.compare(comparer.trained(), comparer.planned(plan)) for plan in plans
    }
    if any(math.isnan(one.mean_kl) for one in divergences.values()):
        raise ModelError(
            "the trained model, or a merge of it, computes NaN: nothing can be measured",
            hint="Does the adapter still answer? Try: qlora generate RUN --prompt … --compare",
        )
    base = min(divergences, key=lambda kind: divergences[kind].mean_kl)
    figures = ", ".join(f"{one.mean_kl:.2g} into the {kind.value} base" for kind, one in divergences.items())
    reason = f"the mean KL divergence from the trained model, in nats a token, is {figures}"
    reporter.report(Noted(message=f"merging into the {base.value} base: {reason}"))
    return BaseChoice(
        base=base.value,
        reason=reason,
        original=divergences[BaseWeights.ORIGINAL],
        dequantized=divergences[BaseWeights.DEQUANTIZED],
    )


def _chosen(base: BaseWeights, reason: str) -> BaseChoice:
    return BaseChoice(base=base.value, reason=reason, original=None, dequantized=None)
