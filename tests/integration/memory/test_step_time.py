"""The predicted time of a step: what makes it longer, what it is a sum of, and for which GPUs it is known."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_cli.memory.costs.step_time import rates_on, step_time
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.prediction import StepTime
from qlora_cli.memory.replaying.update_operations import update_operations
from qlora_cli.settings.choices import Optimizer
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.timing.rates import Rates
from qlora_cli.timing.rates_file import store_rates, store_run
from tests.support.models.tracing import deep_config

RTX_4090 = find_gpu("RTX 4090")
RATES = ("flops", "attention_flops", "fp32_flops", "num_bytes", "dequantized_bytes", "narrow_bytes")
WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    config = deep_config("llama", 4, **WIDE, head_dim=128)
    return Estimator(ModelFacts(name="wide", content={**config.to_dict(), "max_position_embeddings": 65_536}))


def settings_of(*, length: int = 4096, **training: object) -> EstimateSettings:
    return EstimateSettings.model_validate(
        {
            "model": {"name": "wide"},
            "data": {"max_length": length},
            "training": {"gradient_accumulation_steps": 4, **training},
        }
    )


def time_of(estimator: Estimator, *, gpu: Gpu = RTX_4090, length: int = 4096, **training: object) -> StepTime:
    time = estimator.estimate(settings_of(length=length, **training), gpu).time
    assert time is not None
    return time


def test_what_is_kept_is_not_computed_again_and_copies_to_the_host_take_longer(estimator: Estimator) -> None:
    seconds = [
        time_of(estimator, gradient_checkpointing=mode).step_seconds for mode in ("off", "selective", "on", "offload")
    ]
    assert seconds == sorted(seconds)
    assert seconds[0] < 0.85 * seconds[2]
    assert len(set(seconds)) == 4


def test_a_step_is_its_micro_batches_and_an_update(estimator: Estimator) -> None:
    time = time_of(estimator)
    assert time.step_seconds == pytest.approx(4 * time.micro_batch_seconds + time.update_seconds)
    assert time.tokens_per_second == pytest.approx(4 * 4096 / time.step_seconds)
    assert time.step_seconds_low < time.step_seconds < time.step_seconds_high
    assert time.tokens_per_second_low == pytest.approx(4 * 4096 / time.step_seconds_high)
    assert time.tokens_per_second_high == pytest.approx(4 * 4096 / time.step_seconds_low)
    assert time.device_seconds == pytest.approx(time.step_seconds)
    assert time.host_seconds < time.device_seconds
    twice = time_of(estimator, gradient_accumulation_steps=8)
    assert twice.step_seconds == pytest.approx(8 * time.micro_batch_seconds + time.update_seconds)


def test_short_rows_are_limited_by_the_host_and_long_ones_by_the_gpu(estimator: Estimator) -> None:
    short, long = (time_of(estimator, length=length) for length in (64, 32_768))
    assert (short.limited_by, long.limited_by) == ("host", "compute")
    assert short.step_seconds == pytest.approx(short.host_seconds, rel=0.1)
    assert short.tokens_per_second < long.tokens_per_second / 2


def test_a_faster_gpu_takes_less_time_and_a_size_of_memory_has_none(estimator: Estimator) -> None:
    times = [time_of(estimator, gpu=find_gpu(name)).step_seconds for name in ("L4", "RTX 4090", "H100 SXM")]
    assert times == sorted(times, reverse=True)
    assert estimator.estimate(settings_of(), find_gpu("24GB")).time is None


def test_a_gpu_that_was_measured_has_the_time_of_its_own_rates_and_a_tighter_band(
    estimator: Estimator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    by_data_sheet, of_card = time_of(estimator), rates_on(RTX_4090)
    assert of_card is not None
    here = replace(RTX_4090, name="the GPU of this machine", card="")
    assert estimator.estimate(settings_of(), here).time is None
    half: Rates = replace(of_card.rates, **{name: getattr(of_card.rates, name) / 2 for name in RATES})
    for gpu in (RTX_4090, here):
        store_rates(gpu.measured_as, "bf16", half)
        time = time_of(estimator, gpu=gpu)
        assert 1.5 * by_data_sheet.step_seconds < time.step_seconds <= 2 * by_data_sheet.step_seconds
        assert "measured on this machine on 2" in time.rates
        band, of_sheet = (each.step_seconds_high / each.step_seconds_low for each in (time, by_data_sheet))
        assert band < of_sheet
    assert by_data_sheet.rates == "data sheet"


@pytest.mark.parametrize(("length", "limit"), [(64, "host"), (4096, "device")])
def test_runs_here_correct_the_time_of_steps_that_the_same_limits_and_tighten_its_band(
    estimator: Estimator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, length: int, limit: str
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    before, longer = time_of(estimator, length=length), time_of(estimator, length=2 * length)
    other = time_of(estimator, length=64 if limit == "device" else 4096)
    assert before.key.limit == limit
    ratios = [1.30, 1.32, 1.28]
    for ratio in ratios:
        store_run(before.key, ratio)
    after = time_of(estimator, length=length)
    # What the other limit decides, such as the update, is as before.
    assert after.step_seconds == pytest.approx(1.3 * before.step_seconds, rel=0.05)
    assert after.micro_batch_seconds == pytest.approx(1.3 * before.micro_batch_seconds)
    assert (after.learnt_ratio, after.learnt_runs) == (1.3, 3)
    assert (before.learnt_ratio, before.learnt_runs) == (None, 0)
    bands = [time.step_seconds_high / time.step_seconds_low for time in (after, before)]
    assert max(ratios) / min(ratios) < bands[0] < bands[1]
    assert time_of(estimator, length=2 * length).micro_batch_seconds >= 1.25 * longer.micro_batch_seconds
    unchanged = time_of(estimator, length=64 if limit == "device" else 4096)
    assert unchanged.micro_batch_seconds == other.micro_batch_seconds
    assert unchanged.step_seconds_high == pytest.approx(1.3 * other.step_seconds, rel=0.1)
    assert time_of(estimator, length=length, fused_lora=False).learnt_ratio is None


def test_pinned_activations_cross_the_bus_twice() -> None:
    def time(gpu: Gpu) -> StepTime | None:
        return step_time((), (), gpu, num_micro_batches=2, num_tokens=1, pinned_host_bytes=24 * 10**9)

    of_copies = time(RTX_4090)
    assert of_copies is not None
    assert of_copies.step_seconds == pytest.approx(2 * 2)
    assert time(replace(RTX_4090, card="")) is None


def test_an_update_reads_and_writes_weights_gradients_and_states() -> None:
    shapes = ((16, 2048), (5632, 16))
    trained = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    num_values = sum(each.numel() for each in trained)

    def moved(optimizer: Optimizer) -> float:
        return sum(times * each.num_bytes for times, each in update_operations(optimizer, trained)) / num_values

    clipping = 3 * 4  # a norm, and a product with a factor
    assert moved(Optimizer.ADAMW_TORCH_FUSED) == clipping + 7 * 4
    assert moved(Optimizer.SGD) == clipping + 3 * 4
    assert moved(Optimizer.LION_32BIT) == clipping + 5 * 4
    assert moved(Optimizer.ADAMW_8BIT) == clipping + 3 * 4 + 2 * 2
    assert moved(Optimizer.ADAMW_TORCH) > moved(Optimizer.ADAMW_TORCH_FUSED) * 1.5
    assert moved(Optimizer.ADAFACTOR) > moved(Optimizer.ADAMW_8BIT)
