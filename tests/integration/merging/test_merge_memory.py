"""Merging takes bounded host memory, whatever the size of the checkpoint: measured on one of 0.8 GB.

What is promised is 1.5 GiB over the interpreter, if the largest tensor permits. This checkpoint is smaller than that,
so a quarter of it is allowed here: reading it as a whole takes more. Figures are shown by `pytest -s`.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load_case import STATUS
from benchmarks.merge_case import write_adapter
from benchmarks.synthetic import SHAPES, write_model
from qlora_cli.units import MIB
from tests.support.processes.forks import output_of

ALLOWED_BYTES = 160 * MIB
LIBRARY_BYTES = 256 * MIB  # files of the libraries, which are mapped

pytestmark = pytest.mark.skipif(
    not STATUS.exists() or "RssAnon" not in STATUS.read_text(encoding="ascii"),
    reason="needs Linux's count of anonymous memory",
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An adapter of rank 16 on a base of 0.8 GB, in a directory that is deleted afterwards."""
    directory = tmp_path_factory.mktemp("models")
    write_model(directory / "base", SHAPES["400m-large-vocabulary"], shard_bytes=256 * MIB)
    write_adapter(directory / "base", directory / "adapter")
    yield directory / "adapter"
    shutil.rmtree(directory)


def measure(adapter: Path, output: Path, base: str) -> dict[str, Any]:
    """Merge in a process of its own, which is forked, and return the memory and time that it took."""
    command = ["qlora", str(adapter), str(output), "--base", base]
    code, stdout, stderr = output_of(command, os.environ, module="benchmarks.merge_case")
    assert code == 0, stderr
    figures: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    peaks = [figures[name] / MIB for name in ("anonymous_bytes", "resident_bytes", "imports_host_bytes")]
    print(f"\n{base}: peak {peaks[0]:.0f} MiB, resident {peaks[1] - peaks[2]:.0f} MiB in {figures['seconds']:.1f} s")
    return figures


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_a_checkpoint_is_merged_in_a_quarter_of_its_size(adapter: Path, tmp_path: Path, base: str) -> None:
    base_files = list((adapter.parent / "base").glob("*.safetensors"))
    assert len(base_files) > 1
    assert sum(file.stat().st_size for file in base_files) >= 4 * ALLOWED_BYTES
    figures = measure(adapter, tmp_path / "merged", base)
    assert figures["num_merged_tensors"] == 7 * SHAPES["400m-large-vocabulary"].num_layers
    assert figures["num_samples"] > 100, "the peak was not watched"
    assert figures["anonymous_bytes"] <= ALLOWED_BYTES
    # What the process reports includes the interpreter and its libraries.
    assert figures["resident_bytes"] <= figures["imports_host_bytes"] + ALLOWED_BYTES + LIBRARY_BYTES
    written = {file.name: file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors")}
    assert written == {file.name: file.stat().st_size for file in base_files}
    shutil.rmtree(tmp_path / "merged")
