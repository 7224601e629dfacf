"""A trace on meta tensors equals one on real tensors on a CPU: every allocation and release, in order.

In fp32 without autocast, which differs on a CPU; with eager attention, or with PyTorch's composition of
`scaled_dot_product_attention`: a CPU has other fused kernels than a GPU. Kernels of bitsandbytes are opaque on both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.optim
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.attention import blockwise
from qlora_cli.memory.replaying.optimizer_step import FIRST, optimizer_steps
from qlora_cli.memory.tracing.extension import passes_of
from qlora_cli.memory.tracing.kernels import CUBLAS, Kernels
from qlora_cli.memory.tracing.layers import find_stack
from qlora_cli.memory.tracing.meta_model import MetaModel, build_meta_model
from qlora_cli.memory.tracing.passes import MISMATCHED, REFERENCE, Passes
from qlora_cli.memory.tracing.trace import MemoryTrace, Segment
from qlora_cli.memory.tracing.training_step import TracedStep, trace_step
from qlora_cli.quantization.methods.method import META
from qlora_cli.quantization.storage_plan import build_on_meta
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.settings.choices import Optimizer, SdpaBackend
from qlora_cli.settings.models import LoraSettings
from qlora_cli.settings.objectives import Objective
from qlora_cli.training.callbacks.stop import StopSignal
from qlora_cli.training.rehearsal import RehearsalCallback
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.session import Session
from tests.conftest import Recorder, train_settings
from tests.support.models.loading import load, save_model
from tests.support.models.tracing import peaks, step_settings, uncounted

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
# Families, and changes to their configs.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "experts": ("mixtral", {}),
    "shared experts": ("qwen2_moe", {}),
    "sliding windows": ("gemma3_text", WINDOWS),
    "biases": ("starcoder2", {}),
    "transposed weights": ("gpt2", {"vocab_size": 3136}),
    "latent attention": ("deepseek_v3", {}),
    "linear attention": ("qwen3_next", {}),
    "state space": ("bamba", {}),
    "soft caps": ("gemma2", WINDOWS),
    "sinks": ("gpt_oss", WINDOWS),
}
STEPS: dict[str, dict[str, Any]] = {
    "checkpointing": {},
    "no checkpointing": {"checkpointing": "off"},
    "selective checkpointing": {"checkpointing": "selective"},
    "packing": {"is_packed": True, "batch_size": 2},
    "padded rows": {"batch_size": 2},
    "one micro-batch": {"gradient_accumulation_steps": 1},
    "two micro-batches": {"gradient_accumulation_steps": 2},  # otherwise four
    "no evaluation": {"evaluates": False},
    "layers of PEFT": {"fuses_lora": False},
}
# Where PyTorch copies a tensor of real data that it does not copy on meta, and its bytes; see the test below.
COPIED = ("linear attention", "padded rows", 2 * 20 * 8 * 4)


@dataclass(frozen=True)
class Pair:
    """A model with real tensors, and the same model on the meta device."""

    real: MetaModel
    meta: MetaModel

    def traced(self, **changes: Any) -> tuple[TracedStep, TracedStep]:
        """Return the same step of both models."""
        steps = []
        for model, device in ((self.real, CPU), (self.meta, META)):
            values = {"is_autocast": False, "dtype": torch.float32, "attention": "eager", "backend": SdpaBackend.MATH}
            settings = step_settings(**{**values, "length": 20, "device": device, **changes})
            steps.append(trace_step(model, settings, uncounted(settings.objective)))
        return steps[0], steps[1]


Make = Callable[..., Pair]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that loads models, and builds the same on the meta device, each once."""
    known: dict[str, Pair] = {}

    def make(name: str, lora: LoraSettings | None = None) -> Pair:
        key = f"{name} {lora}"
        if key not in known:
            known[key] = _pair(*MODELS[name], tmp_path_factory.mktemp("model"), lora or LoraSettings(rank=8))
        return known[key]

    return make


def _pair(family: str, changes: dict[str, Any], directory: Path, lora: LoraSettings) -> Pair:
    loaded = load(save_model(directory, family, **changes))
    shapes = build_on_meta(loaded.base.config, torch.float32)
    model, notes = attach_adapter(loaded.base, lora)
    meta = build_meta_model(shapes, loaded.layout, lora, compute_dtype=torch.float32, whole=True)
    assert meta.notes == notes
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in meta.model.named_parameters()
    }
    return Pair(real=MetaModel(model=model, stack=None, chosen=(), notes=notes), meta=meta)


