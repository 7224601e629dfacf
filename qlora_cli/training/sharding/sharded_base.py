"""Shard the frozen base of a model among the processes of a run, by PyTorch's `fully_shard`.

Each process keeps a part of every weight. A layer gathers its weights when it is called, forward and backward, and
frees them afterwards. The adapter is not sharded: every process holds all of it, as without sharding.
"""

from collections.abc import Iterable, Iterator

from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_cli.errors import ModelError
from qlora_cli.loss.output_head import backbone_of
from qlora_cli.quantization.embedding import is_tied
from qlora_cli.ranks.group import ProcessGroup


def shard_base(model: PeftModel, group: ProcessGroup) -> None:
    """Replace the frozen weights of `model` by the shards of this process; all processes of `group` call it.

    Raises:
        ModelError: the model has no layers that can be gathered one by one.
    """
    base: PreTrainedModel = model.get_base_model()
    units, shared = list(_units(base)), group.weights()
    kept = {parameter for parameter in model.parameters() if parameter.requires_grad}
    _forget_types(units)
    for unit in units:
        fully_shard(unit, mesh=shared.mesh, ignored_params=kept)
        assert isinstance(unit, FSDPModule)
        unit.set_custom_all_gather(shared.gather)
    # The backbone gathers nothing itself: what is in no unit stays whole. As the root, it lets its layers prefetch.
    backbone = backbone_of(base)
    fully_shard(backbone, mesh=shared.mesh, ignored_params=set(backbone.parameters()))


def _units(base: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield what gathers its weights at once: each layer, the embedding and the head.

    Those with rows or an adapter that are trained stay whole. A weight that both share is held by each of them.
    """
    layers = [layer for layer in base.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(base).__name__} has no decoder layers that could be gathered one by one",
            hint="Use --strategy ddp.",
            setting="training.strategy",
        )
    yield from layers
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if is_tied(base) and isinstance(head, nn.Linear):
        head.weight = nn.Parameter(head.weight.data, requires_grad=False)
    yield from (end for end in (embedding, head) if isinstance(end, nn.Embedding | nn.Linear))


def _forget_types(units: Iterable[nn.Module]) -> None:
    """Make plain parameters of those of bitsandbytes, whose modules know how to dequantize a gathered weight."""
    for unit in units:
        for module in unit.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if type(parameter) is not nn.Parameter and not parameter.requires_grad:
                    setattr(module, name, nn.Parameter(parameter.data, requires_grad=False))
