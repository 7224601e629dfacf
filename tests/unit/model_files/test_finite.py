"""Values that are not finite are detected in every dtype that weights are stored in."""

import pytest
import torch

from qlora_cli.model_files.finite import is_finite

NAN = float("nan")
INFINITE = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
CASES = [(dtype, bad) for dtype in INFINITE for bad in (NAN, float("inf"), float("-inf"))]


@pytest.mark.parametrize(("dtype", "bad"), [*CASES, (torch.float8_e4m3fn, NAN)], ids=str)
def test_a_single_value_that_is_not_finite_is_detected(dtype: torch.dtype, bad: float) -> None:
    values = torch.ones(3, 5)
    assert is_finite(values.to(dtype))
    values[1, 2] = bad
    assert not is_finite(values.to(dtype))
    assert is_finite(torch.empty(0, dtype=dtype))
