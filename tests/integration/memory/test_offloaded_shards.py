"""What is predicted for a sharded base that is kept in host memory, compared with one on the GPUs."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from qlora_cli.memory.costs.step_time import rates_on, step_time
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.tracing.gathers import Gathers
from qlora_cli.memory.tracing.kernels import GATHER_BUFFERS, Kernels
from qlora_cli.memory.tracing.shards import ShardedBase, WeightShard
from qlora_cli.memory.tracing.trace import MemoryTrace
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.sections.inspect_memory import Link
from qlora_cli.timing.links import gather_seconds
from tests.support.models.tracing import deep_config

GPU = find_gpu("RTX 4090")
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}


@cache
def estimator(on_host: bool = False) -> Estimator:
    content = deep_config("llama", 12, **WIDE).to_dict()
    return Estimator(ModelFacts(name="wide", content=content), evaluates=False, on_host=on_host)


def run(num_gpus: int, method: str, *, offloads: bool) -> EstimateSettings:
    return EstimateSettings.model_validate(
        {
            "model": {"name": "wide"},
            "quantization": {"method": method},
            "data": {"max_length": 64},
            "training": {
                "num_gpus": num_gpus,
                "strategy": "fsdp",
                "offload_base": offloads,
                "gradient_checkpointing": "on",
            },
        }
    )


@pytest.mark.parametrize("method", ["nf4", "none"])
@pytest.mark.parametrize("num_gpus", [2, 3, 8])
def test_what_the_gpus_do_not_hold_the_host_does(num_gpus: int, method: str) -> None:
    on_gpu, on_host = run(num_gpus, method, offloads=False), run(num_gpus, method, offloads=True)
    before, after = (estimator().traced(settings, GPU) for settings in (on_gpu, on_host))
    assert before.sharded is not None
    assert after.sharded is not None
    shard_bytes = before.sharded.shard_bytes
    assert after.sharded.shard_bytes == shard_bytes > 0
    assert shard_bytes <= after.sharded.host_bytes < 2 * shard_bytes
    assert before.sharded.host_bytes == before.sharded.copied_bytes == 0
    # Of what is gathered, each process copies its own part, and receives those of the others.
    assert after.sharded.received_bytes == (num_gpus - 1) * after.sharded.copied_bytes == before.sharded.received_bytes
    whole, less = (estimator().estimate(settings, GPU) for settings in (on_gpu, on_host))
    assert less.components.quantized_weights_bytes == 0
    held = whole.components.weights_bytes - less.components.weights_bytes
    assert held == pytest.approx(shard_bytes, rel=0.01)
    assert less.predicted.allocated_bytes < whole.predicted.allocated_bytes
    of_host = [estimator().host_memory(settings, GPU, num_rows=0) for settings in (on_gpu, on_host)]
    assert of_host[1] == replace(of_host[0], shard_bytes=after.sharded.host_bytes)
    least = estimator().resident_bytes(on_host, GPU)
    assert GPU.context_bytes <= least <= less.predicted.process_bytes
    assert least < estimator().resident_bytes(on_gpu, GPU)


@given(received=st.integers(0, 2**36), copied=st.integers(0, 2**36))
def test_copies_from_the_host_take_time_where_the_computation_does_not_hide_them(received: int, copied: int) -> None:
    traced, known = estimator().traced(run(2, "none", offloads=True), GPU), rates_on(GPU)
    assert known is not None
    both = gather_seconds(received, Link.PCIE) + copied / known.rates.host_copy_bytes

    def seconds(received: int, copied: int) -> tuple[float, str]:
        time = step_time(
            traced.micro_batch,
            traced.update,
            GPU,
            num_micro_batches=1,
            num_tokens=64,
            pinned_host_bytes=0,
            received_bytes=received,
            copied_bytes=copied,
            num_processes=2,
        )
        assert time is not None
        return time.micro_batch_seconds, time.limited_by

    computing, limit = seconds(0, 0)
    assert seconds(received, copied) == (max(computing, both), "link" if both > computing else limit)


def test_on_a_cpu_all_memory_is_the_hosts() -> None:
    on_gpu, on_host = run(2, "nf4", offloads=False), run(2, "nf4", offloads=True)
    cpu = find_gpu("cpu")
    here = estimator(on_host=True)
    assert here.estimate(on_host, cpu).predicted == here.estimate(on_gpu, cpu).predicted
    assert here.host_memory(on_host, cpu, num_rows=0).shard_bytes == 0


@given(st.lists(st.integers(1, 2**34), min_size=1, max_size=20), st.integers(2, 64))
def test_pinned_memory_is_rounded_to_a_power_of_two_for_each_shard(sizes: list[int], num_processes: int) -> None:
    shards = {f"{index}": WeightShard("layer", size) for index, size in enumerate(sizes)}
    base = ShardedBase(shards=shards, num_processes=num_processes, is_on_host=True)
    assert base.shard_bytes <= base.host_bytes < 2 * base.shard_bytes
    alone = [replace(base, shards={name: shard}).host_bytes for name, shard in shards.items()]
    assert base.host_bytes == sum(alone)
    assert all(num_bytes.bit_count() == 1 for num_bytes in alone)


@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_shards_are_on_the_gpu_together_with_what_they_are_gathered_in_and_no_longer(num_processes: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deep_config("llama", 2), dtype=torch.bfloat16)
    model.requires_grad_(False)
    seen = []
    for from_host in (False, True):
        trace = MemoryTrace(Kernels((8, 0)))
        gathers = Gathers(trace, model, num_processes, from_host=from_host)
        gathers.before_marks()
        hooks = gathers.after_marks(model.model)
        with trace, torch.no_grad():
            model.model(input_ids=torch.zeros((1, 8), dtype=torch.long, device="meta"))
        for hook in hooks:
            hook.remove()
        live, peak = set[int](), 0
        for event in (event for segment in trace.segments for event in segment.events):
            live.add(event) if event >= 0 else live.discard(~event)
            peak = max(peak, sum(trace.storages[one].num_bytes for one in live if _is_buffer(trace, one)))
        assert not any(_is_buffer(trace, one) for one in live)
        seen.append(peak)
    largest = max(
        sum(-(-one.shape[0] // num_processes) * one[:1].nbytes for one in unit.parameters())
        for unit in (*model.model.layers, model.model.embed_tokens)
    )
    assert seen[1] - seen[0] == largest


def _is_buffer(trace: MemoryTrace, number: int) -> bool:
    return trace.storages[number].label == GATHER_BUFFERS
