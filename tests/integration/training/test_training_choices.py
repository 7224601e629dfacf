"""Choices of the loop take effect in real runs: optimizers, LoRA+, NEFTune, determinism, compilation."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.errors import HardwareError, SettingsError
from qlora_cli.events import Event, Noted, StepDone
from qlora_cli.quantization.embedding import embedding_of, keep_on_host
from qlora_cli.settings.choices import Optimizer
from qlora_cli.settings.models import LoraSettings
from qlora_cli.training.compiled_layers import CompiledLayers
from qlora_cli.training.determinism import VARIABLES
from qlora_cli.training.lora_plus import scale_b_learning_rate
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, short_settings, train_settings
from tests.support.models.adapters import adapt, settings_of
from tests.support.models.loading import load, save_model

RATIO = 8.0
ON_CPU = [optimizer for optimizer in Optimizer if not optimizer.is_paged]


def trained(model: Path, rows: Path, output: Path, **flags: Any) -> dict[str, torch.Tensor]:
    """Train at a constant rate from the first step; return the adapter."""
    values = {"schedule": "constant", "max_steps": 1, **flags}
    train(short_settings(model, rows, output, **{f"training__{name}": v for name, v in values.items()}), Recorder())
    return load_file(output / "adapter" / "adapter_model.safetensors")


def groups_in(checkpoint: Path) -> list[dict[str, Any]]:
    saved: list[dict[str, Any]] = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    return saved


@pytest.mark.parametrize("optimizer", ON_CPU)
def test_the_b_matrices_step_by_the_ratio_with_every_optimizer(
    base_model: Path, rows: Path, tmp_path: Path, optimizer: Optimizer
) -> None:
    """B begins at zero, and A gets no gradient while B is zero, so that after one step B is the step."""
    flags = {"optimizer": optimizer.value}
    plain = trained(base_model, rows, tmp_path / "plain", **flags)
    plus = trained(base_model, rows, tmp_path / "plus", **flags, loraplus_lr_ratio=RATIO)
    assert plain.keys() == plus.keys()
    for name, tensor in plain.items():
        if "lora_B" in name:
            assert tensor.abs().max() > 0, name
            torch.testing.assert_close(plus[name], RATIO * tensor, rtol=1e-4, atol=1e-9)
        else:
            torch.testing.assert_close(plus[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "lion_8bit", "adafactor", "sgd"])
def test_a_run_with_lora_plus_resumes_from_its_checkpoint_to_the_same_bits(
    base_model: Path, rows: Path, tmp_path: Path, optimizer: str
) -> None:
    flags = {"optimizer": optimizer, "loraplus_lr_ratio": RATIO, "weight_decay": 0.1, "schedule": "linear"}
    whole = trained(base_model, rows, tmp_path / "whole", **flags, max_steps=4, save_steps=2)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-2"
    settings = short_settings(
        base_model,
        rows,
        tmp_path / "resumed",
        output__resume=str(checkpoint),
        **{f"training__{name}": value for name, value in {**flags, "max_steps": 4, "save_steps": 2}.items()},
    )
    train(settings, Recorder())
    resumed = load_file(tmp_path / "resumed" / "adapter" / "adapter_model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)
    rates = sorted({group["lr"] for group in groups_in(checkpoint) if group["params"]})
    assert rates == pytest.approx([1e-3 * 2 / 4, RATIO * 1e-3 * 2 / 4])
    assert {group["weight_decay"] for group in groups_in(checkpoint) if group["params"]} == {0.1}


def test_groups_keep_their_settings_and_only_the_b_matrices_of_layers_move() -> None:
    names = ("lora_A", "lora_B", "lora_embedding_B", "lora_magnitude_vector")
    model = nn.ModuleDict(
        {"layer": nn.ModuleDict({name: nn.ParameterDict({"default": torch.zeros(2, 2)}) for name in names})}
    )
    parameters = {name.split(".")[1]: parameter for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters["lora_A"], parameters["lora_B"]], "weight_decay": 0.25, "eps": 1e-3},
            {"params": [parameters["lora_embedding_B"], parameters["lora_magnitude_vector"]], "weight_decay": 0.0},
        ],
        lr=0.5,
    )
    scale_b_learning_rate(optimizer, model, 4.0)
    first, second, third = optimizer.param_groups
    assert [id(one) for one in third["params"]] == [id(parameters["lora_B"])]
    assert (third["lr"], third["weight_decay"], third["eps"]) == (2.0, 0.25, 1e-3)
    assert [id(one) for one in first["params"]] == [id(parameters["lora_A"])]
    assert [group["lr"] for group in (first, second)] == [0.5, 0.5]
    assert len(second["params"]) == 2
    optimizer.state[parameters["lora_A"]] = {"step": torch.ones(())}
    with pytest.raises(AssertionError):
        scale_b_learning_rate(optimizer, model, 4.0)


@pytest.mark.parametrize("optimizer", [optimizer for optimizer in Optimizer if optimizer.is_paged])
def test_a_paged_optimizer_needs_a_gpu(base_model: Path, rows: Path, tmp_path: Path, optimizer: Optimizer) -> None:
    with pytest.raises(HardwareError, match=f"{optimizer.value} pages its state"):
        trained(base_model, rows, tmp_path / "run", optimizer=optimizer.value)


class Steps(Recorder):
    """Records the loss of every step, and whether kernels were deterministic in it."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.were_deterministic: list[bool] = []

    def report(self, event: Event) -> None:
        super().report(event)
        if isinstance(event, StepDone):
            self.losses.append(event.loss)
            self.were_deterministic.append(torch.are_deterministic_algorithms_enabled())


