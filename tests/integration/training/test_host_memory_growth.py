"""On a CPU, batches of ever new shapes take bounded memory: few compiled kernels are cached, freed pages returned."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from qlora_cli.cli.app import CACHED_KERNELS
from qlora_cli.hardware.heap import return_freed_memory
from qlora_cli.training.callbacks import heap_trimming
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, train_settings

# The products of a layer with LoRA, forward and backward, for 60 numbers of tokens; prints MiB of growth, after what
# `qlora --version` sets.
PRODUCTS = """
import contextlib, sys
from qlora_cli.cli.app import main
is_trimmed = sys.argv[1] == "trimmed"
sys.argv = ["qlora", "--version"]
with contextlib.suppress(SystemExit):
    main()
import psutil, torch
from qlora_cli.hardware.heap import return_freed_memory
shapes = (256, 256), (128, 256), (704, 256), (256, 704), (16, 256), (16, 704), (256, 16), (704, 16)
weights = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
def products(num_tokens):
    for weight in weights:
        inputs = torch.randn(num_tokens, weight.shape[1], dtype=torch.bfloat16)
        outputs = inputs @ weight.T
        outputs @ weight, outputs.T @ inputs
process = psutil.Process()
products(2048)
before = process.memory_info().rss
for index in range(60):
    products(80 + 31 * index)
    if is_trimmed and index % 20 == 19:
        return_freed_memory()
print((process.memory_info().rss - before) >> 20)
"""


def printed_by(script: str, *arguments: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN_")}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(not has_avx512bf16(), reason="bf16 is multiplied without compiled kernels here")
def test_products_of_ever_new_shapes_leave_half_of_what_they_would() -> None:
    bounded = int(printed_by(PRODUCTS, "trimmed"))
    unbounded = int(printed_by(PRODUCTS, "untrimmed", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024"))
    assert bounded < unbounded / 2


def test_a_limit_that_a_user_sets_is_left_alone() -> None:
    script = "import os, sys; from qlora_cli.cli.app import main; sys.argv = ['qlora', '--version']\ntry: main()\n"
    script += "except SystemExit: pass\nprint(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    assert printed_by(script) == CACHED_KERNELS
    assert printed_by(script, ONEDNN_PRIMITIVE_CACHE_CAPACITY="7") == "7"


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc needs to be asked")
def test_freed_memory_below_a_block_in_use_is_returned() -> None:
    blocks = [torch.ones(2**16) for _ in range(2000)]  # 256 KiB each: in the heap, once one of that size was freed
    del blocks
    blocks = [torch.ones(2**16) for _ in range(2000)]
    last = blocks[-1]
    del blocks
    before = psutil.Process().memory_info().rss
    return_freed_memory()
    assert before - psutil.Process().memory_info().rss > 300 << 20
    assert float(last.sum()) == 2**16


@pytest.mark.parametrize(("num_rows_at_once", "expected"), [(1, 2), (2, 1)])
def test_training_on_a_cpu_returns_memory_by_the_number_of_micro_batches(
    base_model: Path, rows: Path, tmp_path: Path, num_rows_at_once: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[int] = []
    monkeypatch.setattr(heap_trimming, "BATCHES_BETWEEN", 5)
    monkeypatch.setattr(heap_trimming, "return_freed_memory", lambda: returned.append(1))
    changed: dict[str, object] = {
        "training__micro_batch_size": num_rows_at_once,
        "training__gradient_accumulation_steps": 4 // num_rows_at_once,
        "training__max_steps": 3,
    }
    train(train_settings(base_model, rows, tmp_path / "run", **changed), Recorder())
    assert len(returned) == expected
