"""The catalogue of GPUs: plausible numbers, and one card or an error with a hint for anything a user types."""

import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from qlora_cli.errors import HardwareError, UsageError
from qlora_cli.memory.gpu_rows import COMMON, NOTES, OLDER, OOM, PROPERTIES, SMI
from qlora_cli.memory.gpus import GPUS, Gpu, classes, examples, find_gpu
from qlora_cli.units import GIB, MIB


def test_the_catalogue_has_every_group_and_no_duplicate_name() -> None:
    assert len(GPUS) >= 65
    assert max(Counter(card.name for card in GPUS).values()) == 1
    assert {card.group for card in GPUS} == {"consumer", "workstation", "data-centre"}


def test_the_catalogue_is_sorted_by_memory_then_name_within_a_group() -> None:
    for group in {card.group for card in GPUS}:
        keys = [(card.total_bytes, card.name) for card in GPUS if card.group == group]
        assert keys == sorted(keys)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda card: card.name)
def test_the_numbers_of_a_card_are_plausible(gpu: Gpu) -> None:
    assert 5 * GIB < gpu.total_bytes < 288 * GIB
    assert gpu.usable_bytes == gpu.total_bytes
    assert (6, 0) <= gpu.capability <= (12, 1)
    assert 10 <= gpu.num_sms <= 188
    assert 64 * MIB <= gpu.context_bytes <= gpu.context_high_bytes <= GIB
    assert gpu.source in (OOM, PROPERTIES, SMI, OLDER)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda card: card.name)
def test_pytorch_sees_a_little_less_than_the_marketing_size(gpu: Gpu) -> None:
    assert 0.90 <= gpu.total_bytes / (gpu.size_gb * GIB) <= 1.01
    assert gpu.name.endswith(f" {gpu.size_gb}GB") or not gpu.name.endswith("GB")


def test_the_common_cards_are_in_the_catalogue() -> None:
    names = [card.name for card in GPUS]
    assert [name for name in (*COMMON, *NOTES) if name not in names] == []
    assert len(set(COMMON)) == len(COMMON)


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
        ("NVIDIA GeForce RTX 4080 SUPER", "RTX 4080 Super"),
        ("4060ti 8gb", "RTX 4060 Ti 8GB"),
        ("NVIDIA H800", "H100 PCIe"),
        ("NVIDIA A800-SXM4-80GB", "A100 80GB"),
        ("DGX Spark", "GB10"),
        ("B200 192GB", "B200"),
        ("1080ti", "GTX 1080 Ti"),
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
        ("24564MiB", 24564 * MIB),
        ("24000MB", 24 * 10**9),
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


def test_a_size_takes_its_kernels_from_a_card_that_pytorch_has_kernels_for() -> None:
    assert "P100" not in find_gpu("16GiB").source
    assert find_gpu("16GiB").has_kernels


@pytest.mark.parametrize("text", ["24GB", "24 gb", " 24GB "])
def test_a_class_is_safe_for_each_of_its_cards(text: str) -> None:
    gpu = find_gpu(text)
    cards = [card for card in GPUS if card.size_gb == 24 and card.has_kernels]
    assert (gpu.name, gpu.group) == ("24 GB card", "as asked")
    assert set(gpu.cards) == {card.name for card in cards}
    assert gpu.cards[:4] == ("RTX 3090", "RTX 4090", "L4", "A10G")
    assert gpu.total_bytes == min(card.total_bytes for card in cards) == find_gpu("L4").total_bytes
    assert gpu.context_bytes == max(card.context_bytes for card in cards)
    assert gpu.context_high_bytes == max(card.context_high_bytes for card in cards)
    assert gpu.capability == find_gpu("L4").capability
    assert gpu.note == "kernels are those of the L4; older ones (Titan RTX) may take more"


def test_the_classes_rise_and_have_every_card_with_kernels() -> None:
    sizes = [gpu.size_gb for gpu in classes()]
    assert sizes == sorted(set(sizes))
    assert {8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141, 180} <= set(sizes)
    named = [name for gpu in classes() for name in gpu.cards]
    assert sorted(named) == sorted(card.name for card in GPUS if card.has_kernels)
    assert [gpu.name for gpu in classes()] == [find_gpu(f"{gpu.size_gb}GB").name for gpu in classes()]


