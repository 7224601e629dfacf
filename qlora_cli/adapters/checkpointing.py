"""Checkpointing of activations: what a decoder layer keeps for its backward pass, and what it computes again there.

`selective` keeps the results that are expensive to compute again for their size: the products of the base's weights,
and attention. The rest, such as norms, activation functions and the adapter's products, is recomputed. Outputs and
gradients are those of `on` and `off`, to the bit.
"""

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_cli.errors import ModelError
from qlora_cli.quantization.methods import all_methods
from qlora_cli.settings.choices import Checkpointing

# Kernels of attention that store no scores, of PyTorch and of flash-attn.
ATTENTION = frozenset(
    f"aten::_scaled_dot_product_{kernel}"
    for kernel in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
) | {"flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"}
UNQUANTIZED_PRODUCTS = frozenset(("aten::mm", "aten::addmm"))


class CheckpointingHandle:
    """Removes checkpointing from a model again."""

    def __init__(self, base: PreTrainedModel, hooks: list[RemovableHandle]) -> None:
        self._base = base
        self._hooks = hooks

    def remove(self) -> None:
        """Let the layers keep all activations, as without checkpointing."""
        for hook in self._hooks:
            hook.remove()
        self._base.disable_input_require_grads()
        self._base.activation_checkpointing_disable()


def enable_checkpointing(
    model: PeftModel, checkpointing: Checkpointing, kept_products: Collection[str] | None = None
) -> CheckpointingHandle | None:
    """Have the layers of `model` recompute activations in the backward pass; None for `off`.

    `checkpointing` is not `auto`. `kept_products` are the linear layers whose products `selective` keeps, by the last
    part of their names; None for all.

    Raises:
        ModelError: the model does not support it, or has no layers of these names.
    """
    if checkpointing == Checkpointing.OFF:
        return None
    base: PreTrainedModel = model.get_base_model()
    if not base.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(base).__name__} does not support gradient checkpointing",
            hint="Use --gradient-checkpointing off.",
        )
    arguments: dict[str, Any] = {"use_reentrant": False}
    hooks: list[RemovableHandle] = []
    if checkpointing == Checkpointing.SELECTIVE:
        policy = _KeepsProducts()
        hooks = list(policy.watch(base, kept_products))
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    # It also makes the embeddings' output require gradients.
    base.activation_checkpointing_enable(arguments, offload=checkpointing == Checkpointing.OFFLOAD)
    return CheckpointingHandle(base, hooks)


class _KeepsProducts:
    """The policy of selective checkpointing, which is asked for each operation of a layer."""

    def __init__(self) -> None:
        self._num_linear = 0  # linear layers of the base that are computing
        self._num_adapted = 0  # such layers with their adapters
        methods = all_methods()
        self._products = UNQUANTIZED_PRODUCTS.union(*(method.products for method in methods))
        # Those of a layer with its adapter, which the adapter's own product is part of.
        self._sums = {product.operator for method in methods for product in method.fused_products}

    def watch(self, base: PreTrainedModel, names: Collection[str] | None) -> Iterator[RemovableHandle]:
        """Note while a linear layer with one of the `names` computes, to keep its products and not the adapter's.

        Raises:
            ModelError: no layer has one of the names.
        """
        layers = linear_layers_by_name(base)
        if unknown := set(names or ()) - set(layers):
            raise ModelError(
                f"{type(base).__name__} has no linear layer {', '.join(sorted(unknown))}",
                hint=f"Its linear layers are {', '.join(sorted(layers))}.",
                setting="training.kept_products",
            )
        for name, modules in layers.items():
            if names is None or name in names:
                for module in modules:
                    yield from self._watch(module)

    def _watch(self, module: nn.Module) -> list[RemovableHandle]:
        counter = "_num_adapted" if isinstance(module, LoraLayer) else "_num_linear"

        def enter(*_: Any) -> None:
            setattr(self, counter, getattr(self, counter) + 1)

        def leave(*_: Any) -> None:
            setattr(self, counter, getattr(self, counter) - 1)

        # PyTorch ends a recomputation by an exception as soon as it has all that is needed.
        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]

    def __call__(self, _context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        name: str = operation.name()
        is_product = (self._num_adapted and name in self._sums) or (self._num_linear and name in self._products)
        if is_product or name in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def linear_layers_by_name(base: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the linear layers of `base` and those with an adapter around them, by the last part of their names."""
    adapted = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    of_adapters = {
        part
        for module in adapted.values()
        for name in module.adapter_layer_names
        for part in getattr(module, name).modules()
    }
    layers: dict[str, list[nn.Module]] = {}
    for name, module in base.named_modules():
        if name in adapted or (isinstance(module, nn.Linear | Conv1D) and module not in of_adapters):
            layers.setdefault(name.removesuffix(".base_layer").rpartition(".")[2], []).append(module)
    return layers
