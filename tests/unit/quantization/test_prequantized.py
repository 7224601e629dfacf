"""Checkpoints that are already quantized: bitsandbytes is recognised, every other quantizer refused with a hint."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationMethod

from qlora_cli.errors import ModelError
from qlora_cli.quantization.prequantized import check_settings, read_prequantized
from qlora_cli.settings.choices import Quantization

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_quant_storage=torch.bfloat16,
    llm_int8_skip_modules=["lm_head"],
).to_dict()
INT8 = BitsAndBytesConfig(load_in_8bit=True).to_dict()


def refusal_of(config: dict[str, Any]) -> ModelError:
    with pytest.raises(ModelError) as caught:
        read_prequantized(config, "owner/x")
    return caught.value


@pytest.mark.parametrize(
    ("config", "method", "double_quant"),
    [
        (NF4, Quantization.NF4, True),
        ({**NF4, "bnb_4bit_use_double_quant": False}, Quantization.NF4, False),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, Quantization.FP4, False),
        (INT8, Quantization.INT8, False),
        ({"load_in_8bit": True}, Quantization.INT8, False),
    ],
)
def test_a_bitsandbytes_checkpoint_is_recognised(
    config: dict[str, Any], method: Quantization, double_quant: bool
) -> None:
    prequantized = read_prequantized({"quantization_config": config}, "x")
    assert prequantized is not None
    assert prequantized.method == prequantized.settings["method"] == method
    assert prequantized.settings.get("double_quant", False) == double_quant
    assert prequantized.config == config


def test_our_own_checkpoints_and_nested_configs_are_recognised() -> None:
    prequantized = read_prequantized({"text_config": {"quantization_config": {**NF4, "quant_method": "qlora"}}}, "x")
    assert prequantized is not None
    assert prequantized.method == Quantization.NF4


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": 1}]
)
def test_a_plain_model_is_not_quantized(config: dict[str, Any]) -> None:
    assert read_prequantized(config, "x") is None


@pytest.mark.parametrize("method", [method.value for method in QuantizationMethod if method.value != "bitsandbytes"])
def test_every_other_method_of_transformers_is_refused_by_name_with_a_reason_and_a_way_out(method: str) -> None:
    error = refusal_of({"quantization_config": {"quant_method": method}})
    assert f"owner/x is quantized with {method}: its " in str(error)
    assert error.hint


def test_a_checkpoint_that_transformers_can_dequantize_gets_a_hint() -> None:
    for method, config_class in {
        "mxfp4": "Mxfp4Config",
        "fp8": "FineGrainedFP8Config",
        "compressed-tensors": "CompressedTensorsConfig",
    }.items():
        error = refusal_of({"quantization_config": {"quant_method": method}})
        assert f"{config_class}(dequantize=True)" in str(error.hint)
        assert "dequantize" in inspect.signature(getattr(transformers, config_class)).parameters


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quantization_config": {"quant_method": "newest"}}, "an unknown method, 'newest'"),
        ({"quantization_config": {"producer": {}}}, "a method that its config.json does not name"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantized with mlx"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "one of load_in_4bit and load_in_8bit"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}}, "neither nf4 nor fp4"),
    ],
)
def test_an_unknown_method_is_refused(config: dict[str, Any], expected: str) -> None:
    assert expected in str(refusal_of(config))


def test_only_given_settings_can_contradict_and_all_are_listed() -> None:
    prequantized = read_prequantized({"quantization_config": NF4}, "x")
    assert prequantized is not None
    check_settings(prequantized, {}, "x")
    agreeing = {"method": "nf4", "double_quant": True, "quant_storage": "bf16", "skip_modules": ("q_proj",)}
    check_settings(prequantized, {**agreeing, "compute_dtype": "fp32"}, "x")
    wrong = {"method": "fp4", "double_quant": False, "quant_storage": "uint8"}
    with pytest.raises(ModelError) as caught:
        check_settings(prequantized, wrong, "x")
    for expected in (
        "quantization.method is fp4, the checkpoint has nf4",
        "quantization.double_quant is false, the checkpoint has true",
        "quantization.quant_storage is uint8, the checkpoint has bf16",
    ):
        assert expected in str(caught.value)


def test_the_method_and_16_bit_weights_of_an_int8_checkpoint_are_compared() -> None:
    prequantized = read_prequantized({"quantization_config": INT8}, "x")
    assert prequantized is not None
    check_settings(prequantized, {"double_quant": True, "int8_threshold": 3.0}, "x")
    with pytest.raises(ModelError, match=r"int8_has_fp16_weight is true.*method is nf4"):
        check_settings(prequantized, {"method": Quantization.NF4, "int8_has_fp16_weight": True}, "x")
