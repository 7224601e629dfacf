"""Settings of the adapter that can't work together, resolved patterns, and the best low-rank approximation."""

from typing import Any

import pytest
import torch

from qlora_cli.adapters.targets import names_ending_in, rank_of, resolve_pattern
from qlora_cli.errors import ModelError, SettingsError
from qlora_cli.quantization.residuals import low_rank_approximation
from qlora_cli.settings.models import EstimateSettings, LoraSettings, TrainSettings
from qlora_cli.settings.resolve import Sources, resolve

REQUIRED = {"model.name": "base", "data.dataset": "rows.jsonl", "output.directory": "run"}
NAMES = [
    f"model.layers.{index}.{name}" for index in (0, 1, 11) for name in ("attn.q_proj", "mlp.up_proj", "norm.up_proj")
]


def settings(kind: Any = TrainSettings, **assignments: str) -> LoraSettings:
    flags = {path: (path, value) for path, value in REQUIRED.items() if kind is TrainSettings or path == "model.name"}
    given = [f"{name.replace('__', '.')}={value}" for name, value in assignments.items()]
    lora: LoraSettings = resolve(Sources(flags=flags, assignments=given), kind).settings.lora
    return lora


def refused(kind: Any = TrainSettings, **assignments: str) -> str:
    """Return the only problem, with its hint."""
    with pytest.raises(SettingsError) as caught:
        settings(kind, **assignments)
    (problem,) = caught.value.problems
    assert problem.hint
    return f"{problem} | {problem.hint}"


ON_EXPERTS = "can't be applied to fused experts"
EVEN = "orthogonal needs even ranks"


@pytest.mark.parametrize(
    ("given", "path", "message", "hint"),
    [
        ({"dropout": "0.1", "target_parameters": "all-experts"}, "dropout", ON_EXPERTS, "Set it to 0"),
        ({"use_dora": "yes", "target_parameters": "all-experts"}, "use_dora", ON_EXPERTS, "out."),
        (
            {"init_lora_weights": "loftq", "target_parameters": "a"},
            "init_lora_weights",
            ON_EXPERTS,
            "default or gaussian",
        ),
        ({"init_lora_weights": "orthogonal", "target_parameters": "a"}, "init_lora_weights", ON_EXPERTS, "default or"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights",
            "PiSSA can't be used on a quantized base",
            "--quant none",
        ),
        ({"init_lora_weights": "orthogonal", "rank": "7"}, "init_lora_weights", f"{EVEN}, half for A", "lora.rank"),
        (
            {"init_lora_weights": "orthogonal", "rank_pattern": "a=3"},
            "init_lora_weights",
            "got 3",
            "rank_pattern",
        ),
        (
            {"modules_to_save": "a,b", "target_modules": "b"},
            "modules_to_save",
            "b is both in lora.modules_to_save",
            "one of them",
        ),
    ],
)
@pytest.mark.parametrize("kind", [TrainSettings, EstimateSettings])
def test_settings_that_cannot_work_together_are_refused_before_a_model_is_searched(
    kind: Any, given: dict[str, str], path: str, message: str, hint: str
) -> None:
    problem = refused(kind, **{f"lora__{name}": value for name, value in given.items()})
    assert problem.startswith(f"--set lora.{path}: ")
    assert message in problem.split(" | ")[0]
    assert hint in problem.split(" | ")[1]


@pytest.mark.parametrize("method", ["int8", "none"])
def test_loftq_needs_a_quantization_error(method: str) -> None:
    problem = refused(lora__init_lora_weights="loftq", quantization__method=method)
    assert f"and --quant {method} has none" in problem
    assert "--quant nf4 or fp4" in problem


@pytest.mark.parametrize("method", ["fp4", "int8"])
def test_pissa_needs_unquantized_weights(method: str) -> None:
    problem = refused(lora__init_lora_weights="pissa", quantization__method=method)
    assert "would have to be quantized again, to a base that fits this adapter only" in problem


