"""Finding a model's layers, distinguishing their kinds, and choosing few that represent all."""

import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_cli.memory.tracing.layers import LayerStack, contexts, find_stack, reduce_to, renamed, representatives
from qlora_cli.quantization.storage_plan import build_on_meta
from tests.support.models.tiny_models import tiny_config


def on_meta(family: str, **changes: Any) -> PreTrainedModel:
    return build_on_meta(tiny_config(family, **changes), torch.bfloat16)


def kinds_of(chosen: list[int], kinds: list[int]) -> list[int]:
    return [kinds[index] for index in chosen]


@pytest.mark.parametrize("seed", range(40))
def test_the_chosen_layers_represent_every_kind_between_its_neighbours(seed: int) -> None:
    draw = random.Random(seed)  # noqa: S311 - a seeded sequence
    kinds = [draw.randrange(draw.choice((1, 2, 3, 4))) for _ in range(draw.randrange(1, 60))]
    chosen = representatives(kinds)
    assert set(contexts(kinds_of(chosen, kinds))) == set(contexts(kinds))
    assert chosen == sorted(set(chosen))
    # None can be left out alone, and no run of them.
    for start in range(len(chosen)):
        for end in range(start + 1, len(chosen) + 1):
            shorter = chosen[:start] + chosen[end:]
            assert set(contexts(kinds_of(shorter, kinds))) != set(contexts(kinds))


@pytest.mark.parametrize("depth", [3, 4, 32, 126])
def test_three_layers_represent_any_number_of_one_kind(depth: int) -> None:
    assert len(representatives([0] * depth)) == 3


@pytest.mark.parametrize("depth", [1, 2])
def test_one_or_two_layers_represent_themselves(depth: int) -> None:
    assert representatives([0] * depth) == list(range(depth))


@pytest.mark.parametrize(
    ("kinds", "most"),
    [
        ([0, 1] * 20, 6),  # layers that alternate, as of Gemma 2
        ([0, 0, 0, 0, 0, 1] * 8, 12),  # every sixth differs, as of Gemma 3
        ([0, *[1] * 60], 4),  # a first layer of its own, as of DeepSeek
        ([0, 0, 0, 1] * 12, 8),  # every fourth differs, as of Qwen3-Next
    ],
)
def test_a_few_layers_represent_patterns_of_real_models(kinds: list[int], most: int) -> None:
    assert len(representatives(kinds)) <= most


def test_contexts_distinguish_the_first_and_the_last_layer() -> None:
    assert contexts([0, 0, 0]) == [(-1, 0, 0), (0, 0, 0), (0, 0, -1)]
    assert contexts([5]) == [(-1, 5, -1)]


@pytest.mark.parametrize(
    ("family", "changes", "path", "kinds"),
    [
        ("llama", {"num_hidden_layers": 5}, "model.layers", (0, 0, 0, 0, 0)),
        ("gpt2", {"n_layer": 3, "num_hidden_layers": 3}, "transformer.h", (0, 0, 0)),
        ("gemma2", {"num_hidden_layers": 4}, "model.layers", (0, 1, 0, 1)),
        ("glm4_moe", {"num_hidden_layers": 4}, "model.layers", (0, 1, 1, 1)),
        (
            "lfm2",
            {"num_hidden_layers": 3, "layer_types": ["conv", "conv", "full_attention"]},
            "model.layers",
            (0, 0, 1),
        ),
    ],
)
def test_kinds_follow_from_modules_and_lists_of_the_config(
    family: str, changes: dict[str, Any], path: str, kinds: tuple[int, ...]
) -> None:
    assert find_stack(on_meta(family, **changes)) == LayerStack(path=path, kinds=kinds)


def test_a_layer_with_other_marks_is_a_separate_kind() -> None:
    marks = {"model.layers.1.mlp.up_proj": "as asked", "lm_head": "the head"}
    stack = find_stack(on_meta("llama", num_hidden_layers=3), marks)
    assert stack is not None
    assert stack.kinds == (0, 1, 0)


def test_a_layer_with_another_width_is_a_separate_kind() -> None:
    model = on_meta("llama", num_hidden_layers=3)
    model.model.layers[2].mlp.up_proj = torch.nn.Linear(64, 256, device="meta", dtype=torch.bfloat16)
    stack = find_stack(model)
    assert stack is not None
    assert stack.kinds == (0, 0, 1)


def test_layers_that_share_weights_are_not_a_stack() -> None:
    model = on_meta("llama", num_hidden_layers=3)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    assert find_stack(model) is None


def test_two_lists_of_equal_length_are_not_a_stack() -> None:
    model = on_meta("llama", num_hidden_layers=3)
    model.model.others = torch.nn.ModuleList(torch.nn.Linear(2, 2, device="meta") for _ in range(3))
    assert find_stack(model) is None


def test_names_follow_their_layer_to_its_new_position() -> None:
    stack = LayerStack(path="model.layers", kinds=(0,) * 5)
    chosen = (2, 3, 4)
    assert renamed("model.layers.3.mlp.up_proj", stack, chosen) == "model.layers.1.mlp.up_proj"
    assert renamed("model.layers.2", stack, chosen) == "model.layers.0"
    assert renamed("model.layers.1.mlp.up_proj", stack, chosen) is None
    assert renamed("lm_head", stack, chosen) == "lm_head"
    assert renamed("model.layersnorm.1", stack, chosen) == "model.layersnorm.1"


def test_a_model_is_reduced_to_the_chosen_layers_with_the_lists_of_its_config() -> None:
    model = on_meta("gemma2", num_hidden_layers=6)
    stack = find_stack(model)
    assert stack is not None
    layers, types = list(model.model.layers), list(model.config.layer_types)
    reduce_to(model, stack, (0, 1, 5))
    assert list(model.model.layers) == [layers[0], layers[1], layers[5]]
    assert model.config.num_hidden_layers == 3
    assert model.config.layer_types == [types[0], types[1], types[5]]
    assert model.config.vocab_size == 128
    again = find_stack(model)
    assert again is not None
    assert again.kinds == (0, 1, 1)
