"""The loss of answers with a label by their log-probabilities. KTO: arXiv 2402.01306, equations 7 and 8."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

KL = "kl"  # the name of the baseline among TRL's metrics


@dataclass(frozen=True, kw_only=True)
class LabelLoss:
    """The loss of KTO: how strongly it is held to the reference, and the weights of answers that are wanted or not."""

    beta: float
    desirable_weight: float
    undesirable_weight: float

    def losses(
        self, policy: torch.Tensor, reference: torch.Tensor, is_desirable: Sequence[bool], baseline: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of each answer, `(answers,)`, with a gradient.

        `policy` and `reference` are their log-probabilities by the trained model and by the reference, `(answers,)`
        each. `baseline`, a number without a gradient, is what their difference is compared with.
        """
        # Made on the host and moved: a trace does not see what `new_tensor` allocates on the meta device.
        signs = torch.tensor([1.0 if wanted else -1.0 for wanted in is_desirable]).to(policy.device)
        weights = torch.tensor(
            [self.desirable_weight if wanted else self.undesirable_weight for wanted in is_desirable]
        ).to(policy.device)
        return weights * torch.sigmoid(self.beta * signs * (baseline - (policy - reference)))


def baseline_of(gain: torch.Tensor, num_answers: int) -> torch.Tensor:
    """Return the estimate of the divergence of the trained model from the reference, in nats, at least 0.

    `gain` is a sum over answers to prompts that are not theirs, without a gradient: of their log-probabilities by the
    trained model, less those by the reference.
    """
    return (gain / num_answers).clamp(min=0)
