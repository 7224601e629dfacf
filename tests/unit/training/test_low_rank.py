"""The update of a module by its factors: the figures of the whole matrix, which only these tests build."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.runs.adapter_health import AdapterHealth, ModuleHealth
from qlora_cli.training.outcome.low_rank import UpdateFactors, effective_rank, lost_share

SIZES = st.integers(1, 40)


def factors(seed: int, num_out: int, num_in: int, rank: int, scale: float = 1.0) -> UpdateFactors:
    chance = torch.Generator().manual_seed(seed)
    left, right = torch.randn(num_out, rank, generator=chance), torch.randn(rank, num_in, generator=chance)
    return UpdateFactors(left=left, right=right, scale=scale)


@settings(deadline=None)
@given(st.integers(0, 10_000), SIZES, SIZES, st.integers(1, 16), st.floats(-4, 4))
def test_singular_values_are_those_of_the_whole_update(
    seed: int, num_out: int, num_in: int, rank: int, scale: float
) -> None:
    update = factors(seed, num_out, num_in, rank, scale)
    whole = torch.linalg.svdvals((update.left.double() @ update.right.double()) * scale)
    values = update.singular_values()
    num_values = max(len(values), len(whole))
    first, second = (torch.nn.functional.pad(one, (0, num_values - len(one))) for one in (values, whole))
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-5 * float(whole.max()) + 1e-12)
    assert update.rank == rank


@settings(deadline=None)
@given(st.integers(1, 30), st.floats(1e-6, 1e6))
def test_equal_directions_are_counted(num_equal: int, size: float) -> None:
    values = torch.cat([torch.full((num_equal,), size, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)])
    assert effective_rank(values) == pytest.approx(num_equal)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20), st.sampled_from([2.0**-20, 0.5, 1.0, 2.0**20]))
def test_the_effective_rank_is_between_one_and_the_rank_whatever_the_scale(values: list[float], scale: float) -> None:
    found = effective_rank(torch.tensor(values, dtype=torch.float64))
    if sum(values) < 1e-300:  # that of a number without a reciprocal is not defined
        assert found <= len(values) + 1e-9
        return
    assert 1 - 1e-9 <= found <= len(values) + 1e-9
    assert effective_rank(scale * torch.tensor(values, dtype=torch.float64)) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_loses_all_of_an_update_far_below_a_unit_and_nothing_of_one_that_is_representable(
    dtype: torch.dtype,
) -> None:
    weight = torch.ones(100, 8)
    tiny = UpdateFactors(left=torch.full((100, 1), 1e-5), right=torch.ones(1, 8), scale=1.0)
    exact = UpdateFactors(left=torch.full((100, 1), 0.5), right=torch.ones(1, 8), scale=1.0)
    assert lost_share(tiny, weight, dtype) == 1
    assert lost_share(exact, weight, dtype) == 0
    assert lost_share(UpdateFactors(left=torch.zeros(100, 1), right=torch.ones(1, 8), scale=1.0), weight, dtype) == 0


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-6, 10))
def test_what_rounding_loses_is_at_most_the_update_and_equals_that_of_a_merge(seed: int, scale: float) -> None:
    update = factors(seed, 48, 24, 4, scale)  # fewer rows than are sampled, so that all of them are
    weight = torch.randn(48, 24, generator=torch.Generator().manual_seed(seed + 1))
    base = weight.bfloat16().float()
    whole = update.left @ update.right * scale
    merged = (base + whole).bfloat16().float()
    expected = float((merged - base - whole).norm() / whole.norm())
    found = lost_share(update, weight, torch.bfloat16)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found <= 1 + 1e-6


def module(name: str, norm: float, weight: float | None, lost: float | None) -> ModuleHealth:
    return ModuleHealth(name=name, rank=8, update_norm=norm, weight_norm=weight, effective_rank=4.0, lost_share=lost)


def test_the_figures_of_all_modules_are_those_of_their_updates_side_by_side() -> None:
    modules = [module("model.layers.0.q", 3.0, 30.0, 0.5), module("model.layers.11.q", 4.0, 40.0, 0.0)]
    health = AdapterHealth.of_modules(modules, merge_dtype="bf16", num_unmeasured=1)
    assert health is not None
    assert health.relative_norm == pytest.approx(0.1)  # 5 / 50
    assert health.lost_share == pytest.approx(1.5 / 5)
    assert health.sentence == (
        "rank 8 uses 4.0; the update is 10.00% of the weights; a merge into bf16 rounds off 30.0% of it"
    )
    assert [one.layer for one in health.modules] == [0, 11]
    assert modules[0].relative_norm == pytest.approx(0.1)


def test_what_is_not_known_of_one_module_is_not_known_of_all() -> None:
    modules = [module("lm_head", 3.0, None, None), module("model.layers.1.q", 4.0, 40.0, 0.0)]
    health = AdapterHealth.of_modules(modules, merge_dtype="bf16", num_unmeasured=0)
    assert health is not None
    assert (health.relative_norm, health.lost_share, modules[0].layer) == (None, None, None)
    assert health.sentence == "rank 8 uses 4.0"
    assert AdapterHealth.of_modules([], merge_dtype="bf16", num_unmeasured=3) is None
    assert math.isfinite(health.effective_rank)
