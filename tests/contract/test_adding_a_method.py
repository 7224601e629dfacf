"""The recipe of CONTRIBUTING.md, "Add a quantization method": an entry and a module, and every command knows it.

The package is copied, and a method is added that stores weights in steps of 1/256, in 8 bit, without constants.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.contract.copied_package import PACKAGE, ask_copy
from tests.support.processes.plain_python import PlainPython

ROOT = Path(__file__).parent.parent.parent
NAMED_BEFORE = '    NONE = "none"\n\n    @'
ENTRY = """    Quantization.FIXED8: MethodTraits(
        module="fixed", label="fixed point", bits=8, proposal="weights in steps of 1/256"
    ),
"""
MODULE = '''"""Weights in steps of 1/256."""

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_cli.quantization.entries import WeightEntry
from qlora_cli.quantization.methods.method import Allocation, Method, WeightPart, StoredWeight

STEPS = 256


def codes_of(weight):
    return (weight.float() * STEPS).round().clamp(-127, 127).to(torch.int8)


class FixedLinear(nn.Linear):
    def __init__(self, before):
        super().__init__(before.in_features, before.out_features, before.bias is not None, device="meta")
        self.weight = nn.Parameter(torch.empty_like(before.weight, dtype=torch.int8), requires_grad=False)
        self.bias = before.bias

    def forward(self, rows):
        return linear(rows, self.weight.to(rows.dtype) / STEPS, self.bias)


def replace(model, unquantized):
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in unquantized:
            model.set_submodule(name, FixedLinear(module))


@register_quantization_config("qlora_fixed")
class FixedConfig(QuantizationConfigMixin):
    def __init__(self, unquantized=(), **_):
        self.quant_method, self.unquantized = "qlora_fixed", list(unquantized)


@register_quantizer("qlora_fixed")
class FixedQuantizer(HfQuantizer):
    is_trainable = True

    def is_serializable(self):
        return False

    def _process_model_before_weight_loading(self, model, **kwargs):
        replace(model, self.quantization_config.unquantized)

    def param_needs_quantization(self, model, param_name, **kwargs):
        module, leaf = get_module_from_name(model, param_name)
        return isinstance(module, FixedLinear) and leaf == "weight"

    def get_quantize_ops(self):
        return Fix()


class Fix(ConversionOps):
    def convert(self, input_dict, source_patterns=None, target_patterns=None, **kwargs):
        weights = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        return {name: nn.Parameter(codes_of(value), requires_grad=False) for name, value in weights.items()}


class Fixed(Method):
    layer_types = (FixedLinear,)

    def entry(self, name, kind, shape, dtype, settings):
        count = shape.numel()
        return WeightEntry(
            name=name, kind=kind, why_not=None, dtype="int8",
            num_parameters=count, weight_bytes=count, constant_bytes=0,
        )

    def stored(self, module, name, parameter):
        if not isinstance(module, FixedLinear) or name != "weight":
            return None
        return StoredWeight(shape=parameter.shape, dtype=torch.float32)

    def config(self, settings, *, unquantized, **_):
        return FixedConfig(unquantized)

    def store_on_meta(self, model, settings, dtype, *, unquantized, experts, compute_dtype):
        replace(model, unquantized)
        model.config.quantization_config = FixedConfig(unquantized)

    def allocations(self, entry, settings, dtype, num_pieces):
        yield Allocation(num_bytes=entry.num_parameters * dtype.itemsize, part=WeightPart.WEIGHT, is_persistent=False)
        yield Allocation(num_bytes=entry.weight_bytes, part=WeightPart.CODES)

    def round_trip(self, weight, settings):
        return codes_of(weight).to(weight.dtype) / STEPS


METHOD = Fixed()
'''
# Run in the copied package: load, predict, train and merge, as one object.
ASK = """
import json, os, sys
from pathlib import Path
from typer.testing import CliRunner
from qlora_cli.cli.app import app

base, rows, work = map(str, map(Path, sys.argv[1:]))
tuned = str(Path(work) / "run")

def run(*arguments):
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == 0, (arguments, done.output)
    return json.loads(done.stdout)

on_cpu = ("--device", "cpu", "--json")
load = run("load", base, "--quant", "fixed8", "--dtype", "fp32", *on_cpu)
predicted = run("inspect-memory", base, "--quant", "fixed8", "--max-length", "128", "--gpu", "RTX 4090", "--json")
trained = run("train", "--model", base, "--dataset", rows, "--output", tuned, "--quant", "fixed8", "--dtype", "fp32",
              "--max-steps", "2", "--max-length", "128", *on_cpu)
merged = run("merge", tuned, "--base", "dequantized", "--dtype", "fp32", *on_cpu)
refused = {}
for name, flags in {
    "a setting without effect": ("load", base, "--quant", "fixed8", "--set", "quantization.quant_storage=bf16"),
    "pissa": ("train", "--model", base, "--dataset", rows, "--output", "o", "--quant", "fixed8",
              "--set", "lora.init_lora_weights=pissa"),
    "loftq": ("train", "--model", base, "--dataset", rows, "--output", "o", "--quant", "fixed8",
              "--set", "lora.init_lora_weights=loftq"),
    "a save": ("load", base, "--quant", "fixed8", "--save", str(Path(work) / "saved"), "--device", "cpu"),
    "an unknown method": ("load", base, "--quant", "fixed9"),
}.items():
    done = CliRunner().invoke(app, list(flags))
    refused[name] = [done.exit_code, done.output]