def event_sizes(passes: Passes) -> dict[str, list[tuple[int, int]]]:
    """Return the events of every pass: a storage by the order of allocation, and its bytes, negative if released."""
    numbers: dict[int, int] = {}
    by_pass: dict[str, list[tuple[int, int]]] = {}
    for name, events in passes.events.items():
        by_pass[name] = []
        for event in events:
            number = numbers.setdefault(event if event >= 0 else ~event, len(numbers))
            size = passes.storages[event if event >= 0 else ~event].num_bytes
            by_pass[name].append((number, size if event >= 0 else -size))
    return by_pass


def assert_same(real: TracedStep, meta: TracedStep) -> None:
    on_cpu, on_meta = passes_of(real.trace), passes_of(meta.trace)
    actual, expected = event_sizes(on_meta), event_sizes(on_cpu)
    for name, events in expected.items():
        assert actual[name] == events, name
    assert actual.keys() == expected.keys()
    assert peaks(on_meta) == peaks(on_cpu)
    assert sum(len(events) for events in expected.values()) > 500


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("model", ["plain", "experts", "sliding windows"])
def test_every_allocation_and_release_is_that_of_real_tensors(pair: Make, model: str, step: str) -> None:
    assert_same(*pair(model).traced(**STEPS[step]))


@pytest.mark.parametrize(("model", "is_packed"), [("plain", True), ("experts", False)])
def test_pairs_and_their_reference_allocate_on_meta_as_with_real_tensors(
    pair: Make, model: str, is_packed: bool
) -> None:
    settings: dict[str, Any] = {"batch_size": 2, "is_packed": is_packed, "gradient_accumulation_steps": 2}
    real, meta = pair(model).traced(objective=Objective.DPO, **settings)
    assert_same(real, meta)
    events = passes_of(meta.trace).events
    references = [events[f"{name}{REFERENCE}"] for name in ("first forward", "again forward", "evaluation")]
    assert all(len(reference) > 100 for reference in references)
    real, meta = pair(model).traced(objective=Objective.ORPO, **settings)
    assert_same(real, meta)
    assert {name for name in events if not name.endswith(REFERENCE)} == set(passes_of(meta.trace).events)


def test_labels_and_their_baseline_allocate_on_meta_as_with_real_tensors(pair: Make) -> None:
    settings: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 2}
    real, meta = pair("plain").traced(objective=Objective.KTO, **settings)
    assert_same(real, meta)
    events = passes_of(meta.trace).events
    openings = (f"{MISMATCHED}{REFERENCE}", MISMATCHED, REFERENCE)
    for name in ("first forward", "again forward", "evaluation"):
        assert all(len(events[f"{name}{opening}"]) > 100 for opening in openings)


@pytest.mark.parametrize("step", ["checkpointing", "no checkpointing", "selective checkpointing", "padded rows"])
@pytest.mark.parametrize("model", [name for name in MODELS if name not in ("plain", "experts", "sliding windows")])
def test_every_kind_of_model_allocates_on_meta_as_with_real_tensors(pair: Make, model: str, step: str) -> None:
    if (model, step) != COPIED[:2]:
        assert_same(*pair(model).traced(**STEPS[step]))


@pytest.mark.parametrize("fuses_lora", [True, False])
def test_one_copy_of_gates_in_the_backward_pass_is_not_seen_on_meta(pair: Make, fuses_lora: bool) -> None:
    """The strides of a gradient of `(batch, seq, 2 * heads)` are inferred differently; the copy is freed soon."""
    model, step, size = COPIED
    real, meta = (passes_of(traced.trace) for traced in pair(model).traced(**STEPS[step], fuses_lora=fuses_lora))
    on_meta = event_sizes(meta)
    for name, events in event_sizes(real).items():
        expected = [size for _, size in on_meta[name]]
        if name.endswith("backward"):
            copies = {number for number, num_bytes in events if num_bytes == size}
            assert any(_without(events, number) == expected for number in copies)
        else:
            assert [size for _, size in events] == expected
    assert peaks(real) == peaks(meta)


def _without(events: list[tuple[int, int]], storage: int) -> list[int]:
    """Return the sizes of the events, but for those of one storage."""
    return [size for number, size in events if number != storage]


