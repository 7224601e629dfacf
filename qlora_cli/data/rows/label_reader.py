"""Read a row of one answer and a label, which says whether the answer is wanted."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_cli.data.rows.column_formats import LABEL_PART, RowLayout
from qlora_cli.data.rows.examples import Labelled, RowError, json_type_of
from qlora_cli.data.rows.row_reader import RowReader
from qlora_cli.settings.choices import LossOn
from qlora_cli.settings.objectives import DataFormat

# As text, CSV has nothing else; the numbers are those of LLaMA-Factory's and many other data sets.
MEANINGS = {"true": True, "false": False, "1": True, "0": False}


class LabelReader(RowReader):
    """Reads rows of an answer and its label.

    The label is of the last answer of a conversation, before which others are context; of a completion that is given
    apart from its prompt, it is of all its messages.
    """

    def __init__(self, layout: RowLayout, loss_on: LossOn, *, use_chat: bool) -> None:
        answers = layout.answer_format
        judged = loss_on if answers == DataFormat.PROMPT_COMPLETION else LossOn.LAST
        super().__init__(replace(layout, format=answers), judged, use_chat=use_chat)

    def read_labelled(self, row: Mapping[str, Any]) -> Labelled:
        """Return `row` as an answer with a label.

        Raises:
            RowError: a part is missing, empty or of the wrong type, or the label means neither.
        """
        is_desirable = self._label(self._value(row, LABEL_PART))
        return Labelled(answer=self.read(row), is_desirable=is_desirable)

    def _label(self, value: object) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, int | float) and value in (0, 1):
            return bool(value)
        if isinstance(value, str) and (meant := MEANINGS.get(value.strip().lower())) is not None:
            return meant
        found = repr(value) if isinstance(value, str | int | float) else json_type_of(value)
        column = self._layout.columns[LABEL_PART]
        raise RowError(
            f"{column!r} must be true if the answer is wanted, and false if not; found {found}",
            hint="Correct it, name another column with --columns label=NAME, or leave such rows out "
            "(--on-bad-row skip).",
        )
