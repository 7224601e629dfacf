"""Which rows of a data set are its sample."""

import numpy as np
from numpy.typing import NDArray

from qlora_cli.data.finding.sources import DatasetSource
from qlora_cli.errors import DataError
from qlora_cli.units import counted


def choose(source: DatasetSource, num_present: int, seed: int) -> NDArray[np.int64]:
    """Return the indices of the sample that `source` asks for, `(num_rows,)`, rising; of one seed always the same.

    Raises:
        DataError: it asks for more rows than there are.
    """
    assert source.num_rows is not None
    if source.num_rows > num_present:
        raise too_few(source, num_present)
    chosen = np.random.default_rng(seed).choice(num_present, source.num_rows, replace=False, shuffle=False)
    return np.sort(chosen.astype(np.int64))


def too_few(source: DatasetSource, num_present: int) -> DataError:
    """Return the error for a sample that is larger than its data set."""
    return DataError(
        f"{source.name} asks for {counted(source.num_rows or 0, 'row')}, and has {counted(num_present, 'row')}",
        hint=f"Ask for fewer, or for all: leave #{source.num_rows} out.",
    )
