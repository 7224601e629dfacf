"""Refuse rows that say more than their text does: preferences, verdicts, pictures. Hints are flags that were tried."""

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from qlora_cli.data.limits import join_names
from qlora_cli.data.rows.column_formats import ALSO_ASKED, OPTIONAL, PARTS, RowLayout, recognise
from qlora_cli.data.rows.examples import Conversation, RowError, Unreadable, is_blank
from qlora_cli.data.rows.messages import is_media
from qlora_cli.data.rows.row_reader import RowReader
from qlora_cli.data.rows.special_columns import (
    HISTORY,
    better_answer_columns,
    comparison_columns,
    find_media_column,
    find_verdict,
    may_change_meaning,
    placeholder_in,
)
from qlora_cli.data.rows.train_switches import row_switch
from qlora_cli.errors import DataError
from qlora_cli.settings.choices import DataFormat
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.settle import with_values

ASKING = ("prompt", "question", "query", "problem", "instruction", "messages", "conversations", "conversation")
NOT_HERE = "this is for training by comparison (DPO), not for fine-tuning on answers"
BETTER_ONES = "To train on the better answers"
# What belongs before or around a text, by the part of formats that have it.
CONTEXT = {
    "history": "earlier turns",
    "system": "a system prompt",
    "tools": "tools",
    "chat_template_kwargs": "variables of a chat template",
}
CONTEXTS = {**OPTIONAL[DataFormat.MESSAGES], "history": (HISTORY,)}
EMPTY_JSON = ("[]", "{}")
MOST_SETS_OF_COLUMNS = 1000  # that are remembered; nearly all rows of a file have the same
Flags = tuple[DataFormat, Mapping[str, str]]


