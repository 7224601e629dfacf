"""Tensors of a checkpoint are converted to parameters and back without loss, whole or slice by slice."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qlora_cli.errors import ModelError
from qlora_cli.merging.planning.conversions import Conversions, read_conversions
from qlora_cli.quantization.storage_plan import build_on_meta
from tests.support.models.tiny_models import tiny_config, tiny_model

# Tensors stored one by one and stacked, joined and stacked, joined, renamed, transposed, and unchanged.
FAMILIES = [
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "deepseek_v3",
    "gpt_oss",
    "jamba",
    "jetmoe",
    "phi3",
    "llama",
]


def stored(family: str, tmp: str) -> dict[str, torch.Tensor]:
    tiny_model(family).save_pretrained(tmp)
    return load_file(f"{tmp}/model.safetensors")


@pytest.fixture(params=FAMILIES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, torch.Tensor], Conversions]:
    family: str = request.param
    tensors = stored(family, str(tmp_path_factory.mktemp(family)))
    return family, tensors, read_conversions(build_on_meta(tiny_config(family), torch.float32), list(tensors))


def test_every_parameter_is_made_as_transformers_makes_it_and_every_tensor_comes_back(
    case: tuple[str, dict[str, torch.Tensor], Conversions],
) -> None:
    family, tensors, conversions = case
    model = tiny_model(family)
    expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    made: set[str] = set()
    for group in conversions.groups:
        values = group.forward(model, {key: tensors[key] for key in group.keys})
        assert values.keys() == set(group.targets)
        assert all(torch.equal(value, expected[name]) for name, value in values.items())
        made |= values.keys()
        back = group.backward(model, values)
        assert back.keys() == set(group.keys)
        assert all(torch.equal(value, tensors[name]) for name, value in back.items())
    assert {name for name, _ in model.named_parameters()} <= made
    assert {key for group in conversions.groups for key in group.keys} | {*conversions.unexpected} == tensors.keys()


def test_slices_are_converted_as_they_are_within_the_whole(
    case: tuple[str, dict[str, torch.Tensor], Conversions],
) -> None:
    family, tensors, conversions = case
    model = tiny_model(family)
    sliced = [group for group in conversions.groups if group.num_slices]
    assert bool(sliced) == (family in {"mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "jamba"})
    for group in sliced:
        assert group.num_slices == 4
        whole = group.forward(model, {key: tensors[key] for key in group.keys})
        for index in range(4):
            keys = group.keys_of(index)
            assert {group.slice_of(key) for key in keys} == {index}
            values = group.forward(model, {key: tensors[key] for key in keys})
            assert all(torch.equal(value, whole[name][index : index + 1]) for name, value in values.items())
            back = group.backward(model, values, index)
            assert back.keys() == set(keys)
            assert all(torch.equal(value, tensors[key]) for key, value in back.items())


def test_unexpected_tensors_are_listed() -> None:
    model = build_on_meta(tiny_config("llama"), torch.float32)
    names = [*dict(model.named_parameters()), "vision_tower.weight"]
    assert read_conversions(model, names).unexpected == ("vision_tower.weight",)


def test_a_key_mapping_renames_first() -> None:
    model = build_on_meta(tiny_config("llama"), torch.float32)
    names = [f"text.{name}" for name, _ in model.named_parameters()]
    conversions = read_conversions(model, names, {r"^text\.": ""})
    assert not conversions.unexpected
    assert {group.targets[0]: group.keys[0] for group in conversions.groups} == {
        name: f"text.{name}" for name, _ in model.named_parameters()
    }


def test_names_stored_without_the_prefix_of_the_base_model_are_matched() -> None:
    model = build_on_meta(tiny_config("gpt2"), torch.float32)
    names = [name.removeprefix("transformer.") for name, _ in model.named_parameters()]
    conversions = read_conversions(model, names)
    assert not conversions.unexpected
    assert {name for group in conversions.groups for name in group.targets} == {
        name for name, _ in model.named_parameters()
    }


def test_what_transformers_does_not_undo_is_refused() -> None:
    model = build_on_meta(tiny_config("qwen3_moe"), torch.float32)
    names = [f"model.layers.0.mlp.experts.{index}.{leaf}_proj.weight" for index in range(4) for leaf in ("gate", "up")]
    (group,) = read_conversions(model, names).groups
    broken = replace(
        group, intermediate_names={key: f"{name}.other" for key, name in group.intermediate_names.items()}
    )
    with pytest.raises(ModelError, match="transformers can't reverse its conversion on loading"):
        broken.backward(model, {group.targets[0]: torch.zeros(4, 128, 64)})
