"""Check whether an adapter can be trained further; `train` refuses one that can't, `inspect-memory` notes it."""

from transformers import PreTrainedModel

from qlora_cli.adapters.initialization import base_change, is_pissa
from qlora_cli.adapters.reader import Adapter
from qlora_cli.adapters.targets import is_target
from qlora_cli.errors import ModelError


def further_training_problem(adapter: Adapter, model: PreTrainedModel) -> ModelError | None:
    """Return why an adapter on `model`, its base, maybe on the meta device, can't be trained further; None if it can.

    The result must be an adapter of the original base, which of adapters that change it only PiSSA can be converted
    to. And the loss reads the weight of the head, bypassing an adapter on it.
    """
    cannot = f"the adapter in {adapter.directory} can't be trained further"
    reason = base_change(adapter.lora)
    if reason is not None and not is_pissa(adapter.lora):
        return ModelError(
            f"{cannot}: its base is not the original model, since {reason}", hint="Train a new adapter on the base."
        )
    if (head := _adapted_head(adapter, model)) is not None:
        return ModelError(
            f"{cannot}: it has LoRA on {head}, whose weight the loss reads directly, so that part would "
            "never be trained",
            hint="Merge it into its base with qlora merge, and train a new adapter on the result.",
        )
    return None


def _adapted_head(adapter: Adapter, model: PreTrainedModel) -> str | None:
    """Return the name of the head if the adapter has LoRA on it."""
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if head is not None and module is head]
    return next((name for name in names if is_target(adapter.lora, name)), None)
