"""Every setting of [quantization] changes something when a model is loaded, or is an error that says why.

Each test names the settings that it proves; a setting without a proof fails the last test.
"""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_cli.errors import HardwareError, ModelError, SettingsError
from qlora_cli.events import SilentReporter, StepDone
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.loading.save import save_quantized
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.model_facts import find_model_facts
from qlora_cli.settings.choices import METHODS, Quantization
from qlora_cli.settings.models import SECTIONS, EstimateSettings, QuantizationSettings, TrainingSettings
from qlora_cli.settings.resolve import Sources, resolve
from qlora_cli.training.arguments import check_hardware
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, train_settings
from tests.support.models.experts import save_moe
from tests.support.models.loading import (
    IDS,
    Proofs,
    asked_load,
    layers_of,
    load,
    load_settings,
    logits,
    refused,
    save_model,
    weight_of,
)

proves = Proofs()
STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def reference(base_model: Path) -> torch.nn.Module:
    """The bundled model by plain transformers, in fp32."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    return model


@proves("method")
def test_each_method_stores_linear_layers_in_its_own_way_and_none_leaves_them_unchanged(
    base_model: Path, reference: torch.nn.Module
) -> None:
    loaded = {method: load(base_model, quantization__method=method.value).base for method in METHODS}
    logits_of = {method: logits(model) for method, model in loaded.items()}
    kinds = {
        m: {(type(weight_of(x)), weight_of(x).dtype) for n, x in loaded[m].named_modules() if n.endswith("_proj")}
        for m in loaded
    }
    assert kinds == {
        Quantization.NF4: {(Params4bit, torch.uint8)},
        Quantization.FP4: {(Params4bit, torch.uint8)},
        Quantization.INT8: {(Int8Params, torch.int8)},
        Quantization.NONE: {(torch.nn.Parameter, torch.float32)},
    }
    for one, other in combinations(METHODS, 2):
        assert (logits_of[one] - logits_of[other]).abs().max() > 1e-3, (one, other)
    assert torch.equal(logits_of[Quantization.NONE], logits(reference))
    errors = {method: (values - logits(reference)).norm() for method, values in logits_of.items()}
    assert errors[Quantization.INT8] < errors[Quantization.NF4] < errors[Quantization.FP4]


@proves("double_quant")
def test_double_quantization_quantizes_the_constants(base_model: Path) -> None:
    double, single = load(base_model), load(base_model, quantization__double_quant=False)
    for loaded, nested in ((double, True), (single, False)):
        assert {x.weight.quant_state.nested for x in layers_of(loaded.base, Linear4bit).values()} == {nested}
    assert double.inventory.quantization_constant_bytes < single.inventory.quantization_constant_bytes
    assert not torch.equal(logits(double.base), logits(single.base))


@proves("compute_dtype")
def test_4_bit_layers_multiply_in_the_compute_dtype_and_the_rest_keeps_its_own(base_model: Path) -> None:
    plain, rounded = load(base_model), load(base_model, quantization__compute_dtype="bf16")
    for loaded, dtype in ((plain, torch.float32), (rounded, torch.bfloat16)):
        assert {layer.compute_dtype for layer in layers_of(loaded.base, Linear4bit).values()} == {dtype}
        assert weight_of(loaded.base.get_output_embeddings()).dtype == torch.float32
    difference = (logits(plain.base) - logits(rounded.base)).abs().max()
    assert 1e-4 < difference < 1


def test_experts_are_stored_in_the_storage_dtype_too(tmp_path: Path) -> None:
    model = save_moe(tmp_path / "model", "qwen3_moe")
    as_bytes, stored = load(model), load(model, quantization__quant_storage="bf16")
    assert {entry.dtype for entry in stored.inventory.entries if entry.kind == "experts"} == {"bfloat16"}
    assert stored.inventory == stored.layout.inventory
    assert torch.equal(logits(stored.model), logits(as_bytes.model))
    save_quantized(stored, tmp_path / "saved", SilentReporter())
    again = load(tmp_path / "saved")
    assert again.inventory == again.layout.inventory
    assert torch.equal(logits(again.model), logits(as_bytes.model))


@proves("quant_storage")
@pytest.mark.parametrize("storage", STORAGE)
def test_codes_stored_in_another_dtype_are_the_same_codes_train_and_load_again(
    rows: Path, tmp_path: Path, storage: str
) -> None:
    model = save_model(tmp_path / "model")
    as_bytes, stored = load(model), load(model, quantization__quant_storage=storage)
    weights = {name: weight_of(layer) for name, layer in layers_of(stored.base, Linear4bit).items()}
    assert {weight.dtype for weight in weights.values()} == {STORAGE[storage]}
    for name, layer in layers_of(as_bytes.base, Linear4bit).items():
        assert torch.equal(weights[name].view(torch.uint8).flatten(), weight_of(layer).flatten())
    assert stored.inventory == stored.layout.inventory
    expected = logits(as_bytes.base)
    assert torch.equal(logits(stored.base), expected)

    settings = train_settings(
        model, rows, tmp_path / "run", quantization__quant_storage=storage, training__max_steps=2
    )
    plain = train_settings(model, rows, tmp_path / "plain", training__max_steps=2)
    assert train(settings, Recorder()).final_loss == train(plain, Recorder()).final_loss

    save_quantized(stored, tmp_path / "saved", Recorder())
    again = load(tmp_path / "saved", quantization__quant_storage=storage)
    assert {weight_of(layer).dtype for layer in layers_of(again.base, Linear4bit).values()} == {STORAGE[storage]}
    assert torch.equal(logits(again.base), expected)
    assert "the checkpoint has" in refused(tmp_path / "saved", ModelError, quantization__quant_storage="uint8")


@pytest.mark.parametrize("storage", STORAGE)
def test_codes_that_are_nan_in_their_storage_dtype_are_still_codes(tmp_path: Path, storage: str) -> None:
    model = save_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name].fill_(0.02)  # the last code everywhere: all bits set
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    loaded = load(model, quantization__quant_storage=storage)
    assert not torch.isfinite(loaded.base.get_parameter(name)).any()
    assert torch.isfinite(logits(loaded.base)).all()


@pytest.mark.parametrize(("method", "constants"), [("nf4", "absmax"), ("int8", "SCB")])
def test_a_constant_that_is_nan_is_named_with_its_weight(tmp_path: Path, method: str, constants: str) -> None:
    flags = {"quantization__method": method} | ({"quantization__double_quant": False} if method == "nf4" else {})
    save_quantized(load(save_model(tmp_path / "model"), **flags), tmp_path / "saved", SilentReporter())
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    damaged = next(name for name in tensors if name.endswith(constants))
    tensors[damaged].view(-1)[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    message = refused(tmp_path / "saved", ModelError)
    assert "holds values that are not finite" in message
    assert damaged.removesuffix(f".{constants}").removesuffix(".weight") in message


@proves("skip_modules")
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_skipped_modules_add_to_those_never_quantized(tmp_path: Path, method: str) -> None:
    untied = save_model(tmp_path / "model", tie_word_embeddings=False)
    flags = {"quantization__method": method}
    plain = load(untied, **flags)
    skipped = load(untied, quantization__skip_modules="layers.0,v_proj", **flags)
    names = set(layers_of(skipped.base, torch.nn.Linear))
    assert set(layers_of(plain.base, torch.nn.Linear)) == {"lm_head"}
    assert len(names) == 1 + 7 + 1  # the head, all of the first layer, the v_proj of the second
    assert {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"} < names
    assert not torch.equal(logits(plain.base), logits(skipped.base))
    assert "as asked" in {kind.why_not_quantized for kind in skipped.inventory.kinds()}


@proves("int8_threshold")
def test_features_above_the_threshold_are_multiplied_in_16_bit(tmp_path: Path) -> None:
    # Only in evaluation: on a CPU, bitsandbytes trains with the dequantized weight, whatever the threshold.
    model = save_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    for name in weights:
        if name.endswith("input_layernorm.weight"):
            weights[name][17] = 60.0  # the feature that it scales exceeds 6 in many tokens
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    exact = logits(load(model, quantization__method="none").base)
    logits_of = {
        threshold: logits(load(model, quantization__method="int8", quantization__int8_threshold=threshold).base)
        for threshold in (0.0, 6.0, 1e6)
    }
    assert torch.equal(logits_of[0.0], logits_of[1e6])
    assert 2 * (logits_of[6.0] - exact).norm() < (logits_of[0.0] - exact).norm()


def test_a_setting_of_a_method_is_checked_once_the_files_give_the_method(tmp_path: Path) -> None:
    model, saved = save_model(tmp_path / "model"), tmp_path / "saved"
    key = "quantization.int8_threshold"
    quiet = SilentReporter()
    save_quantized(load(model, quantization__method="int8", quantization__int8_threshold=4.0), saved, quiet)
    for given, threshold in (({}, 4.0), ({key: 3.0}, 3.0)):
        taken = plan_load(asked_load(saved, **given), quiet).settings.quantization
        assert (taken.method, taken.int8_threshold) == (Quantization.INT8, threshold)
        flags = {path: (path, value) for path, value in {"model.name": str(saved), **given}.items()}
        asked = resolve(Sources(flags=flags), EstimateSettings)
        predicted = Estimator(find_model_facts(asked, quiet)).settled(asked).settings
        assert predicted.quantization == taken
    with pytest.raises(SettingsError, match=r"int8_threshold has no effect with --quant nf4"):
        plan_load(asked_load(model, **{key: 3.0}), quiet)


@proves("int8_has_fp16_weight")
def test_16_bit_weights_can_be_kept_and_quantized_in_every_product(base_model: Path) -> None:
    plain = load(base_model, quantization__method="int8")
    in_16_bit = load(base_model, quantization__method="int8", quantization__int8_has_fp16_weight=True)
    layers = layers_of(in_16_bit.base, Linear8bitLt).values()
    assert {(weight_of(layer).dtype, layer.state.has_fp16_weights) for layer in layers} == {(torch.float32, True)}
    assert in_16_bit.inventory.num_quantized_parameters == 0
    assert in_16_bit.inventory.total_bytes > plain.inventory.total_bytes
    assert in_16_bit.inventory == in_16_bit.layout.inventory
    assert torch.equal(logits(in_16_bit.base), logits(plain.base))


@proves("int8_cpu_offload")
def test_offload_to_the_cpu_is_refused_if_nothing_is_offloaded_and_in_training(base_model: Path) -> None:
    message = refused(base_model, HardwareError, quantization__method="int8", quantization__int8_cpu_offload=True)
    assert "quantization.int8_cpu_offload: has no effect: the model is on cpu as a whole" in message
    offloaded = QuantizationSettings(method=Quantization.INT8, int8_cpu_offload=True)
    with pytest.raises(HardwareError, match="can be loaded, but not trained"):
        check_hardware(offloaded, TrainingSettings(), torch.device("cuda"))


@pytest.mark.parametrize(
    ("path", "method"),
    [
        (f"quantization.{key}", method)
        for key in QuantizationSettings.model_fields
        for method in METHODS
        # Off requests nothing, and on is the default.
        if not QuantizationSettings(method=method).has_effect(key) and key != "double_quant"
    ],
)
def test_a_setting_that_the_method_ignores_is_an_error_that_names_it(
    base_model: Path, path: str, method: Quantization
) -> None:
    value = {"skip_modules": "q_proj", "compute_dtype": "bf16", "quant_storage": "bf16"}.get(path.split(".")[1], "1")
    with pytest.raises(SettingsError) as caught:
        load_settings(base_model, quantization__method=method.value, **{path.replace(".", "__"): value})
    (problem,) = caught.value.problems
    assert f"{path} has no effect with --quant {method.value}" in str(problem)
    assert problem.where == path
    assert problem.hint


def test_int8_learns_and_its_products_are_close_to_those_of_the_dequantized_weights(
    base_model: Path, rows: Path, tmp_path: Path, reference: torch.nn.Module
) -> None:
    recorder = Recorder()
    settings = train_settings(
        base_model, rows, tmp_path / "run", quantization__method="int8", training__micro_batch_size=12
    )
    train(settings, recorder)
    losses = [event.loss for event in recorder.events if isinstance(event, StepDone)]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)

    model = load(base_model, quantization__method="int8").base
    quantized = layers_of(model, Linear8bitLt)
    dequantized = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    for name, layer in quantized.items():
        weight = weight_of(layer)
        assert isinstance(weight, Int8Params)
        dequantized.get_submodule(name).weight.data = weight.data * (weight.SCB / 127)[:, None]
    expected = logits(dequantized)
    assert 0 < (expected - logits(reference)).norm() / expected.norm() < 0.02
    assert (logits(model) - expected).norm() / expected.norm() < 0.03  # inputs are rounded to 8 bits too
    with torch.no_grad():
        trained = model.train()(input_ids=IDS).logits
    torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-3)


def test_every_setting_has_a_proof_here() -> None:
    assert set(SECTIONS["quantization"].model_fields) == proves.proven