def test_settings_that_work_together_are_accepted() -> None:
    assert settings(lora__init_lora_weights="pissa", quantization__method="none").init_lora_weights == "pissa"
    for method in ("nf4", "fp4"):
        assert settings(lora__init_lora_weights="loftq", quantization__method=method).init_lora_weights == "loftq"
    lora = settings(lora__rank_pattern="q_proj=4,layers.0.mlp.down_proj=8", lora__alpha_pattern="q_proj=2.5")
    assert lora.rank_pattern == {"q_proj": 4, "layers.0.mlp.down_proj": 8}
    assert lora.alpha_pattern == {"q_proj": 2.5}
    both = settings(lora__target_parameters="all-experts", lora__rank_pattern="down_proj=4", lora__use_rslora="yes")
    assert both.rank_pattern == {"down_proj": 4}
    assert settings(lora__init_lora_weights="gaussian", lora__target_parameters="all-experts").rank == 16


def test_a_name_matches_the_end_of_a_path_at_a_dot() -> None:
    assert names_ending_in(NAMES, ["up_proj"]) == [name for name in NAMES if "up" in name]
    assert names_ending_in(NAMES, ["mlp.up_proj"]) == [name for name in NAMES if "mlp" in name]
    assert names_ending_in(NAMES, ["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]  # not of layer 11
    assert names_ending_in(NAMES, [NAMES[0]]) == [NAMES[0]]
    assert names_ending_in(NAMES, ["proj", ""]) == []


@pytest.mark.parametrize("keys", [("up_proj", "mlp.up_proj"), ("mlp.up_proj", "up_proj")])
def test_the_longest_key_applies_and_no_two_keys_match_one_layer(keys: tuple[str, ...]) -> None:
    values = {"up_proj": 4, "mlp.up_proj": 8}
    resolved = resolve_pattern({key: values[key] for key in keys}, NAMES, "lora.rank_pattern")
    assert resolved == {"mlp.up_proj": 8, **{name: 4 for name in NAMES if "norm" in name}}
    lora = LoraSettings(rank=16, rank_pattern={key: values[key] for key in keys})
    for name in NAMES:
        fits = [value for key, value in resolved.items() if names_ending_in([name], [key])]
        assert fits == ([] if "q_proj" in name else [rank_of(name, lora)])


def test_a_pattern_without_overlaps_is_left_unchanged() -> None:
    pattern = {"q_proj": 4, "layers.1.mlp.up_proj": 8}
    assert resolve_pattern(pattern, NAMES, "lora.rank_pattern") == pattern
    assert resolve_pattern(None, NAMES, "lora.rank_pattern") == {}


def test_a_key_without_effect_is_refused() -> None:
    with pytest.raises(ModelError, match=r"lora.alpha_pattern: 'o_proj' matches no adapted layer") as caught:
        resolve_pattern({"o_proj": 4.0}, NAMES, "lora.alpha_pattern")
    assert caught.value.hint == "Adapted are q_proj, up_proj; a key is a full name or, after a dot, its end."
    with pytest.raises(ModelError, match="'q_proj' has no effect: longer keys apply to all its layers"):
        resolve_pattern({"q_proj": 4, "attn.q_proj": 8}, NAMES, "lora.rank_pattern")


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 5, 24, 60])
def test_the_low_rank_approximation_equals_a_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    factors = low_rank_approximation(matrix, rank)
    effective_rank = min(rank, *shape)
    assert factors.left.shape == (shape[0], effective_rank)
    assert factors.right.shape == (effective_rank, shape[1])
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    best = left[:, :effective_rank] * values[:effective_rank] @ right[:effective_rank]
    torch.testing.assert_close(factors.left @ factors.right, best, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1), rtol=1e-3, atol=1e-5)


def test_a_matrix_of_a_lower_rank_is_approximated_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(32, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    factors = low_rank_approximation(matrix, 8)
    assert factors.left.isfinite().all()
    assert factors.right.isfinite().all()
    torch.testing.assert_close(factors.left @ factors.right, matrix, rtol=1e-3, atol=1e-4)
    nothing = low_rank_approximation(torch.zeros(8, 16), 4)
    assert not (nothing.left @ nothing.right).any()
