"""The roofline: an operation takes as long as its arithmetic or its traffic, and a step as its device or its host."""

from dataclasses import replace

import pytest

from qlora_cli.timing.operation import Operation, OperationKind, Pass
from qlora_cli.timing.rates import Rates
from qlora_cli.timing.roofline import cost_of

RATES = Rates(
    flops=1e12,
    attention_flops=5e11,
    fp32_flops=1e11,
    num_bytes=1e9,
    dequantized_bytes=5e8,
    narrow_bytes=2.5e8,
    host_copy_bytes=1e8,
    kernel_seconds=2e-6,
    dispatch_seconds=1e-5,
    num_sms=100,
    watts=100,
)


def operation(
    kind: OperationKind = OperationKind.NORM, *, flops: int = 0, num_bytes: int = 0, kernels: int = 1
) -> Operation:
    return Operation(Pass.FORWARD, kind, "any", flops, num_bytes, kernels)


def seconds(*operations: Operation, host_bytes: int = 0) -> float:
    return cost_of([(1, each) for each in operations], RATES, host_bytes=host_bytes).device_seconds


def test_an_operation_takes_the_longest_of_arithmetic_traffic_and_launch() -> None:
    assert seconds(operation(OperationKind.BASE_GEMM, flops=10**12, num_bytes=10**8)) == 1
    assert seconds(operation(flops=10**9, num_bytes=10**9)) == 1
    assert seconds(operation(num_bytes=1)) == 2e-6
    assert seconds(operation(num_bytes=1, kernels=3)) == pytest.approx(6e-6)
    assert seconds(operation(kernels=0)) == 0


def test_dequantization_adapters_attention_and_fp32_have_rates_of_their_own() -> None:
    assert seconds(operation(OperationKind.DEQUANTIZATION, num_bytes=10**9)) == 2
    assert seconds(operation(OperationKind.LORA_GEMM, num_bytes=10**9)) == 4
    assert seconds(operation(OperationKind.ATTENTION, flops=10**12)) == 2
    product = operation(OperationKind.BASE_GEMM, flops=10**12)
    assert seconds(replace(product, is_fp32=True)) == 10
    # Attention that stores its scores is made of products.
    assert seconds(replace(product, kind=OperationKind.ATTENTION, tiles=1000)) == 1


@pytest.mark.parametrize(("tiles", "turns"), [(100, 1), (101, 2), (200, 2), (1000, 10)])
def test_tiles_are_computed_in_turns_by_all_multiprocessors(tiles: int, turns: int) -> None:
    product = replace(operation(OperationKind.BASE_GEMM, flops=10**10 * tiles), tiles=tiles)
    assert seconds(product) == pytest.approx(turns)


def test_copies_to_the_host_come_in_addition() -> None:
    assert seconds(operation(num_bytes=10**9), host_bytes=10**8) == 2


def test_a_step_takes_as_long_as_the_slower_of_device_and_host() -> None:
    product, copy = operation(OperationKind.BASE_GEMM, flops=10**12), operation(num_bytes=10**9)
    cost = cost_of([(3, product), (1, copy)], RATES)
    assert (cost.compute_seconds, cost.memory_seconds) == (3, 1)
    assert cost.host_seconds == pytest.approx(4e-5)
    assert cost.seconds == cost.device_seconds == 4
    assert cost.limited_by == "compute"
    assert cost_of([(1, product), (3, copy)], RATES).limited_by == "memory"
    launches = cost_of([(1000, operation(num_bytes=1))], RATES)
    assert launches.limited_by == "host"
    assert launches.seconds == launches.host_seconds == pytest.approx(1e-2)


def test_a_host_that_computes_itself_takes_the_sum_of_both() -> None:
    cost = cost_of([(3, operation(num_bytes=10**9))], replace(RATES, is_host=True))
    assert cost.seconds == cost.device_seconds + cost.host_seconds
    assert cost.host_seconds > 0
