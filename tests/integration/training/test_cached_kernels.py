"""On a CPU, products of ever new shapes take bounded memory: the command limits what oneDNN caches."""

import os
import subprocess
import sys

import pytest
from bitsandbytes.functional import has_avx512bf16

from qlora_cli.cli.app import CACHED_KERNELS

# The products of a layer with LoRA, forward and backward, for 60 numbers of tokens; prints MiB of growth, after what
# `qlora --version` sets.
PRODUCTS = """
import contextlib, sys
from qlora_cli.cli.app import main
sys.argv = ["qlora", "--version"]
with contextlib.suppress(SystemExit):
    main()
import psutil, torch
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
print((process.memory_info().rss - before) >> 20)
"""


def growth_mib(**variables: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN_")}
    command = [sys.executable, "-c", PRODUCTS]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not has_avx512bf16(), reason="bf16 is multiplied without compiled kernels here")
def test_rows_of_ever_new_lengths_take_much_less_memory_than_without_a_limit() -> None:
    limited, unlimited = growth_mib(), growth_mib(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
    assert limited < 0.75 * unlimited


def test_a_limit_that_a_user_sets_is_left_alone() -> None:
    script = "import os, sys; from qlora_cli.cli.app import main; sys.argv = ['qlora', '--version']\ntry: main()\n"
    script += "except SystemExit: pass\nprint(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    for given, expected in (({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, "7"), ({}, CACHED_KERNELS)):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN_")}
        done = subprocess.run(
            [sys.executable, "-c", script], env={**environment, **given}, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == expected
