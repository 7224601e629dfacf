"""Shard the frozen base of a model among the processes of a run, by PyTorch's `fully_shard`.

Each process keeps a part of every weight. A layer gathers its weights when it is called, forward and backward, and
frees them afterwards. The adapter is not sharded: every process holds all of it, as without sharding.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loss.output_head import backbone_of
from qlora_cli.quantization.kept_shards import KeptShards, layer_names
from qlora_cli.quantization.memory_check import Shards, check_host_fit, free_bytes
from qlora_cli.quantization.sharded_units import ends_of, layers_of
from qlora_cli.ranks.group import ProcessGroup


def kept_shards(load_plan: LoadPlan, group: ProcessGroup, *, on_host: bool) -> KeptShards:
    """Return what keeps the shards of this process of the layers' weights, while a model is loaded by `load_plan`.

    `on_host`: in host memory, from which a layer is copied to the device when it is gathered.

    Raises:
        OutOfMemoryError: they do not fit there, with those of the other processes of this machine.
    """
    if on_host:
        shards, free = Shards(number=group.size, on_host=True), free_bytes(torch.device("cpu"))
        check_host_fit(load_plan.settings.model.name, load_plan.layout, shards, group.num_on_host, free)
    layers = tuple(layer_names(load_plan.shapes, GradientCheckpointingLayer))
    return KeptShards(rank=group.rank, size=group.size, device=load_plan.device, layers=layers, on_host=on_host)


def shard_base(model: PeftModel, group: ProcessGroup, shards: KeptShards) -> None:
    """Replace the frozen weights of `model` by the shards of this process; all processes of `group` call it.

    `shards` keeps those of the layers. What is in host memory otherwise is moved to the device; the shards of
    embedding and head are where those of the layers are.

    Raises:
        ModelError: the model has no layers that can be gathered one by one.
    """
    base: PreTrainedModel = model.get_base_model()
    units, shared = list(_units(base)), group.weights()
    kept = {parameter for parameter in model.parameters() if parameter.requires_grad}
    policy = CPUOffloadPolicy(pin_memory=shards.pins) if shards.on_host else OffloadPolicy()
    for unit in units:
        parts = _take_parts(unit, shards)
        # The head is no part of the backbone, and would stay gathered by default; in some processes only, since saving
        # the weights of a model shards it again.
        fully_shard(unit, mesh=shared.mesh, reshard_after_forward=True, ignored_params=kept, offload_policy=policy)
        assert isinstance(unit, FSDPModule)
        unit.set_custom_all_gather(shared.gather)
        for part in parts:
            part.put()
    assert shards.num_left == 0, "each is of a layer"
    # The backbone gathers nothing itself: what is in no unit stays whole. As the root, it lets its layers prefetch.
    backbone = backbone_of(base)
    kind = type(backbone)
    fully_shard(backbone, mesh=shared.mesh, ignored_params=set(backbone.parameters()))
    backbone.__class__ = kind  # by which transformers knows what it records, such as the logits of routers
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(shards.device)
    setattr(base, "hf_device_map", {"": shards.device})  # noqa: B010 - an attribute that transformers adds


def _units(base: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield what gathers its weights at once: each layer, the embedding and the head.

    Those with rows or an adapter that are trained stay whole. A weight that both share is held by each of them.
    """
    yield from layers_of(base)
    embedding, head = ends_of(base)
    if isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear) and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.data, requires_grad=False)
    yield from (end for end in (embedding, head) if end is not None)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The shard of this process of a weight, the attribute `name` of `module`."""

    module: nn.Module
    name: str
    shard: torch.Tensor

    @torch.no_grad()
    def put(self) -> None:
        """Give the module the shard, in place of one without memory.

        It stays where it is: `DTensor.from_local` would move one in host memory to the device.
        """
        tensor = torch.empty_like(getattr(self.module, self.name), device=self.shard.device)
        assert isinstance(tensor, DTensor), "of a module that `fully_shard` has sharded"
        tensor.to_local().data = self.shard
        setattr(self.module, self.name, nn.Parameter(tensor, requires_grad=False))


def _take_parts(unit: nn.Module, shards: KeptShards) -> list[_Part]:
    """Return the shards that are kept of the weights of `unit`, which become plain parameters without memory.

    So do other frozen parameters become plain ones: of those of bitsandbytes, the modules have the constants.
    """
    parts = []
    for module in unit.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                continue
            values = parameter.data
            if (shard := shards.take(parameter)) is not None:
                parts.append(_Part(module=module, name=name, shard=shard))
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    return parts
