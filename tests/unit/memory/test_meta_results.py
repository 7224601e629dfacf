"""Results remembered on the meta device are those of the operator: shapes, strides, dtypes, storages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora_cli.memory.tracing.meta_results import MetaResults, storage_address

aten = torch.ops.aten
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "meta") -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def arguments(*args: Any, **kwargs: Any) -> Arguments:
    return args, kwargs


# Operators, and arguments in whose metadata alone they differ.
NEW: dict[str, tuple[Any, list[Callable[[], Arguments]]]] = {
    "product": (
        aten.mul.Tensor,
        [
            lambda: arguments(empty(3, 4), empty(3, 4)),
            lambda: arguments(empty(3, 4), empty(3, 1)),
            lambda: arguments(empty(4, 3), empty(4, 1)),
            lambda: arguments(empty(4, 3).t(), empty(4, 3).t()),
            lambda: arguments(empty(3, 4), empty(4, 3).t()),
            lambda: arguments(empty(3, 8)[:, ::2], empty(3, 8)[:, 1::2]),
            lambda: arguments(empty(3, 4, dtype=torch.bfloat16), empty(3, 4)),
            lambda: arguments(empty(3, 4, dtype=torch.bfloat16), empty(dtype=torch.float32)),
            lambda: arguments(empty(3, 4, dtype=torch.int64), 2),
            lambda: arguments(empty(3, 4, dtype=torch.int64), 2.0),
            lambda: arguments(empty(3, 4, dtype=torch.bool), 1),
            lambda: arguments(empty(3, 4, dtype=torch.bool), 1.0),
            lambda: arguments(empty(3, 4, dtype=torch.bool), True),
            lambda: arguments(empty(0, 4), empty(0, 4)),
        ],
    ),
    "cast": (
        aten._to_copy.default,
        [
            lambda: arguments(empty(3, 4), dtype=torch.bfloat16),
            lambda: arguments(empty(3, 4), dtype=torch.float64),
            lambda: arguments(empty(4, 3).t(), dtype=torch.bfloat16),
            lambda: arguments(empty(4, 3).t(), dtype=torch.bfloat16, memory_format=torch.contiguous_format),
            lambda: arguments(empty(1, 4).expand(3, 4), dtype=torch.bfloat16),
        ],
    ),
    "concatenation": (
        aten.cat.default,
        [
            lambda: arguments([empty(3, 4), empty(2, 4)]),
            lambda: arguments([empty(3, 4), empty(3, 4)], 0),
            lambda: arguments([empty(3, 4), empty(3, 4)], 1),
            lambda: arguments([empty(3, 4), empty(3, 4), empty(3, 4)], 1),
        ],
    ),
    "sum": (
        aten.sum.dim_IntList,
        [
            lambda: arguments(empty(3, 4), [0]),
            lambda: arguments(empty(3, 4), [0], True),
            lambda: arguments(empty(3, 4), [0, 1]),
            lambda: arguments(empty(3, 4), None),
            lambda: arguments(empty(3, 4), [1], dtype=torch.float64),
        ],
    ),
    "dropout": (aten.native_dropout.default, [lambda: arguments(empty(3, 4), 0.5, True)]),
    "filled": (aten.full.default, [lambda: arguments([3, 4], 1.0, device=torch.device("meta"))]),
    "copied parts": (
        aten.split_with_sizes_copy.default,
        [lambda: arguments(empty(6, 4), [2, 4]), lambda: arguments(empty(6, 4), [3, 3])],
    ),
}


def facts(result: Any) -> list[tuple[Any, ...]]:
    """Return all that a trace reads of new tensors."""
    parts = [result] if isinstance(result, torch.Tensor) else list(result)
    return [
        (part.shape, part.stride(), part.storage_offset(), part.dtype, part.device, part.untyped_storage().nbytes())
        for part in parts
    ]


@pytest.mark.parametrize("name", NEW)
def test_new_tensors_are_those_of_the_operator(name: str) -> None:
    func, cases = NEW[name]
    results = MetaResults()
    for make in (*cases, *cases, *reversed(cases)):
        args, kwargs = make()
        result = results.run(func, args, kwargs)
        assert facts(result) == facts(func(*args, **kwargs))
        assert type(result) is type(func(*args, **kwargs))
        parts = [result] if isinstance(result, torch.Tensor) else list(result)
        assert len({storage_address(part) for part in parts}) == len(parts)


class Counted:
    """An operator that counts its calls."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.tags = func.tags
        self.num_calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        return self.func(*args, **kwargs)


