"""How often the rows of each of several data sets are fed: by weights, or by probabilities."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from qlora_cli.data.feeding.token_table import Numbers
from qlora_cli.data.finding.sources import MAX_WEIGHT, DatasetSource
from qlora_cli.errors import DataError
from qlora_cli.settings.choices import Mixing


def mix(rows: Numbers, place: Numbers, sources: Sequence[DatasetSource], mixing: Mixing, seed: int) -> Numbers:
    """Return the rows, each as often as it is fed; `place` is that of their data set among `sources`, int64 `(rows,)`.

    A fraction of a data set is a sample that is drawn by `seed`.

    Raises:
        DataError: a data set that is mixed by its probability has no row, or would be repeated too often.
    """
    weights = [source.weight for source in sources]
    own = [rows[place == number] for number in range(len(sources))]
    if mixing != Mixing.WEIGHTS:
        weights = _by_probability(sources, [len(part) for part in own], mixing)
    chance = np.random.default_rng(seed)
    found = []
    for part, weight in zip(own, weights, strict=True):
        whole, rest = divmod(weight, 1)
        found += [part] * int(whole)
        found.append(np.sort(chance.permutation(part)[: round(rest * len(part))]))
    return np.concatenate(found)


def _by_probability(sources: Sequence[DatasetSource], num_rows: Sequence[int], mixing: Mixing) -> list[Fraction]:
    """Return how often each data set is fed, so that its share of all rows is that of its weight.

    The number of all rows is that at which the first data set is exhausted, or the last one; `datasets` calls its
    stopping strategies so in `interleave_datasets`, which draws row by row.
    """
    for source, number in zip(sources, num_rows, strict=True):
        if not number:
            raise DataError(
                f"no row of {source.name} can be trained, so it can't be mixed by its probability",
                hint="Leave it out, or look at it with: qlora inspect-data",
            )
    exhausted = [number / source.weight for source, number in zip(sources, num_rows, strict=True)]
    total = min(exhausted) if mixing == Mixing.FIRST_EXHAUSTED else max(exhausted)
    weights = [total * source.weight / number for source, number in zip(sources, num_rows, strict=True)]
    most = max(range(len(sources)), key=weights.__getitem__)
    if weights[most] > MAX_WEIGHT:
        raise DataError(
            f"each row of {sources[most].name} would be fed {float(weights[most]):,.0f} times until all data sets are "
            f"exhausted, more than {MAX_WEIGHT:,}",
            hint="Use --mixing first_exhausted, or give it a smaller weight.",
            setting="data.mixing",
        )
    return weights
