"""Draw the random sample of rows that a data set's name asks for."""

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.finding.sources import DatasetSource
from qlora_cli.errors import DataError
from qlora_cli.units import counted


def sample_indices(source: DatasetSource, num_available: int, seed: int) -> NDArray[np.int64]:
    """Return the ascending indices of the sample that `source` asks for, `(num_rows,)`; deterministic for a seed.

    Raises:
        DataError: it asks for more rows than there are.
    """
    assert source.num_rows is not None
    if source.num_rows > num_available:
        raise too_few_rows(source, num_available)
    chosen = np.random.default_rng(seed).choice(num_available, source.num_rows, replace=False, shuffle=False)
    return np.sort(chosen.astype(np.int64))


def too_few_rows(source: DatasetSource, num_available: int) -> DataError:
    """Return the error for a sample that is larger than its data set."""
    return DataError(
        f"{source.name} asks for {counted(source.num_rows or 0, 'row')}, but has {counted(num_available, 'row')}",
        hint=f"Ask for fewer, or for all: leave #{source.num_rows} out.",
    )