@pytest.mark.parametrize("name", ["product", "cast", "concatenation", "sum", "dropout", "filled"])
def test_an_operator_is_called_once_for_equal_metadata(name: str) -> None:
    func, cases = NEW[name]
    counted, results = Counted(func), MetaResults()
    for make in (*cases, *cases):
        args, kwargs = make()
        results.run(counted, args, kwargs)
    assert counted.num_calls == len(cases)


def test_what_is_changed_in_place_is_returned_itself() -> None:
    counted, results = Counted(aten.add_.Tensor), MetaResults()
    for _ in range(3):
        changed = empty(3, 4)
        assert results.run(counted, (changed, empty(4)), {}) is changed
    assert counted.num_calls == 1
    with pytest.raises(RuntimeError, match="broadcast"):
        results.run(counted, (empty(3, 4), empty(5)), {})


def test_what_is_written_into_is_returned_itself_and_resized_each_time() -> None:
    counted, results = Counted(aten.exp.out), MetaResults()
    for _ in range(3):
        written = empty(3, 4)
        assert results.run(counted, (empty(3, 4),), {"out": written}) is written
    assert counted.num_calls == 1
    for _ in range(2):
        resized = empty(0)
        assert results.run(counted, (empty(3, 4),), {"out": resized}) is resized
        assert resized.shape == (3, 4)
    assert counted.num_calls == 3


def test_what_a_result_follows_from_is_known_where_it_is_remembered() -> None:
    results = MetaResults()
    asked = []
    for shape in ((3, 4), (3, 4), (4, 3), (4, 3)):
        results.run(aten.mul.Tensor, (empty(*shape), 2.0), {})
        asked.append(results.asked)
    assert asked[0] is asked[2] is None  # derived the first time
    assert None is not asked[1] != asked[3]
    results.run(aten.view.default, (empty(3, 4), [12]), {})
    assert results.asked is None


@pytest.mark.parametrize(
    ("func", "make"),
    [
        pytest.param(aten.view.default, lambda: arguments(empty(3, 4), [12]), id="view"),
        pytest.param(aten._unsafe_view.default, lambda: arguments(empty(3, 4), [12]), id="unsafe view"),
        pytest.param(aten.detach.default, lambda: arguments(empty(3, 4)), id="detach"),
        pytest.param(aten.t_.default, lambda: arguments(empty(3, 4)), id="transposed in place"),
        pytest.param(aten.split.Tensor, lambda: arguments(empty(4, 4), 2), id="split"),
        pytest.param(aten.mm.out, lambda: arguments(empty(3, 4), empty(4, 3), out=empty(0)), id="resized"),
        pytest.param(
            aten.mul.Tensor, lambda: arguments(empty(3, 4, dtype=torch.complex64), empty(3, 4)), id="complex"
        ),
        pytest.param(
            aten.mul.Tensor, lambda: arguments(empty(3, 4, device="cpu"), empty(3, 4, device="cpu")), id="on the CPU"
        ),
        pytest.param(
            aten.zeros_like.default, lambda: arguments(empty(3, 4), device=torch.device("cpu")), id="to the CPU"
        ),
        pytest.param(aten._foreach_add_.Scalar, lambda: arguments([empty(3, 4)], 1.0), id="many"),
        pytest.param(aten.set_.source_Tensor, lambda: arguments(empty(3, 4), empty(3, 4)), id="set"),
    ],
)
def test_all_other_operators_are_called_each_time(func: Any, make: Callable[[], Arguments]) -> None:
    counted, results = Counted(func), MetaResults()
    for number in (1, 2, 3):
        args, kwargs = make()
        results.run(counted, args, kwargs)
        assert counted.num_calls == number


def test_views_share_the_storage_that_is_asked_for() -> None:
    results = MetaResults()
    for _ in range(2):
        base = empty(3, 4)
        assert storage_address(results.run(aten.view.default, (base, [12]), {})) == storage_address(base)
        assert storage_address(results.run(aten._unsafe_view.default, (base, [12]), {})) == storage_address(base)
