"""Checkpoints of every kind load as they are; damaged ones are refused with the names of file and tensor."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qlora_cli.cli.app import app
from qlora_cli.errors import ModelError, OutOfMemoryError
from qlora_cli.loading.save import save_quantized
from qlora_cli.quantization.methods import four_bit_quantizer
from tests.conftest import Recorder
from tests.support.models.loading import DAMAGED_PICKLES, layers_of, load, logits, refused, save_model
from tests.support.models.tiny_models import tiny_config

WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], object]


def change_weights(directory: Path, change: Change) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def change_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def message_of_the_command(directory: Path, *flags: str) -> str:
    """Return the message of `qlora load` for a model that it refuses with exit code 2 and without a traceback."""
    done = CliRunner().invoke(app, ["load", str(directory), "--device", "cpu", "--json", *flags])
    assert done.exit_code == 2, done.output
    assert set(json.loads(done.stdout)) == {"error"}
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


# ---- what loads


@pytest.mark.fast
def test_shards_are_one_model(model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "sharded" / file).write_bytes((model / file).read_bytes())
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    one, several = load(model), load(tmp_path / "sharded")
    assert torch.equal(logits(several.base), logits(one.base))
    assert several.inventory == one.inventory


@pytest.fixture(scope="module")
def saved(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model, saved in FP4 (single quantization, bf16 storage, v_proj unquantized) and in int8."""
    flags: dict[str, dict[str, object]] = {
        "fp4": {
            "quantization__double_quant": False,
            "quantization__quant_storage": "bf16",
            "quantization__skip_modules": "v_proj",
        },
        "int8": {"quantization__int8_threshold": 3.0},
    }
    directory = tmp_path_factory.mktemp("saved")
    for method, given in flags.items():
        save_quantized(load(base_model, quantization__method=method, **given), directory / method, Recorder())
    return {method: directory / method for method in flags}


def test_a_quantized_checkpoint_loads_as_it_is_with_its_settings_shown(
    saved: dict[str, Path], base_model: Path
) -> None:
    loaded = load(saved["fp4"])
    settings = loaded.settings.quantization
    assert (settings.method, settings.double_quant, settings.quant_storage) == ("fp4", False, "bf16")
    report = loaded.report()
    assert (report.quantization, report.prequantized) == ("fp4", True)
    assert report.storage == "FP4, single quantization, as stored"
    assert report.quantization_settings["double_quant"] is False
    fresh = load(
        base_model,
        quantization__method="fp4",
        quantization__double_quant=False,
        quantization__quant_storage="bf16",
        quantization__skip_modules="v_proj",
    )
    assert torch.equal(logits(loaded.base), logits(fresh.base))
    assert loaded.inventory == loaded.layout.inventory
    assert loaded.inventory.bytes_by_dtype() == fresh.inventory.bytes_by_dtype()
    assert load(saved["int8"]).settings.quantization.int8_threshold == 3.0


@pytest.mark.parametrize(
    ("method", "flags", "expected"),
    [
        ("fp4", {"method": "nf4"}, "quantization.method is nf4, the checkpoint has fp4"),
        ("fp4", {"method": "none"}, "quantization.method is none, the checkpoint has fp4"),
        ("fp4", {"double_quant": True}, "quantization.double_quant is true, the checkpoint has false"),
        ("fp4", {"quant_storage": "uint8"}, "quantization.quant_storage is uint8, the checkpoint has bf16"),
        ("fp4", {"skip_modules": "q_proj"}, "the checkpoint holds model.layers.0.self_attn.q_proj quantized"),
        ("int8", {"method": "nf4"}, "quantization.method is nf4, the checkpoint has int8"),
        ("int8", {"method": "int8", "int8_has_fp16_weight": True}, "int8_has_fp16_weight is true, the checkpoint has"),
        ("int8", {"skip_modules": "v_proj"}, "the checkpoint holds model.layers.0.self_attn.v_proj quantized"),
        ("int8", {"quant_storage": "fp32"}, "quantization.quant_storage: has no effect"),
        ("int8", {"compute_dtype": "bf16"}, "quantization.compute_dtype: has no effect"),
    ],
)
def test_a_flag_that_contradicts_a_quantized_checkpoint_is_an_error(
    saved: dict[str, Path], method: str, flags: dict[str, object], expected: str
) -> None:
    assert expected in refused(
        saved[method], ModelError, **{f"quantization__{key}": value for key, value in flags.items()}
    )


