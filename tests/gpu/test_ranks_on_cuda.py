"""A run on two GPUs is that of one, over NCCL: with the whole base on each, and with a base that they share."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.integration.training.test_ranks import distance
from tests.support.models.loading import save_model
from tests.support.processes.killed_runs import metrics_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

SECONDS = 240.0
# Twelve rows, of which two are held out; in fp32, in which sums of two processes differ least from those of one.
FLAGS = (
    "--dtype=fp32",
    "--micro-batch-size=1",
    "--gradient-accumulation-steps=5",
    "--max-steps=4",
    "--eval-split=2",
    "--eval-steps=2",
    "--gradient-checkpointing=on",
)
SHARDED = ("--num-gpus=2", "--strategy=fsdp")
OFFLOADED = ("--num-gpus=2", "--offload-base")


def command(model: Path, rows: Path, run: Path, *flags: str) -> list[str]:
    given = (f"--model={model}", f"--dataset={rows}", f"--output={run}", *FLAGS, *flags)
    return [sys.executable, "-m", "qlora_cli", "train", *given]


def train(model: Path, rows: Path, run: Path, *flags: str) -> Path:
    """Train to the end, by the program itself and torch's launcher, and return the run."""
    arguments = command(model, rows, run, *flags)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    return run


def record_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize(
    "flags", [("--num-gpus=2", "--strategy=ddp"), SHARDED, OFFLOADED], ids=["ddp", "fsdp", "offloaded"]
)
def test_two_gpus_train_the_adapter_of_one(
    base_model: Path, rows: Path, tmp_path: Path, quant: str, flags: tuple[str, ...]
) -> None:
    one = train(base_model, rows, tmp_path / "one", f"--quant={quant}")
    two = train(base_model, rows, tmp_path / "two", f"--quant={quant}", *flags)
    assert record_of(two)["plan"]["num_devices"] == 2
    assert distance(two, one) < 1e-4
    steps, others = metrics_of(two), metrics_of(one)
    assert len(steps) == len(others) > 0
    for mine, its in zip(steps, others, strict=True):
        assert mine == pytest.approx(its, rel=1e-3)


def test_shards_that_wait_on_the_host_take_no_memory_of_the_gpu(rows: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=16, hidden_size=512, intermediate_size=4096)
    peaks = []
    for name, flags in (("sharded", SHARDED), ("offloaded", OFFLOADED)):
        run = train(model, rows, tmp_path / name, *flags, "--quant=none", "--rank=1", "--max-steps=1")
        peaks.append(record_of(run)["result"]["peak_memory"]["device_allocated_bytes"])
    of_layers = 16 * 4 * (4 * 512 * 512 + 3 * 512 * 4096)
    assert peaks[0] - peaks[1] > 0.4 * of_layers, "half of the layers, but for a copy of one of them"


@pytest.mark.parametrize("flags", [SHARDED, OFFLOADED], ids=["fsdp", "offloaded"])
def test_a_sharded_run_resumes_on_one_gpu(
    base_model: Path, rows: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    constant = "--schedule=constant"  # the same for a run of two steps
    one = train(base_model, rows, tmp_path / "one", constant)
    run = train(base_model, rows, tmp_path / "run", *flags, constant, "--max-steps=2")
    assert distance(run, one) > 1e-3
    assert distance(train(base_model, rows, run, constant), one) < 1e-4


def test_a_process_that_is_killed_ends_the_other_one(base_model: Path, rows: Path, tmp_path: Path) -> None:
    run, said = tmp_path / "run", tmp_path / "stderr"
    arguments = command(base_model, rows, run, *SHARDED, "--max-steps=100000", "--save-steps=2")
    with said.open("w") as stderr, subprocess.Popen(arguments, stderr=stderr) as launcher:
        until = time.monotonic() + SECONDS
        while not list(run.glob("checkpoints/step-*")):
            assert launcher.poll() is None, said.read_text()
            assert time.monotonic() < until, "nothing came"
            time.sleep(0.1)
        processes = psutil.Process(launcher.pid).children()
        assert len(processes) == 2
        processes[1].send_signal(signal.SIGKILL)
        assert launcher.wait(timeout=SECONDS) != 0
    assert "was killed by SIGKILL" in said.read_text()
    assert not psutil.wait_procs(processes, timeout=10)[1]
