"""Loading on a GPU: the same models as on a CPU, within the predicted memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import Shape, write_model
from qlora_cli.events import StepDone
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.loading.save import save_quantized
from qlora_cli.quantization.embedding import embedding_of
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.train_run import run
from tests.conftest import Recorder, train_settings
from tests.integration.loading.test_load_memory import PROMISED_BYTES, measure
from tests.support.models.loading import IDS, layers_of, load, logits, save_model, weight_of
from tests.support.models.reference_models import load_plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Two layers of Llama-3.2-1B: the largest weight, of 32 MiB in 16 bit, is quantized.
SHAPE = Shape(
    hidden_size=2048,
    num_layers=2,
    intermediate_size=8192,
    num_heads=32,
    num_kv_heads=8,
    vocab_size=4096,
    tied=False,
)
MOE_SHAPE = Shape(
    hidden_size=1024,
    num_layers=2,
    intermediate_size=512,
    num_heads=16,
    num_kv_heads=4,
    vocab_size=4096,
    tied=False,
    num_experts=32,
    num_experts_per_token=4,
)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose head has its own weight."""
    return save_model(tmp_path_factory.mktemp("untied") / "model", tie_word_embeddings=False)


def on_cuda(model: Path, **flags: object) -> LoadedModel:
    return load(model, **{"model__device": "cuda", **flags})


def cuda_logits(model: torch.nn.Module) -> torch.Tensor:
    return logits(model, IDS.cuda()).float().cpu()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def dequantized(checkpoint: Path, loaded: LoadedModel) -> torch.nn.Module:
    """Return the plain model on the GPU in fp32, with the weights that `loaded` holds."""
    model = load_plain(checkpoint)
    torch.nn.Module.cuda(model)
    for name, layer in layers_of(loaded.base, Linear4bit).items():
        restored = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        model.get_submodule(name).weight.data = restored.float()
    for name, layer in layers_of(loaded.base, Linear8bitLt).items():
        weight = weight_of(layer)
        assert isinstance(weight, Int8Params)
        model.get_submodule(name).weight.data = weight.data * (weight.SCB / 127)[:, None]
    return model


# ---- the same model


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("method", ["nf4", "fp4"])
# fp32 is multiplied in another order; bf16 and its products are rounded to 8 bits, many times over.
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_4_bit_logits_are_those_of_the_dequantized_weights(
    untied: Path, method: str, double: bool, dtype: str, tolerance: float
) -> None:
    if dtype == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bf16 here")
    loaded = on_cuda(untied, model__dtype=dtype, quantization__method=method, quantization__double_quant=double)
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"cuda"}
    assert len(layers_of(loaded.base, Linear4bit)) == 2 * 7
    assert loaded.inventory == loaded.layout.inventory
    assert relative_error(cuda_logits(loaded.model), cuda_logits(dequantized(untied, loaded))) < tolerance


def test_a_gpu_stores_what_a_cpu_stores(untied: Path) -> None:
    on_cpu, on_gpu = load(untied), on_cuda(untied)
    assert relative_error(cuda_logits(on_gpu.model), logits(on_cpu.model)) < 1e-2
    gpu_parameters = dict(on_gpu.base.named_parameters())
    for name, layer in layers_of(on_cpu.base, Linear4bit).items():
        codes = gpu_parameters[f"{name}.weight"].data.cpu()
        # A weight half-way between two levels may fall to either side.
        assert (codes != layer.weight.data).float().mean() < 1e-3