def steps_of(model: Path, rows: Path, output: Path, **flags: Any) -> Steps:
    steps = Steps()
    train(short_settings(model, rows, output, **flags), steps)
    return steps


def test_noise_changes_training_in_proportion_and_leaves_evaluation_alone(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    losses = [
        steps_of(
            base_model, rows, tmp_path / str(alpha), training__neftune_noise_alpha=alpha, training__max_steps=1
        ).losses[0]
        for alpha in (1e-6, 5.0, 50.0)
    ]
    quiet = steps_of(base_model, rows, tmp_path / "quiet", training__max_steps=1).losses[0]
    assert losses[0] == pytest.approx(quiet, rel=1e-6)
    assert abs(losses[1] - quiet) > 1e-3
    assert losses[2] > losses[1]


@pytest.mark.parametrize("place", ["plain", "offloaded", "new tokens", "trained whole"])
def test_noise_reaches_the_embedding_wherever_it_is(tmp_path: Path, place: str) -> None:
    loaded = load(save_model(tmp_path, "llama"))
    if place == "offloaded":
        keep_on_host(embedding_of(loaded.base), torch.device("cpu"))
    lora = LoraSettings(rank=4, modules_to_save=("embed_tokens",) if place == "trained whole" else None)
    model, _ = attach_adapter(loaded.base, lora, (1, 2) if place == "new tokens" else ())
    ids = torch.arange(8)[None]
    embeddings = model.get_base_model().get_input_embeddings()
    quiet = embeddings(ids)
    hook = activate_neftune(model, 3.0)
    noise = (model.train().get_base_model().get_input_embeddings()(ids) - quiet).abs().max()
    assert 0 < noise <= 3.0 / (quiet.shape[1] * quiet.shape[2]) ** 0.5
    model.eval()
    torch.testing.assert_close(embeddings(ids), quiet, rtol=0, atol=0)
    deactivate_neftune(model, hook)
    torch.testing.assert_close(model.train().get_base_model().get_input_embeddings()(ids), quiet, rtol=0, atol=0)


def test_full_determinism_is_on_during_a_run_and_off_after_it(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = {name: os.environ.get(name) for name in VARIABLES}
    flags = {"lora__dropout": 0.1, "training__full_determinism": True}
    first = steps_of(base_model, rows, tmp_path / "first", **flags)
    assert first.were_deterministic == [True] * 3
    assert not torch.are_deterministic_algorithms_enabled()
    assert {name: os.environ.get(name) for name in VARIABLES} == before
    assert steps_of(base_model, rows, tmp_path / "second", **flags).losses == first.losses
    assert steps_of(base_model, rows, tmp_path / "third").were_deterministic == [False] * 3


class LastStep(Steps):
    """Records, besides, the operators of the last of `num_steps`: by then all is compiled, and little is recorded."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self._num_steps = num_steps
        self.profiled: Any = profile(activities=[ProfilerActivity.CPU])

    def report(self, event: Event) -> None:
        super().report(event)
        if isinstance(event, StepDone) and event.step == self._num_steps - 1:
            self.profiled.start()
        if isinstance(event, StepDone) and event.step == self._num_steps:
            self.profiled.stop()


@pytest.fixture
def captured_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture layers as usual, but do not compile them to C++, which would take minutes."""
    # Commands that compile nothing disable the compiler for their process, which may be that of the tests.
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    torch.compiler.reset()
    counters.clear()


@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.usefixtures("captured_only")
# What is captured is differentiated as usual where layers are recomputed, which is where it may fail. Without, that
# is done for one step in `test_compiled_lora.py`.
@pytest.mark.parametrize(("checkpointing", "backend"), [("off", "eager"), ("on", "aot_eager")])
def test_compiled_layers_train_to_the_same_losses(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str, backend: str
) -> None:
    """Rows have all lengths, and layers are compiled once for all: with padding, without, and for an evaluation."""
    monkeypatch.setattr("qlora_cli.training.compiled_layers.BACKEND", backend)
    lengths = [3 * (index * 7 % 23) + 5 for index in range(26)]
    lines = [json.dumps({"text": " ".join(["word"] * length)}) for length in lengths]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {
        "training__max_steps": 6,
        "training__micro_batch_size": 2,
        "training__gradient_accumulation_steps": 2,
        "training__gradient_checkpointing": checkpointing,
        "training__sample_prompts": ["word word"],
        "training__sample_tokens": 4,
        # Capturing takes longest where all layers are adapted: `test_compiled_lora.py` does that once.
        "lora__target_modules": ["q_proj", "down_proj"],
        **({"data__eval_split": 2} if checkpointing == "on" else {}),
    }
    plain = steps_of(base_model, rows, tmp_path / "plain", **flags)
    assert not counters["stats"]
    compiled = LastStep(6)
    train(train_settings(base_model, rows, tmp_path / "compiled", **flags, training__torch_compile=True), compiled)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    # One graph for all layers: in training with and without padding, and in an evaluation with and without it.
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]
    names = [set(load_file(tmp_path / run / "adapter" / "adapter_model.safetensors")) for run in ("plain", "compiled")]
    assert names[0] == names[1]
    # Each layer with an adapter is one step in compiled code: its gradient has an operator only there.
    num_layers = sum("lora_A" in name for name in names[1])
    calls = Counter(event.name for event in compiled.profiled.events())
    assert calls["qlora::four_bit_gradient"] >= num_layers * 2 > 0


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("captured_only")
def test_layers_that_cannot_be_compiled_are_trained_uncompiled_and_it_is_said_once(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tries = 0

    def failing(*_: Any) -> Any:
        nonlocal num_tries
        num_tries += 1
        raise RuntimeError("no compiler was found\nwith much more about it")

    flags: dict[str, Any] = {"training__max_steps": 3, "data__eval_split": 2, "lora__target_modules": ["q_proj"]}
    plain = steps_of(base_model, rows, tmp_path / "plain", **flags)
    monkeypatch.setattr("qlora_cli.training.compiled_layers.BACKEND", failing)
    settings = train_settings(base_model, rows, tmp_path / "compiled", **flags, training__torch_compile=True)
    compiled = LastStep(3)
    train(settings, compiled)
    assert num_tries == 1
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-6)
    said = [event.message for event in compiled.events if isinstance(event, Noted) and "compiled" in event.message]
    (message,) = [message for message in said if "can't be compiled" in message]
    assert "no compiler was found" in message
    assert "\n" not in message


@pytest.mark.filterwarnings("default")
def test_too_little_memory_is_no_failure_of_the_compiler(base_model: Path) -> None:
    model = adapt(base_model, settings_of(), quantization__method="none", model__dtype="fp32")
    layers, recorder = CompiledLayers(model, has_one_length=False), Recorder()

    def run() -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        layers.can_run(run, recorder)
    assert not recorder.events
    assert layers.can_run(lambda: None, recorder)


def test_liger_needs_to_be_installed_or_a_gpu(base_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = train_settings(base_model, rows, tmp_path / "run", training__use_liger_kernel=True)
    with pytest.raises((SettingsError, HardwareError), match=r"liger-kernel is not installed|run on a GPU only"):
        train(settings, Recorder())
    assert not (tmp_path / "run").exists()