@pytest.mark.parametrize("step", ["checkpointing", "no checkpointing", "selective checkpointing", "padded rows"])
def test_attention_composed_by_pytorch_is_the_same(pair: Make, step: str) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(*pair("plain").traced(attention="sdpa", **STEPS[step]))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("model", ["soft caps", "sinks"])
def test_attention_by_blocks_is_the_same(pair: Make, monkeypatch: pytest.MonkeyPatch, model: str, step: str) -> None:
    for name, value in (("MAX_SCORES", 2**9), ("MIN_ROWS", 4), ("WINDOW_ROWS", 4)):
        monkeypatch.setattr(blockwise, name, value)
    blockwise.register_blockwise()
    real, meta = pair(model).traced(attention="blockwise", **STEPS[step])
    assert_same(real, meta)
    assert meta.backends == ("blockwise",)


def test_a_loss_weighted_by_probability_is_the_same(pair: Make) -> None:
    real, meta = pair("soft caps").traced(trains_dft=True)
    assert_same(real, meta)
    weighted, plain = (event_sizes(passes_of(one.trace)) for one in (meta, pair("soft caps").traced()[1]))
    assert {name for name, events in weighted.items() if events != plain[name]} >= {"first forward", "again forward"}
    assert [size for _, size in weighted["evaluation"]] == [size for _, size in plain["evaluation"]]


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_the_noise_of_neftune_is_the_same_but_for_numbers_that_stay_on_the_host(
    pair: Make, checkpointing: str
) -> None:
    traced = pair("plain").traced(checkpointing=checkpointing, batch_size=2, adds_noise=True)
    real, meta = (passes_of(step.trace) for step in traced)
    single = 8  # bytes at most: the scale of the noise is computed on the host, which here is the device
    actual, expected = (
        {name: [size for _, size in events if abs(size) > single] for name, events in event_sizes(passes).items()}
        for passes in (meta, real)
    )
    assert actual == expected
    (without,) = (
        passes_of(step.trace) for step in pair("plain").traced(checkpointing=checkpointing, batch_size=2)[1:]
    )
    noise = 2 * 20 * 64 * 4  # of each embedded token, in fp32, twice: itself and the sum
    sizes = [size for _, size in event_sizes(without)["first forward"] if abs(size) > single]
    assert len(actual["first forward"]) > len(sizes)
    assert actual["first forward"].count(noise) - sizes.count(noise) == 2
    assert actual["evaluation"] == [size for _, size in event_sizes(without)["evaluation"] if abs(size) > single]


def test_adapters_on_experts_are_the_same(pair: Make) -> None:
    assert_same(*pair("experts", LoraSettings(rank=8, target_parameters="all-experts")).traced())


ADAPTERS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "DoRA with dropout": {"use_dora": True, "dropout": 0.1},
    "ranks by layer": {"rank_pattern": {"down_proj": 4, "layers.1.mlp.down_proj": 2, "q_proj": 16}},
    "rsLoRA": {"use_rslora": True},
    "head": {"modules_to_save": ("lm_head",)},
    "embedding": {"modules_to_save": ("embed_tokens",)},
    "norms": {"modules_to_save": ("norm", "input_layernorm")},
}


