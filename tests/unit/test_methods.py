"""The quantization methods: complete, and every setting of theirs has an effect with one of them."""

from qlora_cli.settings.choices import METHODS, Quantization, quant_flag
from qlora_cli.settings.models import UNQUANTIZED, QuantizationSettings


def test_every_method_has_its_traits() -> None:
    assert METHODS.keys() == set(Quantization)
    assert [method.value for method in Quantization if not method.is_quantized] == ["none"]
    assert UNQUANTIZED.method == "none"


def test_every_setting_has_an_effect_with_a_method_and_none_without_quantization() -> None:
    keys = set(QuantizationSettings.model_fields) - {"method"}
    assert {key for method in Quantization for key in keys if method.takes(key)} == keys
    assert {setting for traits in METHODS.values() for setting in traits.settings} == keys
    assert not any(UNQUANTIZED.method.takes(key) for key in keys)
    assert all(method.takes("method") for method in Quantization)


def test_what_is_proposed_takes_less_and_what_changes_the_model_least_comes_first() -> None:
    found = {method.value: [str(smaller) for smaller in method.smaller()] for method in Quantization}
    assert found == {"nf4": [], "fp4": [], "int8": ["nf4"], "none": ["int8", "nf4"]}


def test_a_hint_names_every_method_that_would_do() -> None:
    assert quant_flag(method for method in Quantization if method.traits.measures_error) == "--quant nf4 or fp4"
