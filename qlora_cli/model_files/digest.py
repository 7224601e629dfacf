"""Digests of files: of an adapter by all its bytes, of a base without reading all of its weights."""

import hashlib
from pathlib import Path

from qlora_cli.model_files.adapter_files import ADAPTER_PICKLE, ADAPTER_WEIGHTS
from qlora_cli.model_files.checkpoint import INDEX_SUFFIX, read_weight_map, weights_entry

NUM_SAMPLES, SAMPLE_BYTES = 64, 16 * 1024


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapter_digest(adapter: Path) -> str:
    """Return the SHA-256 of an adapter's weights."""
    weights = adapter / ADAPTER_WEIGHTS
    return file_digest(weights if weights.is_file() else adapter / ADAPTER_PICKLE)


def base_digest(directory: Path) -> str:
    """Return a digest of a base from the names and sizes of its weight files and samples of their bytes.

    Reading all bytes would take minutes, and two models differ nearly everywhere.
    """
    digest = hashlib.sha256()
    for path in _weight_files(directory):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for sample in range(NUM_SAMPLES):
                file.seek(sample * max(0, size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    """Return the files that the model is loaded from, and no others that lie next to them."""
    entry = weights_entry([path.name for path in directory.iterdir()], allow_pickle=True)
    assert entry is not None, "a base has weights"
    if not entry.endswith(INDEX_SUFFIX):
        return [directory / entry]
    return [directory / name for name in sorted(set(read_weight_map(directory / entry).values()))]