@pytest.mark.parametrize("step", ["checkpointing", "no checkpointing"])
@pytest.mark.parametrize("model", ["plain", "tied embeddings"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_other_adapters_are_the_same(pair: Make, adapter: str, model: str, step: str) -> None:
    assert_same(*pair(model, LoraSettings(rank=8, **ADAPTERS[adapter])).traced(**STEPS[step]))


@pytest.mark.parametrize("model", ["transposed weights", "biases", "experts", "state space"])
def test_dora_is_the_same_on_other_layers(pair: Make, model: str) -> None:
    assert_same(*pair(model, LoraSettings(rank=8, use_dora=True)).traced())


def test_dropout_is_the_same(pair: Make) -> None:
    assert_same(*pair("plain", LoraSettings(rank=8, dropout=0.1)).traced(checkpointing="off"))


def test_adamw_allocates_the_same_for_a_real_adapter(pair: Make) -> None:
    trained = [parameter for parameter in pair("plain").real.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(trained, foreach=True)
    counters = 4  # bytes: steps are counted on the host, also where parameters are on a GPU
    trace = _around(optimizer, trained)
    predicted = optimizer_steps(Optimizer.ADAMW_TORCH, [trained], clips=False).passes
    expected = [predicted.storages[event].num_bytes for event in predicted.events[FIRST] if event >= 0]
    assert [storage.num_bytes for storage in trace.storages if storage.num_bytes > counters] == expected
    assert len(expected) == 3 * len(trained)


def test_8_bit_adamw_leaves_the_same_for_a_real_adapter(pair: Make) -> None:
    trained = [parameter for parameter in pair("plain").real.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = bitsandbytes.optim.AdamW8bit(trained, min_8bit_size=512)  # the tiny adapter's are below 4096
    optimizer.step()
    real = [
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.startswith("qmap")
    ]
    assert real
    optimizer = bitsandbytes.optim.AdamW8bit(trained)
    optimizer.step()
    real = [value.nbytes for state in optimizer.state.values() for value in state.values() if _is_tensor(value)]
    predicted = optimizer_steps(Optimizer.ADAMW_8BIT, [trained], clips=False).passes
    assert [predicted.storages[event].num_bytes for event in predicted.events[FIRST]] == real


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_layers_allocate_in_a_predicted_step_as_in_the_trainers_own(
    base_model: Path, rows: Path, tmp_path: Path, checkpointing: str
) -> None:
    """One step of `qlora train` on a CPU, by TRL's trainer, and the same step predicted, agree inside the layers."""
    settings = train_settings(
        base_model,
        rows,
        tmp_path / "run",
        model__attention="eager",
        training__max_steps=1,
        training__gradient_checkpointing=checkpointing,
    )
    prepared = prepare_run(settings, Recorder())
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    trainer = Session(prepared, directory, Recorder(), StopSignal(Recorder())).trainer
    trainer.remove_callback(RehearsalCallback)  # the first pass is compared
    base = prepared.loaded.base
    base.enable_input_require_grads()  # so that the layers' backward pass ends in a gradient
    stack = find_stack(base)
    assert stack is not None
    layers = base.get_submodule(stack.path)
    trace = MemoryTrace(Kernels((8, 0)), device_type="cpu")
    shape = _mark_layers(layers, trace)
    for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
        trace.ignore(tensor)
    with trace:
        trainer.train()
    by_mark = {segment.mark: sizes_of(trace, [segment]) for segment in trace.segments}

    meta_model = MetaModel(model=prepared.model, stack=stack, chosen=tuple(range(len(stack.kinds))), notes=())
    predicted = trace_step(
        meta_model,
        step_settings(
            device=CPU,
            is_autocast=False,
            dtype=torch.float32,
            attention="eager",
            backend=SdpaBackend.MATH,
            batch_size=shape[0],
            length=shape[1],
            checkpointing=checkpointing,
            gradient_accumulation_steps=1,
            evaluates=False,
        ),
    ).trace
    for name in ("forward", "backward"):
        segments = [s for s in predicted.segments if s.mark[0] == f"first {name}" and isinstance(s.mark[1], int)]
        assert len(segments) == len(stack.kinds)
        assert len(by_mark[name, "layers"]) > 200
        assert sizes_of(predicted, segments) == by_mark[name, "layers"]


def sizes_of(trace: MemoryTrace, segments: list[Segment]) -> list[int]:
    """Return the bytes of allocations and, negative, of releases; without cuBLAS's, one for each thread."""
    return [
        trace.storages[event].num_bytes if event >= 0 else -trace.storages[~event].num_bytes
        for segment in segments
        for event in segment.events
        if event < 0 or trace.storages[event].label != CUBLAS
    ]


def _mark_layers(layers: torch.nn.Module, trace: MemoryTrace) -> list[int]:
    """Mark where the layers begin and end in both passes; return a list to hold the shape of the hidden states."""
    shape: list[int] = []
    first, *_, last = layers.children()

    def before(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        if not shape:
            shape.extend(args[0].shape[:2])
            trace.mark("forward", "layers")
            _on_gradient(args[0], lambda: trace.mark("backward", "end"))

    def after(_: Any, __: Any, output: torch.Tensor) -> None:
        if trace.segments[-1].mark == ("forward", "layers"):
            trace.mark("forward", "end")
            _on_gradient(output, lambda: trace.mark("backward", "layers"))

    first.register_forward_pre_hook(before)
    last.register_forward_hook(after)
    return shape


def _on_gradient(tensor: torch.Tensor, act: Callable[[], None]) -> None:
    def arrived(_: torch.Tensor) -> None:
        act()

    tensor.register_hook(arrived)  # type: ignore[no-untyped-call]


def _around(optimizer: torch.optim.Optimizer, trained: list[torch.nn.Parameter]) -> MemoryTrace:
    """Return a trace of what the first step of an optimizer allocates on the CPU."""
    trace = MemoryTrace(Kernels((8, 0)), device_type="cpu")
    for parameter in trained:
        trace.ignore(parameter)
        assert parameter.grad is not None
        trace.ignore(parameter.grad)
    with trace:
        optimizer.step()
    return trace
