"""Record the context of every benchmark next to its numbers, as JSON lines: hardware, versions, revision."""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import qlora_cli

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")
NATIVE_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def versions() -> dict[str, str | None]:
    """Return the versions of this package, Python and the libraries; None for one that is not installed."""
    installed: dict[str, str | None] = {"qlora-cli": qlora_cli.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
    return installed


def cpu_hardware() -> dict[str, Any]:
    """Return processor, cores and memory, but not the name of the machine."""
    return {
        "cpu": _cpu_model(),
        "num_cpus": os.cpu_count(),
        "native_bf16": bool(NATIVE_BF16_FLAGS & _cpu_flags()),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    match = re.search(rf"^{key}\s*:\s*(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1) if match else ""


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set(_cpu_info("flags").split())


def revision() -> str | None:
    """Return the commit of this checkout, with `+changes` if it has any; None outside of git."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return None
    commit = _git_output(git, "rev-parse", "HEAD")
    changes = _git_output(git, "status", "--porcelain", "--", "qlora_cli", "benchmarks/*.py")
    return f"{commit}+changes" if commit and changes else commit


def _git_output(git: str, *arguments: str) -> str | None:
    done = subprocess.run([git, "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def now() -> str:
    """Return the time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def results_file(directory: Path, name: str) -> Path:
    """Return `directory/name-YYYY-MM-DD.jsonl`, with `name` made suitable for a file name."""
    slug = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
    return directory / f"{slug}-{datetime.now(UTC):%Y-%m-%d}.jsonl"


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line to a results file; it is on the disk when this returns, whatever ends the process next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Return the records of results files; a line that was not written to its end is passed over."""
    for path in paths:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                yield json.loads(line)