def test_flags_that_agree_with_a_quantized_checkpoint_are_fine(saved: dict[str, Path]) -> None:
    agreeing = {"method": "fp4", "double_quant": False, "quant_storage": "bf16", "skip_modules": "v_proj,lm_head"}
    loaded = load(saved["fp4"], **{f"quantization__{key}": value for key, value in agreeing.items()})
    assert torch.equal(logits(loaded.base), logits(load(saved["fp4"]).base))


@pytest.mark.fast
def test_the_compute_settings_of_a_quantized_checkpoint_can_be_chosen(
    saved: dict[str, Path], base_model: Path
) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    stored = load(saved["fp4"])
    in_bf16 = load(saved["fp4"], model__dtype="bf16")
    assert {p.dtype for p in in_bf16.base.parameters()} == {torch.bfloat16}  # packed codes too, as they were saved
    assert {layer.compute_dtype for layer in layers_of(in_bf16.base, Linear4bit).values()} == {torch.bfloat16}
    only_products = load(saved["fp4"], quantization__compute_dtype="bf16")
    assert {layer.compute_dtype for layer in layers_of(only_products.base, Linear4bit).values()} == {torch.bfloat16}
    computed = [logits(loaded.base).float() for loaded in (stored, in_bf16, only_products)]
    assert all(not torch.equal(computed[i], computed[j]) for i, j in ((0, 1), (0, 2), (1, 2)))

    flags = {"quantization__method": "int8", "quantization__int8_threshold": 0.0}
    without = load(saved["int8"], **flags)
    assert {layer.state.threshold for layer in layers_of(without.base, Linear8bitLt).values()} == {0.0}
    assert torch.equal(logits(without.base), logits(load(base_model, **flags).base))


# ---- what does not


def test_a_missing_weight_is_named(model: Path) -> None:
    change_weights(model, lambda weights: weights.pop(DOWN))
    message = refused(model, ModelError)
    assert f"the weights of {model} do not match its config.json: {DOWN} missing" in message
    assert "error: the weights of" in message_of_the_command(model)


def test_unexpected_weights_are_named_with_their_file(model: Path) -> None:
    change_weights(model, lambda weights: weights.update({"model.layers.1.mlp.bias_proj.weight": torch.zeros(2)}))
    message = message_of_the_command(model)
    assert "holds weights that its config.json does not describe: model.layers.1.mlp.bias_proj.weight" in message
    assert f"(in {WEIGHTS})" in message