def test_features_above_the_threshold_are_multiplied_in_16_bit(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if name.endswith("input_layernorm.weight"):
            weights[name][17] = 60.0  # the feature that it scales exceeds 6 in many tokens
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    exact = cuda_logits(on_cuda(model, quantization__method="none").model)
    by_threshold = {
        threshold: cuda_logits(
            on_cuda(model, quantization__method="int8", quantization__int8_threshold=threshold).model
        )
        for threshold in (0.0, 6.0)
    }
    assert 2 * relative_error(by_threshold[6.0], exact) < relative_error(by_threshold[0.0], exact)


def test_int8_logits_are_close_to_those_of_the_dequantized_weights(untied: Path) -> None:
    loaded = on_cuda(untied, quantization__method="int8")
    assert loaded.inventory == loaded.layout.inventory
    expected = cuda_logits(dequantized(untied, loaded))  # before the first product, which removes the scales
    assert relative_error(cuda_logits(loaded.model), expected) < 0.03  # inputs are rounded to 8 bits too


def test_int8_with_offload_to_the_cpu_loads_and_is_the_same_if_everything_fits(untied: Path) -> None:
    whole = on_cuda(untied, quantization__method="int8")
    offloading = on_cuda(untied, quantization__method="int8", quantization__int8_cpu_offload=True)
    assert len(layers_of(offloading.base, Linear8bitLt)) == len(layers_of(whole.base, Linear8bitLt)) == 2 * 7
    torch.testing.assert_close(cuda_logits(offloading.model), cuda_logits(whole.model))


# ---- within the predicted memory


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense") / "model"
    write_model(directory, SHAPE)
    return directory


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("moe") / "model"
    write_model(directory, MOE_SHAPE)
    return directory


def check_peak(figures: dict[str, Any]) -> None:
    assert figures["model_bytes"] == figures["predicted_bytes"]
    assert figures["peak_device_bytes"] >= figures["device_model_bytes"]
    assert figures["peak_device_bytes"] <= figures["device_model_bytes"] + figures["one_tensor_bytes"]
    assert figures["peak_host_bytes"] <= PROMISED_BYTES


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8", "none"])
def test_the_device_never_holds_more_than_the_model_and_one_16_bit_tensor(dense: Path, method: str) -> None:
    check_peak(measure(dense, model__device="cuda", quantization__method=method))


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_nor_does_it_with_experts(moe: Path, method: str) -> None:
    check_peak(measure(moe, model__device="cuda", quantization__method=method))


def test_a_saved_model_is_loaded_without_extra_memory(dense: Path, tmp_path: Path) -> None:
    first = measure(dense, "--save", tmp_path / "saved", model__device="cuda")
    again = measure(tmp_path / "saved", model__device="cuda")
    assert again["model_bytes"] == first["model_bytes"]
    assert again["needed_bytes"] == again["device_model_bytes"]
    check_peak(again)


# ---- an embedding in host memory


@pytest.mark.parametrize("method", ["nf4", "int8", "none"])
def test_an_offloaded_embedding_gives_the_same_logits_and_takes_no_device_memory(untied: Path, method: str) -> None:
    whole = on_cuda(untied, quantization__method=method)
    offloaded = on_cuda(untied, quantization__method=method, model__offload_embedding=True)
    embedding = embedding_of(offloaded.base)
    assert embedding.weight.device.type == "cpu"
    other_parameters = [parameter for parameter in offloaded.base.parameters() if parameter is not embedding.weight]
    assert {parameter.device.type for parameter in other_parameters} == {"cuda"}
    assert torch.equal(cuda_logits(offloaded.model), cuda_logits(whole.model))


def test_the_embedding_of_a_quantized_checkpoint_can_be_offloaded_too(untied: Path, tmp_path: Path) -> None:
    whole = on_cuda(untied)
    save_quantized(whole, tmp_path / "saved", Recorder())
    offloaded = on_cuda(tmp_path / "saved", model__offload_embedding=True)
    assert embedding_of(offloaded.base).weight.device.type == "cpu"
    assert torch.equal(cuda_logits(offloaded.model), cuda_logits(whole.model))


@pytest.mark.parametrize("method", ["nf4", "int8", "none"])
def test_an_offloaded_embedding_stays_on_the_host_while_it_trains(
    untied: Path, rows: Path, tmp_path: Path, method: str
) -> None:
    losses = {}
    for offload in (False, True):
        recorder = Recorder()
        settings = train_settings(
            untied,
            rows,
            tmp_path / f"run-{offload}",
            model__device="cuda",
            model__offload_embedding=offload,
            quantization__method=method,
        )
        prepared = prepare_run(settings, recorder)
        embedding = embedding_of(prepared.loaded.base)
        run(prepared, recorder)
        assert embedding.weight.device.type == ("cpu" if offload else "cuda")
        losses[offload] = [event.loss for event in recorder.events if isinstance(event, StepDone)]
    assert len(losses[True]) == 3
    # The order of summation on a GPU varies.
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


# ---- experts


@pytest.mark.parametrize("target_parameters", [None, "all-experts"])
def test_a_model_with_quantized_experts_trains(rows: Path, tmp_path: Path, target_parameters: str | None) -> None:
    flags: dict[str, object] = {} if target_parameters is None else {"lora__target_parameters": target_parameters}
    model = save_model(tmp_path / "model", "qwen3_moe")
    recorder = Recorder()
    settings = train_settings(
        model, rows, tmp_path / "run", model__device="cuda", model__dtype="auto", training__max_steps=2, **flags
    )
    prepared = prepare_run(settings, recorder)
    assert len(prepared.loaded.layout.experts) == 2 * 2
    before = {
        name: parameter.detach().clone()
        for name, parameter in prepared.model.named_parameters()
        if parameter.requires_grad
    }
    assert any("experts" in name for name in before) == (target_parameters is not None)
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in prepared.model.named_parameters()
        if not parameter.requires_grad
    }
    result = run(prepared, recorder)
    assert result.steps == 2
    after = dict(prepared.model.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    for name, value in frozen.items():
        assert torch.equal(after[name], value), name
