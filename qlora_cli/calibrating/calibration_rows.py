"""Choose the rows that a base is calibrated on, from prepared data."""

from dataclasses import dataclass

import numpy as np
import torch

from qlora_cli.data.feeding.prepare import PreparedData, prepare_data
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.settings.choices import OnBadRow
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.values import Datasets
from qlora_cli.units import counted

# Enough that no feature of the widest layer is known from a handful of tokens: GPTQ's own runs have 18.
TOKENS_PER_FEATURE = 8
SEED = 0


@dataclass(frozen=True, kw_only=True)
class CalibrationRows:
    """Rows of token ids, `(seq,)` each, of the data sets `names`; `fingerprint` is that of all their rows."""

    rows: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all rows."""
        return sum(map(len, self.rows))


def read_rows(names: Datasets, load_plan: LoadPlan, num_tokens: int, reporter: Reporter) -> CalibrationRows:
    """Read data sets as training would, and return rows with at least `num_tokens`, or all.

    Raises:
        DatasetNotFoundError: no such data set.
        DataError: it can't be read, or has no row that can be used.
    """
    reporter.report(PhaseStarted(title=f"Reading {', '.join(names)}"))
    settings = DataSettings(dataset=names, on_bad_row=OnBadRow.SKIP)
    tokenizer = load_plan.tokenizer
    text = TextTokenizer(tokenizer=tokenizer.tokenizer, end_ids=tokenizer.end_ids, reporter=reporter)
    data = prepare_data(settings, text, seed=SEED).train
    if data.report.bad_rows:
        message = f"{counted(data.report.bad_rows, 'row')} can't be used, and are left out of the calibration"
        reporter.report(Noted(level="warning", message=message))
    return chosen_rows(data, names, num_tokens)


def chosen_rows(data: PreparedData, names: Datasets, num_tokens: int) -> CalibrationRows:
    """Return rows of `data` with at least `num_tokens`, or all: every one is as likely, and the same each time."""
    order = np.random.default_rng(SEED).permutation(len(data.dataset))
    before = np.cumsum(data.lengths[order]) - data.lengths[order]
    chosen = order[before < num_tokens]
    rows = tuple(torch.tensor(data.dataset[int(index)]["input_ids"], dtype=torch.long) for index in chosen)
    return CalibrationRows(rows=rows, names=tuple(names), fingerprint=data.report.fingerprint)


def tokens_needed(load_plan: LoadPlan) -> int:
    """Return the tokens that suffice for the widest layer of the model of `load_plan`."""
    widths = [
        load_plan.shapes.get_parameter(entry.name).shape[-1]
        for entry in load_plan.layout.inventory.entries
        if entry.is_quantized
    ]
    return TOKENS_PER_FEATURE * max(widths)
