"""The free memory of the host, also in a container."""

from pathlib import Path

import psutil
import pytest
import torch

from qlora_cli.quantization import memory_check
from qlora_cli.quantization.memory_check import CgroupFiles, free_bytes

CPU = torch.device("cpu")


def limit(directory: Path, most: str) -> CgroupFiles:
    """Return a control group that uses 3 GiB, 1 GiB of it page cache."""
    files = {"max": most, "current": str(3 * 1024**3), "stat": f"anon 1\ninactive_file {1024**3}"}
    for name, content in files.items():
        (directory / name).write_text(content + "\n")
    return CgroupFiles(directory / "max", directory / "current", directory / "stat", "inactive_file")


def test_the_limit_of_a_container_counts_and_its_page_cache_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "CGROUP_FILES", (limit(tmp_path, str(2 * 1024**3 + 4096)),))
    assert free_bytes(CPU) == 4096
    monkeypatch.setattr(memory_check, "CGROUP_FILES", (limit(tmp_path, str(1024**3)),))
    assert free_bytes(CPU) == 0


def test_without_a_limit_the_memory_of_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = tmp_path / "none"
    for limits in ((), (limit(tmp_path, "max"),), (CgroupFiles(none, none, none, "inactive_file"),)):
        monkeypatch.setattr(memory_check, "CGROUP_FILES", limits)
        assert abs(free_bytes(CPU) - psutil.virtual_memory().available) < 1024**3
