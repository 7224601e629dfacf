"""The plain PEFT loop that `benchmarks/plain_loop.py` predicts, to compare with public measurements."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from benchmarks.plain_loop import PlainStep, predict_plain_loop, prepare
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.tracing.extension import extend, passes_of
from qlora_cli.memory.tracing.training_step import trace_step
from qlora_cli.quantization.storage_plan import build_on_meta, plan_layout
from qlora_cli.settings.choices import SdpaBackend
from qlora_cli.settings.models import EstimateSettings, LoraSettings, QuantizationSettings
from tests.support.models.tracing import CUDA, deep_config, peaks, step_settings

pytestmark = pytest.mark.usefixtures("one_thread")

T4 = find_gpu("T4")
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 3},
}


def settings_of(**quantization: Any) -> EstimateSettings:
    return EstimateSettings.model_validate(
        {
            "model": {"name": "llama", "dtype": "fp16", "attention": "sdpa"},
            "quantization": quantization,
            "lora": {"rank": 8},
            "data": {"max_length": 64},
            "training": {"gradient_accumulation_steps": 1, "gradient_checkpointing": "on"},
        }
    )


@pytest.mark.parametrize("family", CHANGES)
def test_few_layers_extend_to_the_memory_of_all(family: str) -> None:
    config = deep_config(family, 6, **CHANGES[family])
    settings = step_settings(gradient_accumulation_steps=1, evaluates=False, is_autocast=False)
    traced = []
    for whole in (False, True):
        layout = plan_layout(
            build_on_meta(deepcopy(config), torch.bfloat16), QuantizationSettings(), torch.bfloat16, device=CUDA
        )
        model = prepare(build_on_meta(deepcopy(config), torch.bfloat16), layout, LoraSettings(rank=8), whole=whole)
        traced.append((model, trace_step(model, settings, PlainStep).trace))
    (few, of_few), (_, of_all) = traced
    assert few.stack is not None
    assert len(few.chosen) < len(few.stack.kinds) == 6
    assert peaks(extend(of_few, few.stack, few.chosen)) == peaks(passes_of(of_all))


def test_unquantized_weights_are_in_fp32() -> None:
    config, settings = deep_config("llama"), settings_of(method="nf4")
    facts = ModelFacts(name="llama", content=config.to_dict())
    ours = Estimator(facts, backend=SdpaBackend.EFFICIENT).estimate(settings, T4)
    plain = predict_plain_loop(config.to_dict(), settings, T4, SdpaBackend.EFFICIENT)
    assert plain.components.quantized_weights_bytes == ours.components.quantized_weights_bytes
    assert plain.components.unquantized_weights_bytes > 1.9 * ours.components.unquantized_weights_bytes


def test_a_model_in_16_bit_is_not_cast() -> None:
    content = deep_config("llama").to_dict()
    facts = ModelFacts(name="llama", content=content)
    settings = settings_of(method="none")
    ours = Estimator(facts, backend=SdpaBackend.EFFICIENT).estimate(settings, T4)
    plain = predict_plain_loop(content, settings, T4, SdpaBackend.EFFICIENT)
    assert plain.components.unquantized_weights_bytes == ours.components.unquantized_weights_bytes
