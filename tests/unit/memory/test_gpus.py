"""The catalogue of GPUs: plausible numbers, and one card or an error with a hint for anything a user types."""

import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from qlora_cli.errors import HardwareError, UsageError
from qlora_cli.memory.gpus import GPUS, Gpu, find_gpu
from qlora_cli.units import GIB, MIB

MARKETING_GB = {
    "RTX 2080 Ti": 11,
    "RTX 3060 12GB": 12,
    "RTX 3080 10GB": 10,
    "RTX 3090": 24,
    "RTX 4070": 12,
    "RTX 4090": 24,
    "RTX 5090": 32,
    "RTX A6000": 48,
    "RTX PRO 6000 Blackwell": 96,
    "T4": 16,
    "V100 32GB": 32,
    "A10G": 24,
    "L4": 24,
    "L40S": 48,
    "A100 40GB": 40,
    "A100 80GB": 80,
    "H100 SXM": 80,
    "H200": 141,
    "B200": 192,
}


def test_the_catalogue_has_every_group_and_no_duplicate_name() -> None:
    assert len(GPUS) >= 35
    assert max(Counter(card.name for card in GPUS).values()) == 1
    assert {card.group for card in GPUS} == {"consumer", "workstation", "data-centre"}


def test_the_catalogue_is_sorted_by_memory_then_name_within_a_group() -> None:
    for group in {card.group for card in GPUS}:
        keys = [(card.total_bytes, card.name) for card in GPUS if card.group == group]
        assert keys == sorted(keys)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda card: card.name)
def test_the_numbers_of_a_card_are_plausible(gpu: Gpu) -> None:
    assert 7 * GIB < gpu.total_bytes < 192 * GIB
    assert gpu.usable_bytes == gpu.total_bytes
    assert (6, 0) <= gpu.capability <= (12, 0)
    assert 10 <= gpu.num_sms <= 188
    assert 64 * MIB <= gpu.context_bytes <= gpu.context_high_bytes <= GIB
    assert gpu.source


@pytest.mark.parametrize(("name", "size"), MARKETING_GB.items())
def test_pytorch_sees_a_little_less_than_the_marketing_size(name: str, size: int) -> None:
    assert 0.90 <= find_gpu(name).total_bytes / (size * GIB) <= 1.01


@pytest.mark.parametrize("gpu", GPUS, ids=lambda card: card.name)
def test_each_card_is_found_by_its_name_in_any_spelling(gpu: Gpu) -> None:
    for spelling in (gpu.name, gpu.name.upper(), f"NVIDIA {gpu.name.lower()}", gpu.name.replace(" ", "-")):
        assert find_gpu(spelling) == gpu


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx 4090 24GB", "RTX 4090"),
        ("4070tisuper", "RTX 4070 Ti Super"),
        ("RTX 3080 12G", "RTX 3080 12GB"),
        ("A100-80GB", "A100 80GB"),
        ("a100 40", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("h100", "H100 PCIe"),
        ("H100-SXM5", "H100 SXM"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("a10", "A10"),
        ("a10g", "A10G"),
        ("t4", "T4"),
        ("Tesla T4", "T4"),
        ("p100", "P100 16GB"),
        ("a6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("rtx pro 6000", "RTX PRO 6000 Blackwell"),
        ("Quadro RTX 8000", "Quadro RTX 8000"),
    ],
)
def test_a_card_is_found_by_its_common_names_and_that_of_pytorch(text: str, name: str) -> None:
    assert find_gpu(text).name == name


@pytest.mark.parametrize(
    ("text", "candidates"),
    [("A100", ["A100 40GB", "A100 80GB"]), ("v100", ["V100 16GB", "V100 32GB"]), ("3080", ["3080 10GB", "3080 12GB"])],
)
def test_a_name_of_cards_with_different_memory_is_refused_with_the_candidates(
    text: str, candidates: list[str]
) -> None:
    with pytest.raises(UsageError, match="different memory") as caught:
        find_gpu(text)
    assert all(candidate in caught.value.message for candidate in candidates)


@pytest.mark.parametrize(
    ("text", "total_bytes"),
    [
        ("24GiB", 24 * GIB),
        ("24 GiB", 24 * GIB),
        ("24gib", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("7.5GiB", 15 * GIB // 2),
    ],
)
def test_a_size_is_a_gpu_of_exactly_that_memory(text: str, total_bytes: int) -> None:
    gpu = find_gpu(text)
    assert (gpu.group, gpu.total_bytes, gpu.usable_bytes) == ("as asked", total_bytes, total_bytes)


def test_a_size_takes_other_figures_from_the_card_nearest_in_memory_and_names_it() -> None:
    gpu, card = find_gpu("40GiB"), find_gpu("A100 40GB")
    assert (gpu.capability, gpu.num_sms) == (card.capability, card.num_sms)
    assert (gpu.context_bytes, gpu.context_high_bytes) == (card.context_bytes, card.context_high_bytes)
    assert card.name in gpu.source


@pytest.mark.parametrize("text", ["24", "24G"])
def test_a_size_without_a_unit_is_refused_with_both_ways_to_write_it(text: str) -> None:
    with pytest.raises(UsageError, match="without a unit") as caught:
        find_gpu(text)
    assert "24GiB" in (caught.value.hint or "")
    assert "24GB" in (caught.value.hint or "")


def test_a_size_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="no memory"):
        find_gpu("0GiB")


def test_an_unknown_name_is_refused_with_the_nearest_and_the_hint_lists_all() -> None:
    with pytest.raises(UsageError, match="RTX 4090") as caught:
        find_gpu("RTX 4095")
    assert caught.value.exit_code == 2
    assert all(card.name in (caught.value.hint or "") for card in GPUS)


@pytest.mark.parametrize("text", ["", "MI300X", "RTX 4090 48GB", "4060 Ti 8GB"])
def test_a_card_outside_of_the_catalogue_is_refused_rather_than_guessed(text: str) -> None:
    with pytest.raises(UsageError, match="no GPU"):
        find_gpu(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_auto_without_a_gpu_is_an_error_with_a_hint() -> None:
    with pytest.raises(HardwareError, match="no NVIDIA GPU") as caught:
        find_gpu("auto")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "capability", "num_sms", "context_of"),
    [
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, "RTX 4090"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 108, "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, "H100 SXM"),
        ("NVIDIA GH200 480GB", (9, 0), 132, "H100 NVL"),
        ("NVIDIA GeForce RTX 4080 SUPER", (8, 9), 80, "RTX 4080"),
    ],
)
def test_auto_reads_the_gpu_of_this_machine_and_the_context_of_the_nearest_card(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], num_sms: int, context_of: str
) -> None:
    card = find_gpu(context_of)
    seen = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=num_sms,
        total_memory=card.total_bytes + MIB,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: seen)
    gpu = find_gpu("auto")
    assert (gpu.group, gpu.total_bytes) == ("this machine", card.total_bytes + MIB)
    assert (gpu.capability, gpu.num_sms, gpu.context_bytes) == (capability, num_sms, card.context_bytes)
    assert context_of in gpu.source


def test_a_card_is_found_without_torch() -> None:
    code = "import sys; from qlora_cli.memory.gpus import find_gpu; find_gpu('4090'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