import torch
from qlora_cli.loading.loader import load_model
from qlora_cli.quantization.methods.fixed import codes_of
from qlora_cli.settings.models import LoadSettings
from safetensors.torch import load_file
settings = {"name": base, "dtype": "fp32", "device": "cpu"}
loaded = load_model(LoadSettings(model=settings, quantization={"method": "fixed8"}))
stored = load_file(Path(base) / "model.safetensors")
layer = "model.layers.0.self_attn.q_proj.weight"
print(json.dumps({
    "load": load,
    "predicted": predicted,
    "trained": trained,
    "merged": merged,
    "refused": refused,
    "is_right": torch.equal(loaded.model.get_parameter(layer), codes_of(stored[layer])),
    "counted_as_planned": loaded.inventory == loaded.layout.inventory,
}))
"""


@pytest.fixture(scope="module")
def asked(plain_python: PlainPython, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the commands of a copy of the package print, in which two files are changed."""
    outcomes: dict[str, Any] = ask_copy(
        plain_python,
        tmp_path_factory.mktemp("copy"),
        edits={
            "settings/choices.py": {
                '    AUTO = "auto"\n\n    @': '    FIXED8 = "fixed8"\n',
                "    Quantization.NONE: ": ENTRY,
            }
        },
        files={"quantization/methods/fixed.py": MODULE},
        script=ASK,
    )
    return outcomes


def test_its_weights_are_stored_as_described_and_counted_as_planned(asked: dict[str, Any]) -> None:
    assert asked["is_right"]
    assert asked["counted_as_planned"]
    assert asked["load"]["quantization"] == "fixed8"
    assert asked["load"]["bits_per_quantized_parameter"] == 8.0
    assert asked["load"]["quantized_weight_bytes"] == asked["load"]["num_quantized_parameters"] > 0


def test_its_memory_is_predicted(asked: dict[str, Any]) -> None:
    predicted = asked["predicted"]
    assert predicted["settings"]["quant"] == "fixed8"
    assert predicted["components"]["quantized_weights_bytes"] == asked["load"]["quantized_weight_bytes"]
    assert predicted["components"]["quantization_constants_bytes"] == 0


def test_an_adapter_is_trained_on_it_and_merged_into_what_training_saw(asked: dict[str, Any]) -> None:
    assert asked["trained"]["steps"] == 2
    assert asked["merged"]["base"] == "dequantized"
    assert asked["merged"]["verification"]["passed"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("a setting without effect", "quantization.quant_storage has no effect with --quant fixed8"),
        ("pissa", "PiSSA can't be used on a quantized base"),
        ("loftq", "and --quant fixed8 has none"),
        ("a save", "a quantized checkpoint is to be saved, and nothing is quantized"),
        ("an unknown method", "fixed8"),
    ],
)
def test_what_cannot_be_combined_with_it_is_refused(asked: dict[str, Any], case: str, message: str) -> None:
    code, output = asked["refused"][case]
    assert code == 2
    assert message in " ".join(output.split())


# A method by its name in settings, in a text or as a word, by a class that bitsandbytes stores it in, by what
# transformers calls it, or by its settings.
NAMED = re.compile(
    r"Quantization\.(NF4|FP4|INT8|NONE)\b|--quant (nf4|fp4|int8)\b|[\"'](nf4|fp4|int8)[\"']"
    r"|\b(Linear4bit|Linear8bitLt|Params4bit|Int8Params|Bnb4bitParametrization)\b"
    r"|load_in_[48]bit|\bint8_\w+"
)
ALLOWED = {
    # What a method is, to settings and texts; the default; and the export format of the same name.
    "settings/choices.py": 9 + 2 + 1,
    # The module whose settings are named after it, and these settings.
    "settings/sections/quantization.py": 1 + 3,
    # What other tools call the methods that they have, too.
    "settings/foreign_names.py": 13,
    # bitsandbytes itself is checked, by a reference of its own.
    "doctor/checks_bitsandbytes.py": 8,
    # How fast bitsandbytes dequantizes the default is measured.
    "timing/measuring.py": 1,
    # What a model is compared with that has any method: itself, with none.
    "evaluating/quantization_cost.py": 1,
    # An export format, which is a preset of that method.
    "merging/exports/nf4.py": 1,
}


def namings(package: Path) -> dict[str, int]:
    """Return how often each file outside `quantization/methods/` names a method."""
    counts = {
        path.relative_to(package).as_posix(): len(NAMED.findall(path.read_text(encoding="utf-8")))
        for path in sorted(package.rglob("*.py"))
        if not path.is_relative_to(package / "quantization" / "methods")
    }
    return {file: count for file, count in counts.items() if count}


def test_no_method_is_named_elsewhere() -> None:
    assert namings(PACKAGE) == ALLOWED


def test_a_name_elsewhere_is_detected(tmp_path: Path) -> None:
    (tmp_path / "quantization" / "methods").mkdir(parents=True)
    (tmp_path / "quantization" / "methods" / "a.py").write_text("Quantization.INT8\n")
    (tmp_path / "quantization" / "b.py").write_text("config.load_in_4bit or settings.int8_threshold\n")
    (tmp_path / "c.py").write_text('if method == Quantization.INT8 or name == "nf4": isinstance(x, Linear4bit)\n')
    assert namings(tmp_path) == {"c.py": 3, "quantization/b.py": 2}
