"""The quantization methods: each is complete, each setting has an effect with one, and their figures agree."""

import pytest
import torch

from qlora_cli.quantization.inventory import unique_parameters
from qlora_cli.quantization.methods import all_methods, is_quantized_layer, method_of, restores_weight, stored_weight
from qlora_cli.quantization.storage_plan import StoragePlan, build_on_meta, plan_layout
from qlora_cli.settings.choices import METHODS, Quantization, quant_flag
from qlora_cli.settings.display import display_flags
from qlora_cli.settings.models import UNQUANTIZED, QuantizationSettings
from qlora_cli.settings.settle import with_values
from tests.support.models.tiny_models import tiny_config

CUDA = torch.device("cuda")  # a label: nothing is put on it
WAYS = {
    "nf4": QuantizationSettings(),
    "nf4, single": QuantizationSettings(double_quant=False),
    "fp4 in bf16": QuantizationSettings.model_validate({"method": "fp4", "quant_storage": "bf16"}),
    "int8": QuantizationSettings.model_validate({"method": "int8"}),
    "int8 in every product": QuantizationSettings.model_validate({"method": "int8", "int8_has_fp16_weight": True}),
    "none": UNQUANTIZED,
}
FAMILIES = ("llama", "gpt2", "qwen3_moe")


def layout_of(family: str, settings: QuantizationSettings) -> StoragePlan:
    model = build_on_meta(tiny_config(family), torch.bfloat16)
    if family == "qwen3_moe" and not method_of(settings.method).stores_experts and settings.method.is_quantized:
        settings = settings.model_copy(update={"skip_modules": ("experts",)})
    return plan_layout(model, settings, torch.bfloat16, device=CUDA)


def test_every_method_has_its_traits() -> None:
    assert METHODS.keys() == set(Quantization) - {Quantization.AUTO}
    assert [method.value for method in METHODS if not method.is_quantized] == ["none"]
    assert UNQUANTIZED.method == "none"


def test_every_setting_has_an_effect_with_a_method_and_none_without_quantization() -> None:
    keys = set(QuantizationSettings.model_fields) - {"method"}
    sections = {method: QuantizationSettings(method=method) for method in METHODS}
    assert {key for section in sections.values() for key in keys if section.has_effect(key)} == keys
    assert not any(UNQUANTIZED.has_effect(key) for key in keys)
    assert all(section.has_effect("method") for section in sections.values())
    four_bit = {"double_quant", "compute_dtype", "quant_storage", "skip_modules"}
    for method in (Quantization.NF4, Quantization.FP4):
        assert {key for key in keys if sections[method].has_effect(key)} == four_bit


@pytest.mark.parametrize(
    ("way", "words"),
    {
        "nf4": "NF4, double quantization",
        "nf4, single": "NF4, single quantization",
        "fp4 in bf16": "FP4, double quantization",
        "int8": "LLM.int8()",
        "none": "not quantized",
    }.items(),
)
def test_every_method_describes_how_it_stores_weights(way: str, words: str) -> None:
    assert layout_of("llama", WAYS[way]).describe() == words


def test_only_the_settings_of_the_method_are_shown() -> None:
    shown = {way: display_flags(settings) for way, settings in WAYS.items()}
    assert shown["nf4"] == {"quant": "nf4", "double-quant": "on"}
    assert shown["nf4, single"] == {"quant": "nf4", "double-quant": "off"}
    assert shown["int8"] == {"quant": "int8"}
    assert shown["none"] == {"quant": "none"}
    assert WAYS["fp4 in bf16"].in_effect() == {
        "method": "fp4",
        "double_quant": True,
        "compute_dtype": "auto",
        "quant_storage": "bf16",
        "skip_modules": None,
    }


@pytest.mark.parametrize("way", WAYS)
def test_proposed_savings_of_a_method_take_less_memory(way: str) -> None:
    settings = WAYS[way]
    method = method_of(settings.method)
    savings = list(method.savings(settings))
    assert [saving.key for saving in savings] == (["double_quant"] if way == "nf4, single" else [])
    for saving in savings:
        less = with_values(settings, **{saving.key: saving.value})
        # For a small weight, the table of levels would take more than its constants.
        shape = torch.Size((4096, 4096))
        few, many = (method.entry("a", "linear layers", shape, torch.bfloat16, one) for one in (less, settings))
        assert few.weight_bytes + few.constant_bytes < many.weight_bytes + many.constant_bytes
        assert list(method.savings(less)) == []


def test_smaller_methods_are_proposed_the_least_lossy_first() -> None:
    proposed = {method.value: [str(smaller) for smaller in method.smaller()] for method in METHODS}
    assert proposed == {"nf4": [], "fp4": [], "int8": ["nf4"], "none": ["int8", "nf4"]}


def test_a_hint_names_every_method_that_would_do() -> None:
    assert quant_flag(method for method in METHODS if method.traits.measures_error) == "--quant nf4 or fp4"


def test_every_method_has_a_module_and_a_module_may_have_several_names() -> None:
    assert {type(method_of(name)) for name in METHODS} == {type(method) for method in all_methods()}
    assert method_of(Quantization.NF4) is method_of(Quantization.FP4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_loading_stores_the_planned_bytes(way: str, family: str) -> None:
    layout = layout_of(family, WAYS[way])
    for entry in layout.inventory.entries:
        if not entry.is_quantized:
            continue
        for num_pieces in (1, 4):
            taken = list(layout.method.allocations(entry, layout.settings, layout.dtype, num_pieces))
            unquantized = sum(allocation.num_bytes for allocation in taken if allocation.is_persistent)
            assert unquantized == entry.weight_bytes + entry.constant_bytes, entry.name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_the_model_on_the_meta_device_has_the_planned_bytes(way: str, family: str) -> None:
    layout = layout_of(family, WAYS[way])
    model = build_on_meta(tiny_config(family), torch.bfloat16)
    layout.method.store_on_meta(
        model,
        layout.settings,
        layout.dtype,
        unquantized=list(layout.unquantized),
        experts=layout.experts,
        compute_dtype=torch.bfloat16,
    )
    held = {}
    for name, module, parameter in unique_parameters(model):
        stored = stored_weight(module, name.rpartition(".")[2], parameter)
        held[name] = (stored.shape.numel(), parameter.nbytes, sum(tensor.nbytes for tensor in stored.constants))
    planned = {
        entry.name: (entry.num_parameters, entry.weight_bytes, entry.constant_bytes)
        for entry in layout.inventory.entries
    }
    assert held == planned
    replaced = any(is_quantized_layer(module) or restores_weight(module) for module in model.modules())
    assert replaced == layout.settings.method.is_quantized
