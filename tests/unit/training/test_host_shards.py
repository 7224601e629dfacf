"""Shards in host memory stay there, although their processes compute on GPUs."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from qlora_cli.hardware.device import device_of
from qlora_cli.quantization.kept_shards import KeptShards
from qlora_cli.training.sharding.sharded_base import _Part

SIZE = 3


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of GPUs, which are not needed as long as nothing is sent or moved there."""
    dist.init_process_group("fake", rank=1, world_size=SIZE, store=FakeStore())
    yield DeviceMesh.from_group(dist.group.WORLD, "cuda")  # type: ignore[arg-type]
    dist.destroy_process_group()


def sharded_on_meta(weight: torch.Tensor, mesh: DeviceMesh, num_rows: int) -> DTensor:
    """Return what `fully_shard` makes of a weight without memory, of which this process has `num_rows`."""
    local = torch.empty((num_rows, *weight.shape[1:]), dtype=weight.dtype, device="meta")
    stride = weight.stride()
    return DTensor.from_local(local, mesh, (Shard(0),), run_check=False, shape=weight.shape, stride=stride)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
)
def test_a_shard_is_put_in_place_where_it_lies(mesh: DeviceMesh, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    shards = KeptShards(rank=1, size=SIZE, device=torch.device("cpu"), layers=("layer",), on_host=True)
    place = nn.Parameter(shards.keep("layer.weight", weight), requires_grad=False)
    shard = shards.take(place)
    assert shard is not None
    module = nn.Module()
    module.weight = nn.Parameter(sharded_on_meta(weight, mesh, len(shard)), requires_grad=False)
    _Part(module=module, name="weight", shard=shard).put()
    put = module.weight
    assert isinstance(put, DTensor)
    assert (put.shape, put.dtype, put.device.type) == (weight.shape, dtype, "cpu")
    assert put.to_local().data_ptr() == shard.data_ptr(), "a copy of all shards would take as much again"
    assert put.to_local().tolist() == [row.tolist() for row in weight.chunk(SIZE)[1:2] for row in row]
    assert device_of(put) == torch.device("cuda")
    assert device_of(shard) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows that a GPU would be needed")
def test_pytorch_itself_would_move_it(mesh: DeviceMesh) -> None:
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        DTensor.from_local(torch.ones(2), mesh, (Shard(0),), run_check=False)


@pytest.mark.parametrize(
    ("device", "on_host", "pins"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_memory_is_pinned_where_a_gpu_copies_from_it(device: str, on_host: bool, pins: bool) -> None:
    shards = KeptShards(rank=0, size=2, device=torch.device(device), layers=("layer",), on_host=on_host)
    assert shards.pins == pins
