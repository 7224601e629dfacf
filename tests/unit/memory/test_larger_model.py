"""A larger model is proposed only where its preset fits: on a card of as much memory, that computes in bf16."""

from dataclasses import replace

import pytest

from qlora_cli.memory.catalogue import find_in_catalogue
from qlora_cli.memory.fitting.alternatives import CLEARLY_LARGER, larger_model
from qlora_cli.memory.gpus import AMPERE, GPUS, Gpu, classes, find_gpu
from qlora_cli.memory.report_parts import LargerModel
from qlora_cli.settings.files.preset_files import presets

BILLION = 10**9
LENGTHS = (128, 2048, 8192)
NEW_ENOUGH = [gpu for gpu in (*GPUS, *classes(AMPERE)) if gpu.capability >= AMPERE]


def parameters(model: LargerModel | None) -> int:
    return 0 if model is None else model.num_parameters


@pytest.mark.parametrize("gpu", NEW_ENOUGH, ids=lambda gpu: gpu.name)
def test_what_is_proposed_is_larger_fits_and_trains_on_as_long_rows(gpu: Gpu) -> None:
    of_name = {preset.name: preset for preset in presets()}
    for num_parameters in (0, BILLION // 2, 8 * BILLION, 14 * BILLION, 70 * BILLION):
        for max_length in LENGTHS:
            model = larger_model(gpu, num_parameters, max_length)
            if model is None:
                continue
            preset = of_name[model.preset]
            named = find_in_catalogue(preset.model)
            assert named is not None
            assert named.num_parameters == model.num_parameters >= CLEARLY_LARGER * num_parameters
            assert model.process_high_bytes == preset.predicted_bytes <= gpu.usable_bytes
            assert preset.usable_bytes <= gpu.usable_bytes
            assert model.max_length_tokens == preset.max_length_tokens >= max_length


@pytest.mark.parametrize("max_length", LENGTHS)
def test_more_memory_never_proposes_a_smaller_model(max_length: int) -> None:
    by_memory = sorted(NEW_ENOUGH, key=lambda gpu: gpu.usable_bytes)
    sizes = [parameters(larger_model(gpu, BILLION // 2, max_length)) for gpu in by_memory]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 60 * BILLION


def test_nothing_is_proposed_where_nothing_is_known_to_fit() -> None:
    card = find_gpu("RTX 4090")
    assert larger_model(card, BILLION, 2048) is not None
    assert larger_model(replace(card, capability=(7, 5)), BILLION, 2048) is None  # computes in fp16
    assert larger_model(replace(card, total_bytes=4 * BILLION), BILLION, 2048) is None
    assert larger_model(card, 70 * BILLION, 2048) is None
    assert larger_model(card, BILLION, 100_000) is None
