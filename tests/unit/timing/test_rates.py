"""The rates of GPUs: every card of the catalogue has them, and their order is that of the cards."""

from itertools import pairwise

import pytest

from qlora_cli.memory.gpus import GPUS, find_gpu
from qlora_cli.timing.rates import ROWS, Rates, rates_of
from qlora_cli.units import GIB


def rates(name: str) -> Rates:
    gpu = find_gpu(name)
    found = rates_of(gpu.card, gpu.num_sms)
    assert found is not None
    return found


def test_every_card_of_the_catalogue_has_rates_and_no_other() -> None:
    assert [row[0] for row in ROWS] != []
    assert sorted(row[0] for row in ROWS) == sorted(gpu.name for gpu in GPUS)
    assert all(gpu.card == gpu.name for gpu in GPUS)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_rates_are_plausible(gpu: object) -> None:
    name = getattr(gpu, "name", "")
    found = rates(name)
    assert found.attention_flops < found.flops
    assert found.fp32_flops <= found.flops
    assert found.dequantized_bytes < found.num_bytes
    assert 40 < found.watts <= 1400
    # Products per byte: what a card needs of arithmetic before its memory no longer limits it.
    assert 15 < found.flops / found.num_bytes < 500
    assert found.num_sms == find_gpu(name).num_sms


def test_a_larger_card_of_one_generation_is_faster() -> None:
    for names in (
        ("RTX 3060 12GB", "RTX 3070", "RTX 3080 10GB", "RTX 3090", "RTX 3090 Ti"),
        ("RTX 4060 Ti 16GB", "RTX 4070", "RTX 4080", "RTX 4090"),
        ("RTX 5070", "RTX 5080", "RTX 5090"),
        ("T4", "V100 16GB", "A100 40GB", "H100 PCIe", "H100 SXM", "B200"),
    ):
        for slower, faster in pairwise(names):
            assert rates(slower).flops < rates(faster).flops, (slower, faster)


@pytest.mark.parametrize("size", ["24GB", "24GiB"])
def test_a_size_of_memory_is_no_card(size: str) -> None:
    gpu = find_gpu(size)
    assert gpu.total_bytes > 20 * GIB
    assert gpu.card == ""
    assert rates_of(gpu.card, gpu.num_sms) is None
