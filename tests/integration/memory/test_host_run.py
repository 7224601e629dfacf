"""A run on this machine's CPU as it is predicted: with the memory of the host, and with time once it was measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import this_cpu
from qlora_cli.memory.host_run import HOW_TO_MEASURE, on_cpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.timing.rates import rates_of
from qlora_cli.timing.rates_file import store_rates
from tests.conftest import ASSETS, RunQlora, write_jsonl

BASE = str(ASSETS / "base")
LENGTH = ("--max-length", "128", "--dtype", "fp32")


def store_speed(dtype: str) -> None:
    """Store rates of this CPU, as if they were measured."""
    rates = rates_of("T4", 1)
    assert rates is not None
    store_rates(this_cpu().measured_as, dtype, replace(rates, watts=0, is_host=True))


def test_memory_is_that_of_the_host_and_time_is_known_once_it_was_measured(
    run_qlora: RunQlora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    asked = ("inspect-memory", BASE, *LENGTH, "--gpu", "auto", "--rows", "64", "--json")
    without_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    done = run_qlora(*asked, env=without_gpu)
    assert done.code == 0, done.stderr
    report, figures = done.json, done.json["predicted"]
    assert report["gpu"] == this_cpu().name
    assert (report["dtype"], report["settings"]["gradient-checkpointing"]) == ("fp32", "off")
    for end in ("", "_low", "_high"):
        assert figures[f"host_bytes{end}"] == figures[f"process{end}_bytes"]
    assert figures["process_low_bytes"] < figures["process_bytes"] < figures["process_high_bytes"]
    assert sum(report["components"].values()) == figures["process_bytes"]
    assert (figures["step_seconds"], figures["run_seconds"]) == (None, None)
    assert any(HOW_TO_MEASURE in sentence for sentence in report["assumptions"])
    assert [report[key] for key in ("plan", "smallest_gpu", "smallest_class", "unquantized")] == [None] * 4
    assert [(fit["gpu"], fit["fits"]) for fit in report["fits"]] == [(this_cpu().name, "yes")]

    store_speed("bf16")
    assert run_qlora(*asked, env=without_gpu).json["predicted"]["step_seconds"] is None
    store_speed("fp32")
    timed = run_qlora(*asked, env=without_gpu).json
    assert 0 < timed["predicted"]["step_seconds"] < timed["predicted"]["run_seconds"]
    assert not any(HOW_TO_MEASURE in sentence for sentence in timed["assumptions"])


def test_the_peak_of_a_run_lies_in_the_band_of_its_prediction(run_qlora: RunQlora, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "word " * 300}] * 4)
    settings = ("--max-length", "256", "--dtype", "fp32", "--micro-batch-size", "4", "--accept-lost")
    output = ("--output", tmp_path / "run", "--set", "training.max_steps=2", "--json")
    trained = run_qlora("train", "--model", BASE, "--dataset", rows, *settings, "--device", "cpu", *output)
    assert trained.code == 0, trained.stderr
    measured = trained.json["peak_memory"]["host_bytes"]
    asked = ("inspect-memory", BASE, *settings[:-1], "--gpu", "cpu", "--json")
    figures = run_qlora(*asked, env={"QLORA_CACHE": str(tmp_path)}).json["predicted"]
    assert figures["host_bytes_low"] < measured < figures["host_bytes_high"], measured


def test_weights_that_no_kernel_of_a_cpu_takes_stay_in_16_bit_there() -> None:
    # 100 inputs fill no block of 64: the kernel for a CPU multiplies whole blocks (decision 22).
    content = {**json.loads((ASSETS / "base" / "config.json").read_text(encoding="utf-8")), "intermediate_size": 100}
    settings = EstimateSettings.model_validate({"model": {"name": "odd", "dtype": "fp32"}, "data": {"max_length": 64}})

    def quantized_bytes(*, on_host: bool) -> int:
        estimator = Estimator(ModelFacts(name="odd", content=content), on_host=on_host)
        return estimator.estimate(on_cpu(settings), this_cpu()).components.quantized_weights_bytes

    assert 0 < quantized_bytes(on_host=True) < quantized_bytes(on_host=False)
