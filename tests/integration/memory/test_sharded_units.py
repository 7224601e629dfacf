"""The buffers of a sharded base are those of PyTorch's `fully_shard`, run on tensors without bytes in a fake group."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_cli.memory.tracing.gathers import Gathers
from qlora_cli.memory.tracing.kernels import GATHER_BUFFERS, GATHERED, Kernels
from qlora_cli.memory.tracing.trace import MemoryTrace
from qlora_cli.quantization.sharded_units import layers_of
from tests.support.models.tracing import deep_config

NUM_LAYERS = 4
# What is gathered where something is computed: the pass, the layer, the bytes of buffers and those of weights.
Seen = list[tuple[str, int, int, int]]
Count = Callable[[], tuple[int, int]]


@pytest.fixture(params=[2, 3, 8])
def group_size(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


class Buffers:
    """Allocates what weights are gathered in, as `fully_shard` asks for it, and gathers nothing."""

    def __init__(self) -> None:
        self.storages: list[weakref.ref[Any]] = []

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        buffer = torch.empty(*size, dtype=dtype, device=device)
        self.storages.append(weakref.ref(buffer.untyped_storage()))
        return buffer

    def __call__(self, **_: Any) -> None:
        return None

    def num_bytes(self) -> int:
        return sum(storage.nbytes() for reference in self.storages if (storage := reference()) is not None)


def built(family: str, checkpointing: bool, device: str) -> PreTrainedModel:
    """Return a frozen model but for a weight of each layer, which stands for the adapter, and two of one layer."""
    config = deep_config(family, NUM_LAYERS)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("q_proj.weight", "2.mlp.up_proj.weight")))
    model.config.use_cache = False
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # as `enable_checkpointing` does
    model.train()
    return model


def probed(model: PreTrainedModel, count: Count) -> Seen:
    """Return a list that is filled with what is gathered in the middle of each layer, forward and backward."""
    seen: Seen = []

    def probe(index: int) -> Callable[..., None]:
        def run(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            seen.append(("forward", index, *count()))
            if output.requires_grad:
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda _: seen.append(("backward", index, *count()))
                )

        return run

    for index, layer in enumerate(layers_of(model)):
        layer.get_submodule("mlp").register_forward_hook(probe(index))
    return seen


def run_passes(model: PreTrainedModel, device: str, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Run two training passes and an evaluation; call what comes before and after a backward pass."""
    given = {
        "input_ids": torch.zeros((1, 8), dtype=torch.long, device=device),
        "attention_mask": torch.zeros((1, 1, 8, 8), dtype=torch.bfloat16, device=device),  # one that is not made
        "position_ids": torch.zeros((1, 8), dtype=torch.long, device=device),
    }
    for _ in range(2):
        loss = model.base_model(**given).last_hidden_state.float().sum()
        before()
        loss.backward()
        after()
    with torch.no_grad():
        model.base_model(**given)


def with_fully_shard(family: str, checkpointing: bool, size: int) -> Seen:
    buffers, mesh = Buffers(), init_device_mesh("cpu", (size,))
    with FakeTensorMode():
        model = built(family, checkpointing, "cpu")
        embedding = model.get_input_embeddings()
        units = [*layers_of(model), embedding]
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}

        def count() -> tuple[int, int]:
            frozen = [weight for unit in units for weight in unit.parameters() if not weight.requires_grad]
            whole = [weight for weight in frozen if not isinstance(weight, DTensor)]
            return buffers.num_bytes(), sum(weight.untyped_storage().nbytes() for weight in whole)

        for unit in units:
            fully_shard(unit, mesh=mesh, ignored_params=trained)
            assert isinstance(unit, FSDPModule)
            unit.set_custom_all_gather(buffers)  # type: ignore[arg-type]
        fully_shard(model.base_model, mesh=mesh, ignored_params=set(model.base_model.parameters()))
        seen = probed(model, count)
        run_passes(model, "cpu", lambda: None, lambda: None)
    return seen


def with_trace(family: str, checkpointing: bool, size: int) -> Seen:
    model = built(family, checkpointing, "meta")
    trace = MemoryTrace(Kernels((8, 0)))
    gathers = Gathers(trace, model, size)

    def count() -> tuple[int, int]:
        live: set[int] = set()
        for event in (event for segment in trace.segments for event in segment.events):
            live.add(event) if event >= 0 else live.discard(~event)
        of_label = {GATHER_BUFFERS: 0, GATHERED: 0}
        for storage in (trace.storages[number] for number in live):
            if storage.label in of_label:
                of_label[storage.label] += storage.num_bytes
        return of_label[GATHER_BUFFERS], of_label[GATHERED]

    gathers.before_marks()
    gathers.after_marks(model.base_model)
    seen = probed(model, count)

    def before() -> None:
        trace.in_autograd_thread = True

    def after() -> None:
        trace.in_autograd_thread = False
        gathers.end_backward()
        assert count() == (0, 0)

    with trace:
        run_passes(model, "meta", before, after)
    assert count() == (0, 0)
    return seen


@pytest.mark.parametrize("checkpointing", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_is_gathered_in_each_layer_is_what_fully_shard_gathers(
    family: str, checkpointing: bool, group_size: int
) -> None:
    expected = with_fully_shard(family, checkpointing, group_size)
    kinds = {kind for kind, *_ in expected}
    assert kinds == {"forward", "backward"}
    assert all(buffers and weights for _, _, buffers, weights in expected)
    assert with_trace(family, checkpointing, group_size) == expected
