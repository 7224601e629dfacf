"""Mix data sets: decide how often the rows of each are fed, by weights or by probabilities."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from qlora_cli.data.feeding.token_table import Numbers
from qlora_cli.data.finding.sources import MAX_WEIGHT, DatasetSource
from qlora_cli.errors import DataError
from qlora_cli.settings.choices import Mixing


def mix(rows: Numbers, source_index: Numbers, sources: Sequence[DatasetSource], mixing: Mixing, seed: int) -> Numbers:
    """Return the rows, each repeated as often as it is fed; a fraction of a data set is sampled by `seed`.

    `source_index`, int64 `(rows,)`, is the index of each row's data set among `sources`.

    Raises:
        DataError: a data set that is mixed by probability has no rows, or would be repeated too often.
    """
    weights = [source.weight for source in sources]
    rows_of_source = [rows[source_index == number] for number in range(len(sources))]
    if mixing != Mixing.WEIGHTS:
        weights = _by_probability(sources, [len(part) for part in rows_of_source], mixing)
    rng = np.random.default_rng(seed)
    repeated = []
    for part, weight in zip(rows_of_source, weights, strict=True):
        num_copies, fraction = divmod(weight, 1)
        repeated += [part] * int(num_copies)
        repeated.append(np.sort(rng.permutation(part)[: round(fraction * len(part))]))
    return np.concatenate(repeated)


def _by_probability(sources: Sequence[DatasetSource], num_rows: Sequence[int], mixing: Mixing) -> list[Fraction]:
    """Return how often to feed each data set for its share of all rows to equal its share of the weights.

    The total is reached when the first data set is exhausted, or the last one, like the stopping strategies of
    `datasets.interleave_datasets`, which draws row by row.
    """
    for source, number in zip(sources, num_rows, strict=True):
        if not number:
            raise DataError(
                f"no row of {source.name} can be trained, so it can't be mixed by probability",
                hint="Leave it out, or look at it with: qlora inspect-data",
            )
    exhausted = [number / source.weight for source, number in zip(sources, num_rows, strict=True)]
    total = min(exhausted) if mixing == Mixing.FIRST_EXHAUSTED else max(exhausted)
    weights = [total * source.weight / number for source, number in zip(sources, num_rows, strict=True)]
    most_repeated = max(range(len(sources)), key=weights.__getitem__)
    if weights[most_repeated] > MAX_WEIGHT:
        raise DataError(
            f"each row of {sources[most_repeated].name} would be fed {float(weights[most_repeated]):,.0f} times "
            f"until all data sets are exhausted, more than {MAX_WEIGHT:,}",
            hint="Use --mixing first_exhausted, or give it a smaller weight.",
            setting="data.mixing",
        )
    return weights
