"""Whether an adapter that was read can train on: `train` refuses one that can't, and `inspect-memory` says so."""

from transformers import PreTrainedModel

from qlora_cli.adapters.initialization import changes_its_base, is_pissa
from qlora_cli.adapters.reader import Adapter
from qlora_cli.adapters.targets import is_target
from qlora_cli.errors import ModelError


def why_not_trained_on(adapter: Adapter, model: PreTrainedModel) -> ModelError | None:
    """Return why an adapter on `model`, its base, which may be on the meta device, can't train on; None if it can.

    What is written has to be an adapter of the base as it was, into which PiSSA alone is turned. And the loss reads
    the weight of the head, past an adapter on it.
    """
    cannot = f"the adapter in {adapter.directory} can't train on"
    reason = changes_its_base(adapter.lora)
    if reason is not None and not is_pissa(adapter.lora):
        return ModelError(
            f"{cannot}: its base is not the model as it was, since {reason}", hint="Train a new adapter on the base."
        )
    if (head := _adapted_head(adapter, model)) is not None:
        return ModelError(
            f"{cannot}: it has LoRA on {head}, whose weight the loss is computed from directly, so that part would "
            "never be trained",
            hint="Merge it into its base with qlora merge, and train a new adapter on the result.",
        )
    return None


def _adapted_head(adapter: Adapter, model: PreTrainedModel) -> str | None:
    """Return the name of the head if the adapter has LoRA on it."""
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if head is not None and module is head]
    return next((name for name in names if is_target(adapter.lora, name)), None)