def test_a_class_goes_by_its_other_size_too() -> None:
    assert find_gpu("192GB") == find_gpu("180GB")
    assert find_gpu("180GB").cards == ("B200",)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("28GB", "there are 24 GB cards (RTX 3090, RTX 4090, L4, ...) and 32 GB cards (RTX 5090", "24GB or 32GB"),
        ("7.5GB", "there are 6 GB cards (RTX 2060 6GB) and 8 GB cards", "7.5GiB"),
        ("500GB", "there are 288 GB cards (B300)", "288GB"),
        ("0GB", "there are 6 GB cards", "6GB"),
    ],
)
def test_a_size_that_no_card_is_sold_with_is_refused_with_the_nearest(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match="no card is sold with") as caught:
        find_gpu(text)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_few_names_stand_for_many() -> None:
    assert examples(["A"]) == "A"
    assert examples(["A", "B", "C"]) == "A, B, C"
    assert examples(["A", "B", "C", "D"]) == "A, B, C, ..."


@pytest.mark.parametrize(("text", "note"), [("P40", "6.1: install a build for CUDA 12"), ("GB10", "shared with the")])
def test_what_a_card_needs_besides_memory_is_noted(text: str, note: str) -> None:
    assert note in find_gpu(text).note
    assert find_gpu("RTX 4090").note == ""


@pytest.mark.parametrize("text", ["24", "24G"])
def test_a_size_without_a_unit_is_refused_with_both_ways_to_write_it(text: str) -> None:
    with pytest.raises(UsageError, match="without a unit") as caught:
        find_gpu(text)
    assert "24GiB" in (caught.value.hint or "")
    assert "24GB" in (caught.value.hint or "")


def test_a_size_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="no memory"):
        find_gpu("0GiB")


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("RTX 4095", ["RTX 4090", "RTX 4080"]),
        ("5090 Ti", ["RTX 5090", "RTX 5070 Ti"]),
        ("h101", ["H100 SXM", "H100 PCIe"]),
        ("RTX 309", ["RTX 3090"]),
        ("A6000 Ada", ["RTX 6000 Ada", "RTX A6000"]),
    ],
)
def test_an_unknown_name_is_refused_with_the_five_nearest(text: str, nearest: list[str]) -> None:
    with pytest.raises(UsageError, match="the nearest known are") as caught:
        find_gpu(text)
    named = caught.value.message.partition("the nearest known are ")[2].split(", ")
    assert named[: len(nearest)] == nearest
    assert len(named) == 5
    assert caught.value.exit_code == 2
    assert "--gpu list" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["list", "?"])
def test_all_cards_are_named_when_asked_for(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_gpu(text)
    assert [card.name for card in GPUS if card.name not in (caught.value.hint or "")] == []


@pytest.mark.parametrize(
    ("text", "one", "number"),
    [
        ("2x24GB", "24GB", 2),
        ("2x RTX 4090", "RTX 4090", 2),
        ("RTX 4090 x4", "RTX 4090", 4),
        ("4090x2", "4090", 2),
        ("8 * H100", "H100", 8),
        ("2\u00d7T4", "T4", 2),
    ],
)
def test_several_gpus_are_refused_with_the_one_to_name(text: str, one: str, number: int) -> None:
    with pytest.raises(UsageError, match="names several GPUs") as caught:
        find_gpu(text)
    assert f"--gpu '{one}' --num-gpus {number}" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["MI300X", "AMD Instinct MI250", "RX 7900 XTX", "Radeon Pro W7900"])
def test_amd_gpus_are_not_predicted(text: str) -> None:
    with pytest.raises(UsageError, match="is an AMD GPU") as caught:
        find_gpu(text)
    assert "AMD GPUs are not predicted" in (caught.value.hint or "")


def test_a_laptop_gpu_is_not_taken_for_the_desktop_card() -> None:
    with pytest.raises(UsageError, match="no laptop GPU") as caught:
        find_gpu("NVIDIA GeForce RTX 4090 Laptop GPU")
    assert "8GB" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "RTX 4090 48GB", "GTX 1060"])
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
        ("NVIDIA GeForce RTX 4090 D", (8, 9), 114, "RTX 4090"),
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
