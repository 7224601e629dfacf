"""The change of a weight by an adapter: the formulas of the papers, in fp32, and when two changes are equal."""

import pytest
import torch

from qlora_cli.merging.planning.weight_changes import (
    AddedVector,
    DoraChange,
    ExpertUpdate,
    LowRankUpdate,
    ReplacedParameter,
    RowUpdate,
    WeightChange,
    WeightedChange,
    WholeParameter,
    total_delta,
)

GENERATOR = torch.Generator().manual_seed(0)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


LEFT, RIGHT, WEIGHT = values(6, 2), values(2, 4), values(6, 4)
PRODUCT = 1.5 * (LEFT @ RIGHT)


def low_rank(*, is_transposed: bool = False, scale: float = 1.5) -> LowRankUpdate:
    return LowRankUpdate(left=LEFT, right=RIGHT, scale=scale, is_transposed=is_transposed)


def test_lora_adds_the_scaled_product() -> None:
    torch.testing.assert_close(low_rank().apply(WEIGHT.clone()), WEIGHT + PRODUCT)
    torch.testing.assert_close(low_rank(is_transposed=True).apply(WEIGHT.T.clone()), (WEIGHT + PRODUCT).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_16_bit_are_multiplied_in_fp32(dtype: torch.dtype) -> None:
    left, right = LEFT.to(dtype), RIGHT.to(dtype)
    delta = LowRankUpdate(left=left, right=right, scale=1.5).delta()
    assert delta.dtype == torch.float32
    assert torch.equal(delta, left.float() @ right.float() * 1.5)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_each_expert_has_its_own_factors_as_peft_lays_them_out(is_transposed: bool) -> None:
    num_experts, rank = 3, 2
    left, right = values(6, rank * num_experts), values(num_experts * rank, 4)
    update = ExpertUpdate(left=left, right=right, scale=0.5, num_experts=num_experts, is_transposed=is_transposed)
    # As in `peft.tuners.lora.layer.ParamWrapper.get_delta_weight`.
    one = right.reshape(num_experts, rank, 4)
    other = left.reshape(6, rank, num_experts)
    expected = torch.einsum("o r e, e r i -> e o i", other, one) * 0.5
    expected = expected.transpose(1, 2) if is_transposed else expected
    torch.testing.assert_close(update.delta(), expected)
    for expert in range(num_experts):
        assert torch.equal(update.delta(expert), update.delta()[expert : expert + 1])


@pytest.mark.parametrize("is_transposed", [False, True])
def test_dora_gives_each_row_its_magnitude_and_the_direction_of_the_sum(is_transposed: bool) -> None:
    magnitude = values(6).abs()
    change = DoraChange(update=low_rank(is_transposed=is_transposed), magnitude=magnitude)
    moved = WEIGHT + PRODUCT
    expected = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
    weight, expected = (WEIGHT.T, expected.T) if is_transposed else (WEIGHT, expected)
    changed = change.apply(weight.clone())
    torch.testing.assert_close(changed, expected)
    torch.testing.assert_close(changed.norm(dim=0 if is_transposed else 1), magnitude)


def test_a_bias_is_scaled_too() -> None:
    torch.testing.assert_close(AddedVector(values=LEFT[:, 0], scale=2.0).apply(torch.ones(6)), 1 + 2 * LEFT[:, 0])


def test_rows_and_whole_parameters_replace_those_of_the_base() -> None:
    rows = RowUpdate(indices=(4, 1), values=values(2, 4).bfloat16())
    updated = rows.apply(WEIGHT.clone())
    assert torch.equal(updated[[4, 1]], rows.values.float())
    assert torch.equal(updated[[0, 2, 3, 5]], WEIGHT[[0, 2, 3, 5]])
    whole = values(6, 4)
    assert torch.equal(WholeParameter(values=whole).apply(WEIGHT), whole)
    assert torch.equal(WholeParameter(values=whole).apply(WEIGHT, 2), whole[2:3])
    replaced = ReplacedParameter(values=whole, change=low_rank())
    original = whole.clone()
    torch.testing.assert_close(replaced.apply(WEIGHT), whole + PRODUCT)
    assert torch.equal(whole, original)  # the adapter's own values stay as they are


def test_several_changes_are_summed_by_weight_and_zeros_are_dropped() -> None:
    zero = LowRankUpdate(left=torch.zeros(6, 2), right=RIGHT, scale=3.0)
    many = [
        WeightedChange(change=low_rank(), weight=0.5),
        WeightedChange(change=zero),
        WeightedChange(change=low_rank(), weight=-2),
    ]
    delta = total_delta(many)
    assert delta is not None
    torch.testing.assert_close(delta, -1.5 * PRODUCT)
    assert total_delta([WeightedChange(change=zero), WeightedChange(change=zero)]) is None
    assert total_delta([]) is None


SAME = LowRankUpdate(left=RIGHT.T.clone(), right=LEFT.T.clone(), scale=1.5, is_transposed=True)
PAIRS: dict[str, tuple[WeightChange, WeightChange, bool]] = {
    "copies": (low_rank(), low_rank(), True),
    "transposed factors": (low_rank(), SAME, True),
    "transposed": (low_rank(), low_rank(is_transposed=True), False),
    "another scale": (low_rank(), low_rank(scale=2.0), False),
    "other values": (low_rank(), LowRankUpdate(left=LEFT, right=RIGHT + 1, scale=1.5), False),
    "another kind": (low_rank(), WholeParameter(values=LEFT), False),
    "DoRA": (
        DoraChange(update=low_rank(), magnitude=LEFT[:, 0]),
        DoraChange(update=low_rank(), magnitude=LEFT[:, 0].clone()),
        True,
    ),
    "DoRA of another scale": (
        DoraChange(update=low_rank(), magnitude=LEFT[:, 0]),
        DoraChange(update=low_rank(scale=2.0), magnitude=LEFT[:, 0]),
        False,
    ),
    "rows": (RowUpdate(indices=(1, 2), values=LEFT[:2]), RowUpdate(indices=(1, 2), values=LEFT[:2].clone()), True),
    "other rows": (RowUpdate(indices=(1, 2), values=LEFT[:2]), RowUpdate(indices=(2, 1), values=LEFT[:2]), False),
    "replaced": (
        ReplacedParameter(values=WEIGHT, change=low_rank()),
        ReplacedParameter(values=WEIGHT, change=SAME),
        True,
    ),
    "replaced by another": (
        ReplacedParameter(values=WEIGHT, change=low_rank()),
        ReplacedParameter(values=WEIGHT + 1, change=low_rank()),
        False,
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_two_changes_are_equal_if_they_have_the_same_effect(kind: str) -> None:
    one, other, is_same = PAIRS[kind]
    assert one.equals(other) == other.equals(one) == is_same
