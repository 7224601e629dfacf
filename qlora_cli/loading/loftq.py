"""What 4-bit quantization lost of a weight, at a low rank: what an adapter of LoftQ begins as.

LoftQ (arXiv 2310.08659) alternates between quantizing W - BA and fitting BA to W - Q. This is its first step, in which
Q is the ordinary quantized weight: the adapter then fits the ordinary quantized base, and nothing else has to be kept.
The weights are there only while they are read, so that is when their loss is taken down. PEFT's
`replace_lora_weights_loftq` reads them once more, by the names of modules, which are not those in the files of every
architecture, and leaves the scale of the adapter out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Params4bit
from transformers import PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.loading.layout import Layout
from qlora_cli.loading.targets import adapted_layers, rank_of, target_modules
from qlora_cli.settings.choices import LoraInit
from qlora_cli.settings.models import LoraSettings


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A matrix as the product of `left`, `(out, rank)`, and `right`, `(rank, in)`, both in fp32."""

    left: torch.Tensor
    right: torch.Tensor


@dataclass
class Losses:
    """What was lost of some weights: the rank that each is wanted at, and the `parts` that were taken down.

    Both by full name. Copies are the same object: transformers copies a config that it is given.
    """

    ranks: Mapping[str, int]
    parts: dict[str, LowRank] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, object]) -> "Losses":
        return self

    def take(self, name: str, weight: torch.Tensor, stored: Params4bit) -> None:
        """Take down what `stored` lost of `weight`, `(out, in)`, if it is wanted."""
        if name in self.ranks:
            restored = functional.dequantize_4bit(stored.data, stored.quant_state)
            self.parts[name] = best_of_rank(weight.float() - restored.float(), self.ranks[name])


def best_of_rank(matrix: torch.Tensor, rank: int) -> LowRank:
    """Return the nearest matrix of `rank`, or of the rank that `matrix` has at most, in two factors of equal norms.

    By Eckart and Young it is the projection on the leading singular vectors. These are the eigenvectors of the Gram
    matrix of the shorter side, which are found many times faster than a decomposition of a long matrix.
    """
    num_rows, num_columns = matrix.shape
    if num_rows > num_columns:
        found = best_of_rank(matrix.T, rank)
        return LowRank(left=found.right.T.contiguous(), right=found.left.T.contiguous())
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)  # in ascending order
    leading = vectors.flip(1)[:, :rank]
    projected = leading.T @ matrix
    roots = projected.norm(dim=1).sqrt()  # of the singular values
    return LowRank(left=leading * roots, right=projected / roots.clamp_min(torch.finfo(roots.dtype).tiny)[:, None])


def plan_losses(shapes: PreTrainedModel, layout: Layout, settings: LoraSettings) -> Losses | None:
    """Return which losses to take down for the adapter of `settings` while a model is read; None if it needs none.

    `shapes` is the model on the meta device, stored as `layout` says.

    Raises:
        ModelError: there is none to be had.
    """
    if settings.init_lora_weights != LoraInit.LOFTQ:
        return None
    if layout.prequantized is not None:
        raise ModelError(
            "lora.init_lora_weights=loftq needs the weights as they were before quantization, and the checkpoint "
            "holds them quantized",
            hint="Give the 16-bit model, or use another lora.init_lora_weights.",
        )
    modules, _ = target_modules(shapes, settings)
    layers = [name for name in adapted_layers(shapes, modules) if name not in layout.kept]
    if not layout.settings.method.is_4bit or not layers:
        raise ModelError(
            "lora.init_lora_weights=loftq begins with what 4-bit quantization lost, and no adapted layer is stored in "
            "4 bit",
            hint="Use --quant nf4 or fp4, or another lora.init_lora_weights.",
        )
    return Losses(ranks={f"{name}.weight": rank_of(name, settings) for name in layers})
