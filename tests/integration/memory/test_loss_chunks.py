"""A loss of which a few chunks are traced has the events and operations of one that is traced whole."""

import random
from typing import Any

import pytest
import torch

from qlora_cli.loss.chunked_loss import slices
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.traced_run import TracedRun
from qlora_cli.memory.tracing.kernels import Kernels
from qlora_cli.memory.tracing.loss_chunks import LossChunks
from qlora_cli.memory.tracing.operation_count import OperationCount
from qlora_cli.memory.tracing.passes import Passes, TracedStorage
from qlora_cli.memory.tracing.trace import MemoryTrace
from qlora_cli.memory.tracing.training_step import TrainingStep
from qlora_cli.settings.models import EstimateSettings
from tests.support.models.tracing import deep_config

VOCABULARY = 128_256  # chunks of 256 tokens
NUM_TOKENS = 1_700  # six such chunks, and a shorter one
Form = list[tuple[str, int, str]]


class WholeLoss(TrainingStep):
    """A step of which every chunk of the loss is traced."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._chunks = slices


def form_of(storages: list[TracedStorage], events: list[int]) -> Form:
    """Return events by what they allocate and release, which are numbered in order."""
    order: dict[int, int] = {}
    form = []
    for event in events:
        number = event if event >= 0 else ~event
        kind = "allocate" if event >= 0 else "release"
        storage = storages[number]
        form.append((kind, order.setdefault(number, len(order)), f"{storage.num_bytes} {storage.label}"))
    return form


def form_of_passes(passes: Passes) -> Form:
    return form_of(passes.storages, [event for of_pass in passes.events.values() for event in of_pass])


def traced(config: dict[str, Any], gpu: str, loop: Any, **training: Any) -> TracedRun:
    settings = EstimateSettings.model_validate(
        {
            "model": {"name": "tiny"},
            "data": {"max_length": NUM_TOKENS},
            "training": {"gradient_accumulation_steps": 2, "eval_steps": 5, **training},
        }
    )
    return Estimator(ModelFacts(name="tiny", content=config), loop=loop).traced(settings, find_gpu(gpu))


@pytest.mark.parametrize(
    ("family", "changes", "gpu", "training"),
    [
        ("llama", {}, "RTX 4090", {}),
        ("llama", {"tie_word_embeddings": True}, "RTX 4090", {"gradient_checkpointing": "off"}),
        ("llama", {}, "T4", {"gradient_checkpointing": "selective"}),
        ("gemma2", {}, "RTX 4090", {"gradient_checkpointing": "offload"}),
        ("cohere", {}, "RTX 4090", {}),
        ("qwen3", {}, "RTX 4090", {"micro_batch_size": 2}),
    ],
)
def test_the_events_and_operations_are_those_of_every_chunk(
    family: str, changes: dict[str, Any], gpu: str, training: dict[str, Any]
) -> None:
    config = deep_config(family, 3, vocab_size=VOCABULARY, max_position_embeddings=2048, **changes).to_dict()
    few, whole = (traced(config, gpu, loop, **training) for loop in (None, WholeLoss))
    assert form_of_passes(few.events.step) == form_of_passes(whole.events.step)
    assert few.events.step.events.keys() == whole.events.step.events.keys()
    assert len(few.events.step.permanent) == len(whole.events.step.permanent)
    assert few.micro_batch == whole.micro_batch


class Loop:
    """A loop over chunks that allocates and releases tensors as drawn, alike in every turn but for `grows`."""

    def __init__(self, seed: int, *, grows: bool) -> None:
        drawn = random.Random(seed)  # noqa: S311 - no secret
        self.sizes = [drawn.randrange(1, 1000) for _ in range(drawn.randrange(1, 6))]
        self.kept = [drawn.random() < 0.5 for _ in self.sizes]
        self.order = drawn.sample(range(len(self.sizes)), len(self.sizes))
        self.grows = grows
        self.num_turns = 0

    def events(self, *, every: bool) -> Form:
        trace = MemoryTrace(Kernels((8, 0)))
        operations = OperationCount(trace, 1)
        chunks = slices if every else LossChunks(trace, operations)
        kept: list[Any] = [None] * len(self.sizes)
        grown: list[torch.Tensor] = []
        self.num_turns = 0
        with trace:
            operations.start()
            first = torch.empty(3, device="meta")
            for chunk in chunks(103, 10):
                self.num_turns += 1
                made: list[Any] = [torch.empty(size, device="meta").mul_(2) for size in self.sizes]
                for index in self.order:
                    kept[index] = made[index] if self.kept[index] else None
                    made[index] = None
                if self.grows:
                    grown.append(torch.empty(chunk.stop - chunk.start, device="meta"))
            del first, made, kept, grown
            operations.stop()
        self.counted = sorted(operations.of_parts.items(), key=str)
        assert len(trace.segments) == 1
        return form_of(trace.storages, trace.segments[0].events)


@pytest.mark.parametrize("grows", [False, True])
def test_a_loop_of_any_kind_has_the_events_and_operations_of_every_turn(grows: bool) -> None:
    for seed in range(40):
        loop = Loop(seed, grows=grows)
        expected, counted = loop.events(every=True), loop.counted
        assert loop.num_turns == 11
        assert loop.events(every=False) == expected
        assert loop.counted == counted
        assert loop.num_turns == (11 if grows else 4)  # a turn that leaves something behind has to be run