class UnusedColumnChecker:
    """Refuses rows of which a part would be passed over that changes what they mean.

    Who names columns by hand has decided what is trained, so that only pictures and sounds are a fault then.
    """

    def __init__(self, layout: RowLayout, settings: DataSettings) -> None:
        self._layout = layout
        self._settings = settings
        self._used = frozenset(layout.columns.values())
        self._telling: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._hints: dict[tuple[str, ...], str] = {}
        self._has_answers = layout.format not in (DataFormat.TEXT, DataFormat.TOKENS)

    def check(self, row: Mapping[str, Any]) -> None:
        """Check that no unused part of `row` changes what it means.

        Raises:
            RowError: it holds a picture or sound, earlier turns or a prompt that its format has no part for, answers
                to be compared, a verdict on its answer, or a switch.
        """
        beside = {name: row[name] for name in self._telling_columns(tuple(row))}
        self._check_media(row, beside)
        if beside and not self._settings.columns:
            self._check_names(beside)
            self._check_context(row, beside)
            self._check_answers(row, beside)

    def _telling_columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the unused columns among `names` that may say more of a row than its text does."""
        if names not in self._telling:
            if len(self._telling) >= MOST_SETS_OF_COLUMNS:
                self._telling.clear()
            self._telling[names] = tuple(name for name in names if may_change_meaning(name) and name not in self._used)
        return self._telling[names]

    def _check_names(self, beside: Mapping[str, Any]) -> None:
        """Check that no second column has what one of another name is read for."""
        for part in ("system", "tools"):
            name = next((each for each in OPTIONAL[DataFormat.MESSAGES][part] if not is_blank(beside.get(each))), None)
            if name is not None and (used := self._layout.columns.get(part)):
                raise RowError(
                    f"{used!r} and {name!r} are both {part}, of which one alone is read",
                    hint=f"Put all into one of them, or name the one to read: --columns {part}={shlex.quote(used)}",
                )

    def _check_context(self, row: Mapping[str, Any], beside: Mapping[str, Any]) -> None:
        """Check that no column holds what belongs before or around the text, and the format has no part for."""
        if self._layout.format == DataFormat.TOKENS:  # which are all that is fed
            return
        for part in CONTEXT.keys() - OPTIONAL[self._layout.format].keys():
            for name in CONTEXTS[part]:
                if _is_context(part, beside.get(name)) and not self._holds(row, beside[name]):
                    purpose = f"Write it into {next(iter(self._layout.columns.values()))!r}. To train without it"
                    raise RowError(
                        f"{name!r} holds {CONTEXT[part]}, for which rows of {self._layout.format.value} have no part, "
                        "and would be ignored",
                        hint=self._hint([name], row, [self._own], purpose),
                    )

    def _holds(self, row: Mapping[str, Any], value: object) -> bool:
        """Whether a text is within what is used of a row already."""
        used = (row.get(name) for name in self._used)
        return isinstance(value, str) and any(isinstance(text, str) and value.strip() in text for text in used)

    @property
    def _own(self) -> Flags:
        return self._layout.format, {part: self._layout.columns[part] for part in PARTS[self._layout.format]}

    def _check_media(self, row: Mapping[str, Any], beside: Mapping[str, Any]) -> None:
        if beside and (name := find_media_column(beside)):
            raise RowError(
                f"{name!r} holds what is no text, and only text can be trained",
                hint="Leave such rows out (--on-bad-row skip), or take the column out if the text stands alone.",
            )
        media = [name for name in beside if is_media(name)] if beside else []
        if found := placeholder_in([row.get(name) for name in self._used], has_media=bool(media)):
            where = f"something in {join_names(media)}" if media else "a picture, a sound or a video"
            raise RowError(
                f"its text has {found}, which stands for {where}: only text can be trained",
                hint="Leave such rows out (--on-bad-row skip), or take it out of the text.",
            )

    def _check_answers(self, row: Mapping[str, Any], beside: Mapping[str, Any]) -> None:
        own = self._own
        if names := comparison_columns(beside):
            raise RowError(
                f"it holds a preference ({join_names(names)}), one answer of which is to be avoided: {NOT_HERE}",
                hint=self._hint(names, row, [*_better(beside, row), own], BETTER_ONES),
            )
        if self._has_answers and (name := row_switch(beside)):
            purpose = (
                'Say it in each message, with "train": true or false. To train on all answers'
                if self._layout.format in ALSO_ASKED
                else f"Leave out the rows that {name!r} says not to train. To train on all that are there"
            )
            raise RowError(
                f"{name!r} says what of the row is trained, and would be ignored",
                hint=self._hint([name], row, [own], purpose),
            )
        if self._has_answers and (judged := find_verdict(beside)):
            name, unwanted = judged
            purpose = f"Leave out the rows whose {name!r} is {unwanted}. To train on all that are there"
            raise RowError(
                f"{name!r} says whether the answer is wanted (KTO), and would be ignored: {NOT_HERE}",
                hint=self._hint([name], row, [own], purpose),
            )

    def _hint(self, names: Collection[str], row: Mapping[str, Any], ways: Iterable[Flags], purpose: str) -> str:
        """Return what to do about the columns `names`; the ways are tried on the first row that has them."""
        if tuple(names) not in self._hints:
            self._hints[tuple(names)] = _hint(row, ways, self._settings, purpose)
        return self._hints[tuple(names)]


def _is_context(part: str, value: object) -> bool:
    """Whether a value is what a column of this name holds for a conversation: elsewhere it may be about anything."""
    if isinstance(value, Unreadable):
        return True
    if part == "system":
        return isinstance(value, str) and value.strip() != ""
    if isinstance(value, list):
        return any(isinstance(each, list | Mapping) or _is_json(each) for each in value) and not is_blank(value)
    return _is_json(value) or (isinstance(value, Mapping) and not is_blank(value))


def _is_json(value: object) -> bool:
    return isinstance(value, str) and value.strip() not in EMPTY_JSON and value.strip().startswith(("[", "{"))


def check_preferences(rows: Iterable[Mapping[str, Any]], settings: DataSettings, name: str) -> None:
    """Check that rows which fit no format are no preferences.

    Raises:
        DataError: they are; its hint says how the better answers are trained.
    """
    for row in rows:
        if not settings.columns and (names := comparison_columns(row)):
            raise DataError(
                f"{name} holds preferences ({join_names(names)}), in which one answer is to be avoided: {NOT_HERE}",
                hint=_hint(row, _better(row, row), settings, BETTER_ONES),
            )


def _better(judged: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Flags]:
    """Yield ways to train the better answer of a row, the likeliest first."""
    for better in better_answer_columns(judged):
        asking = [name for name in ASKING if name in row]
        yield DataFormat.MESSAGES, {"messages": better}
        for name in asking:
            if name in PARTS[DataFormat.ALPACA]["instruction"]:
                yield DataFormat.ALPACA, {"instruction": name, "output": better}
            if name in PARTS[DataFormat.QUESTION_ANSWER]["question"]:
                yield DataFormat.QUESTION_ANSWER, {"question": name, "answer": better}
            yield DataFormat.PROMPT_COMPLETION, {"prompt": name, "completion": better}
        if not asking:
            yield DataFormat.TEXT, {"text": better}


def _hint(row: Mapping[str, Any], ways: Iterable[Flags], settings: DataSettings, purpose: str) -> str:
    """Return the first of the `ways` to train the row that works, as flags."""
    working = (way for way in ways if _trains(row, row.keys(), way, settings))
    way = next(working, None)
    return (
        f"{purpose}: {_typed(way)}" if way else "Write the answers to be given as rows of their own, or as messages."
    )


def _trains(row: Mapping[str, Any], columns: Collection[str], way: Flags, settings: DataSettings) -> bool:
    """Whether the row has something to train when it is read in this way."""
    fmt, named = way
    if any(set(name) & {",", "="} for name in named.values()):
        return False  # which can't be typed
    try:
        layout = recognise(columns, with_values(settings, format=fmt, columns=dict(named)), "row")
        example = RowReader(layout, settings.loss_on, use_chat=True).read(row)
    except (DataError, RowError):
        return False
    return not isinstance(example, Conversation) or (example.trained != () and example.trained[0] > 0)


def _typed(way: Flags) -> str:
    """Return the flags for a way to read rows, as they are typed in a shell."""
    fmt, named = way
    columns = ",".join(f"{ours}={theirs}" for ours, theirs in named.items())
    return f"--format {fmt.value} --columns {shlex.quote(columns)}"
