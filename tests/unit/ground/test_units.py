"""Numbers as people read them."""

import pytest

from qlora_cli.units import format_bytes, format_count, format_duration, format_rate


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3_600_000_000, "3.35 GiB"), (5 * 1024**2, "5.00 MiB")],
)
def test_bytes_are_binary_units(num_bytes: int, expected: str) -> None:
    assert format_bytes(num_bytes) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(512, "512"), (12_345, "12,345"), (159_907_840, "159.91M"), (6_738_415_616, "6.74B")]
)
def test_counts_are_written_like_those_of_models(count: int, expected: str) -> None:
    assert format_count(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.5, "0.50 s"), (42, "42 s"), (65, "1:05"), (7389, "2:03:09"), (59.9, "60 s")]
)
def test_durations(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0.5, "0.5 FLOP/s"), (2e6, "2.0 MFLOP/s"), (31.24e9, "31.2 GFLOP/s"), (989.4e12, "989.4 TFLOP/s")],
)
def test_rates_are_decimal_units(rate: float, expected: str) -> None:
    assert format_rate(rate, "FLOP") == expected
