"""The interface of a frozen weight to the layer that adds an adapter to its products; see `adapters/fused_lora.py`."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn


class FusedProduct(ABC):
    """Multiplies by the frozen weights of one type of layer, `(out, in)`.

    Attributes:
        layer_type: The type of layer, by `isinstance`.
        lora_type: PEFT's layer of an adapter on such a layer.
        operator: What `product` computes with, as `namespace::name`: one operator, whose result selective
            checkpointing keeps.
        dequantizes: Whether it dequantizes the weight for each product.
    """

    layer_type: type[nn.Module]
    lora_type: type[nn.Module]
    operator: str
    dequantizes: bool

    @abstractmethod
    def compute_dtype(self, layer: Any) -> torch.dtype | None:
        """Return the dtype in which `layer` multiplies; None if `product` can't multiply by its weight."""

    @abstractmethod
    def product(
        self, layer: Any, rows: torch.Tensor, low: torch.Tensor, b: torch.Tensor, scale: float, x_dtype: torch.dtype
    ) -> torch.Tensor:
        """Return `rows` W^T + bias + scale · `low` `b`^T, `(…, out)`, without a graph.

        `rows` are x in the dtype of products, `(…, in)`, `low` the rows times A^T, `(…, rank)`, and `b` is
        `(out, rank)`; all in one dtype, in which W is multiplied. The sum is computed and returned in the dtype in
        which the layer alone returns its product with x, which has `x_dtype`.
        """

    @abstractmethod
    def gradient(
        self, layer: Any, gradient: torch.Tensor, of_low: torch.Tensor, a: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the gradient of the rows, `gradient` W + `of_low` `a` in `dtype`, `(rows, in)`, without a graph.

        `gradient` is `(rows, out)`, `of_low` that of the rows times A^T, `(rows, rank)`, and `a` is `(rank, in)`; all
        in one dtype, in which W is multiplied. Compiled code can trace it.
        """