def test_a_shape_that_contradicts_the_config_is_found_in_the_header(model: Path) -> None:
    change_config(model, intermediate_size=192)
    message = message_of_the_command(model)
    assert re.search(rf"{model}/{WEIGHTS}: model.layers.0.mlp.\w+_proj.weight has the shape \(128, 64\)", message)
    assert "config.json says (192, 64)" in message


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_an_expert_of_another_shape_is_named(tmp_path: Path, method: str) -> None:
    model = save_model(tmp_path / "moe", "mixtral")
    (name,) = [
        name for name in load_file(model / WEIGHTS) if "layers.1" in name and name.endswith("experts.2.w2.weight")
    ]
    change_weights(model, lambda weights: weights.update({name: torch.zeros(64, 64)}))
    message = refused(model, ModelError, quantization__method=method)
    assert name in message
    assert WEIGHTS in message


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_experts_that_are_all_transposed_are_not_mistaken_for_others_of_the_same_size(
    tmp_path: Path, method: str
) -> None:
    model = save_model(tmp_path / "moe", "mixtral")

    def transpose(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if "layers.1" in name and name.endswith("w2.weight"):
                weights[name] = weights[name].T.contiguous()

    change_weights(model, transpose)
    assert "model.layers.1.mlp.experts.down_proj" in refused(model, ModelError, quantization__method=method)


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_a_missing_expert_is_named(tmp_path: Path, method: str) -> None:
    model = save_model(tmp_path / "moe", "mixtral")
    (name,) = [
        name for name in load_file(model / WEIGHTS) if "layers.1" in name and name.endswith("experts.2.w2.weight")
    ]
    change_weights(model, lambda weights: weights.pop(name))
    message = refused(model, ModelError, quantization__method=method)
    assert "model.layers.1" in message
    assert "experts" in message


def test_a_truncated_shard_is_named_with_its_first_truncated_tensor(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[:-1000])
    message = message_of_the_command(model)
    assert f"{model / WEIGHTS} is damaged: it is truncated" in message
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__")
    ends = {entry["data_offsets"][1]: name for name, entry in header.items()}
    first_cut = min(end for end in ends if end > max(ends) - 1000)
    assert f" and {ends[first_cut]} is the first incomplete tensor" in message


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.bias"),
        ("olmo2", "model.layers.0.post_feedforward_layernorm.weight"),
        ("gemma2", "model.layers.0.post_feedforward_layernorm.weight"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_the_config_of_another_architecture_is_refused_with_a_tensor_that_it_lacks(
    model: Path, family: str, missing: str
) -> None:
    tiny_config(family, vocab_size=3072, eos_token_id=4).save_pretrained(model)
    message = message_of_the_command(model)
    assert re.search(rf"the weights of {model} do not match its config.json: {missing}, .* more missing\n", message)


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4", "fp8"])
def test_a_checkpoint_of_another_quantizer_is_refused_with_a_way_out(model: Path, method: str) -> None:
    change_config(model, quantization_config={"quant_method": method, "bits": 4, "group_size": 128})
    message = message_of_the_command(model)
    assert f"{model} is quantized with {method}: its " in message
    assert "hint: Use the 16-bit model that it was made from" in message


def test_an_unquantized_checkpoint_with_a_quantization_config_is_refused(model: Path) -> None:
    change_config(model, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    message = message_of_the_command(model)
    name, num_weights = "model.layers.0.self_attn.q_proj.weight", 64 * 64
    assert (
        f"{model / WEIGHTS}: {name} is BF16 of {2 * num_weights} bytes, but quantized as config.json says it has "
        in message
    )
    assert f"says it has {num_weights // 2}\n" in message
    assert "hint: If it is the 16-bit model, remove quantization_config from its config.json." in message


def test_half_a_quantized_checkpoint_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in saved["fp4"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    name = "model.layers.2.self_attn.q_proj.weight"
    change_weights(broken, lambda weights: weights.pop(f"{name}.absmax"))
    assert f"{broken / WEIGHTS}: {name} is quantized, but its constants {name}.absmax are missing" in (
        message_of_the_command(broken)
    )


def as_pickle(model: Path) -> Path:
    """Turn the weights into a pickle and return its path."""
    path = model / "pytorch_model.bin"
    torch.save(load_file(model / WEIGHTS), path)
    (model / WEIGHTS).unlink()
    return path


@pytest.mark.parametrize("damage", DAMAGED_PICKLES)
def test_a_damaged_pickle_is_named_with_a_way_out(model: Path, damage: str) -> None:
    path = as_pickle(model)
    DAMAGED_PICKLES[damage](path)
    message = message_of_the_command(model, "--allow-pickle")
    assert f"error: {path} can't be read: " in message
    assert "weights_only" not in message  # PyTorch's advice is not repeated
    assert f"hint: Copy {path.name} again" in message


@pytest.mark.parametrize("legacy", [False, True])
def test_the_damaged_one_of_several_pickles_is_named(model: Path, legacy: bool) -> None:
    weights = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    names = sorted(weights)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, held in shards.items():
        torch.save({name: weights[name] for name in held}, model / file, _use_new_zipfile_serialization=not legacy)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    load(model, model__allow_pickle=True)
    second = model / "pytorch_model-2.bin"
    second.write_bytes(second.read_bytes()[:-2000])
    assert f"{second} can't be read" in message_of_the_command(model, "--allow-pickle")


def test_a_fault_that_is_not_of_the_weights_is_not_blamed_on_them(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        load(base_model)
    assert not isinstance(caught.value, ModelError)


@pytest.mark.parametrize(("kind", "error"), [(torch.OutOfMemoryError, OutOfMemoryError), (RuntimeError, RuntimeError)])
def test_a_fault_while_quantizing_is_not_blamed_on_the_weights(
    base_model: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], error: type[Exception]
) -> None:
    """transformers logs the fault and then reports weights that could not be converted."""

    def fail(*_: object, **__: object) -> None:
        raise kind("CUDA error")

    monkeypatch.setattr(four_bit_quantizer, "quantize", fail)
    with pytest.raises(error) as caught:
        load(base_model)
    assert not isinstance(caught.value, ModelError)
