"""Refuse rows whose unused columns change what they mean: preferences, verdicts, pictures.

A hint names only flags that were tried on the row.
"""

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from qlora_cli.data.limits import join_names
from qlora_cli.data.rows.column_formats import EXTRA_NAMES, LABEL_PART, OPTIONAL, PARTS, RowLayout, recognise
from qlora_cli.data.rows.examples import Conversation, RowError, Unreadable, is_blank
from qlora_cli.data.rows.messages import is_media_name
from qlora_cli.data.rows.rows_by_format import read_row, reader_of
from qlora_cli.data.rows.special_columns import (
    HISTORY,
    LABELS,
    better_answer_columns,
    comparison_columns,
    find_media_column,
    find_verdict,
    may_change_meaning,
    placeholder_in,
)
from qlora_cli.data.rows.train_switches import row_switch
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.objectives import OBJECTIVES_OF_LABELS, OBJECTIVES_OF_PAIRS, DataFormat
from qlora_cli.settings.settle import with_values

QUESTION_COLUMNS = (
    "prompt",
    "question",
    "query",
    "problem",
    "instruction",
    "messages",
    "conversations",
    "conversation",
)
NOT_HERE = "this is for training by comparison, not for fine-tuning on answers"
TRAIN_ON_BETTER = "To train on the better answers"
COMPARE = f"To compare them, use {OBJECTIVES_OF_PAIRS}"
# Parts of some formats that belong before or around the text, as messages name them.
CONTEXT_PARTS = {
    "history": "earlier turns",
    "system": "a system prompt",
    "tools": "tools",
    "chat_template_kwargs": "variables of a chat template",
}
CONTEXT_COLUMNS = {**OPTIONAL[DataFormat.MESSAGES], "history": (HISTORY,)}
EMPTY_JSON = ("[]", "{}")
MAX_CACHED_COLUMN_SETS = 1000  # nearly all rows of a file have the same columns
Flags = tuple[DataFormat, Mapping[str, str]]


class UnusedColumnChecker:
    """Refuses rows in which an unused column changes what they mean.

    A user who names the columns has decided what is trained: then only pictures and sounds are refused.
    """

    def __init__(self, layout: RowLayout, settings: DataSettings) -> None:
        self._layout = layout
        self._settings = settings
        self._used = frozenset(layout.columns.values())
        self._special_by_names: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._hints: dict[tuple[str, ...], str] = {}
        self._has_answers = layout.format not in (DataFormat.TEXT, DataFormat.TOKENS)
        self._compares = layout.format == DataFormat.PREFERENCE

    def check(self, row: Mapping[str, Any]) -> None:
        """Check that no unused column of `row` changes what it means.

        Raises:
            RowError: the row holds a picture or sound, context that its format has no part for, answers that are
                compared, a verdict on its answer, or a switch.
        """
        special = {name: row[name] for name in self._special_columns(tuple(row))}
        self._check_media(row, special)
        if special and not self._settings.columns:
            self._check_duplicates(special)
            self._check_context(row, special)
            self._check_answers(row, special)

    def _special_columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the unused columns among `names` that may change what a row means."""
        if names not in self._special_by_names:
            if len(self._special_by_names) >= MAX_CACHED_COLUMN_SETS:
                self._special_by_names.clear()
            self._special_by_names[names] = tuple(
                name for name in names if may_change_meaning(name) and name not in self._used
            )
        return self._special_by_names[names]

    def _check_duplicates(self, special: Mapping[str, Any]) -> None:
        """Check that no second column, under another name, holds a part that is read already."""
        for part in ("system", "tools"):
            names = OPTIONAL[DataFormat.MESSAGES][part]
            name = next((name for name in names if not is_blank(special.get(name))), None)
            if name is not None and (used := self._layout.columns.get(part)):
                raise RowError(
                    f"{used!r} and {name!r} are both {part}, but only one is read",
                    hint=f"Merge them, or name the one to read: --columns {part}={shlex.quote(used)}",
                )

    def _check_context(self, row: Mapping[str, Any], special: Mapping[str, Any]) -> None:
        """Check that no column holds context of the text that the format has no part for."""
        if self._layout.format == DataFormat.TOKENS:  # they already contain all context
            return
        for part in CONTEXT_PARTS.keys() - OPTIONAL[self._layout.answer_format].keys():
            for name in CONTEXT_COLUMNS[part]:
                if _is_context(part, special.get(name)) and not self._is_in_text(row, special[name]):
                    purpose = f"Write it into {next(iter(self._layout.columns.values()))!r}. To train without it"
                    raise RowError(
                        f"{name!r} holds {CONTEXT_PARTS[part]}, for which the format {self._layout.format.value} has "
                        "no part: it would be ignored",
                        hint=self._hint([name], row, [self._own_flags], purpose),
                    )

    def _is_in_text(self, row: Mapping[str, Any], value: object) -> bool:
        """Return whether a column that is used contains the text `value` already."""
        used = (row.get(name) for name in self._used)
        return isinstance(value, str) and any(isinstance(text, str) and value.strip() in text for text in used)

    @property
    def _own_flags(self) -> Flags:
        """The flags that name the columns in use, by which a user confirms that the others may be ignored."""
        parts = PARTS[self._layout.answer_format]
        labels = [LABEL_PART] if self._layout.answers is not None else []
        return self._layout.format, {part: self._layout.columns[part] for part in (*labels, *parts)}

    def _check_media(self, row: Mapping[str, Any], special: Mapping[str, Any]) -> None:
        if special and (name := find_media_column(special)):
            raise RowError(
                f"{name!r} holds something other than text, but only text can be trained on",
                hint="Leave such rows out (--on-bad-row skip), or remove the column if the text stands alone.",
            )
        media = [name for name in special if is_media_name(name)] if special else []
        if placeholder := placeholder_in([row.get(name) for name in self._used], has_media=bool(media)):
            content = f"something in {join_names(media)}" if media else "a picture, a sound or a video"
            raise RowError(
                f"its text has {placeholder}, which stands for {content}, but only text can be trained on",
                hint="Leave such rows out (--on-bad-row skip), or remove it from the text.",
            )

    def _check_answers(self, row: Mapping[str, Any], special: Mapping[str, Any]) -> None:
        own_flags = self._own_flags
        if (names := comparison_columns(special)) and not self._compares:
            raise RowError(
                f"it holds a preference ({join_names(names)}), one answer of which is to be avoided: {NOT_HERE}",
                hint=self._hint(names, row, [*_better_answer_flags(special, row), own_flags], _purpose(row)),
            )
        if self._has_answers and (name := row_switch(special)):
            purpose = (
                'Say it in each message, with "train": true or false. To train on all answers'
                if self._layout.answer_format in EXTRA_NAMES
                else f"Leave out the rows that {name!r} says not to train on. To train on all rows"
            )
            raise RowError(
                f"{name!r} says which part of the row is trained, but would be ignored",
                hint=self._hint([name], row, [own_flags], purpose),
            )
        if self._has_answers and (verdict := find_verdict(special)):
            name, unwanted = verdict
            both = f"To learn from both kinds, use {OBJECTIVES_OF_LABELS}. Or leave" if name in LABELS else "Leave"
            purpose = f"{both} out the rows whose {name!r} is {unwanted}. To train on all rows"
            raise RowError(
                f"{name!r} says whether the answer is wanted (KTO), but would be ignored: {NOT_HERE}",
                hint=self._hint([name], row, [own_flags], purpose),
            )

    def _hint(self, names: Collection[str], row: Mapping[str, Any], options: Iterable[Flags], purpose: str) -> str:
        """Return what to do about the columns `names`; the options are tried on the first row that has them."""
        if tuple(names) not in self._hints:
            self._hints[tuple(names)] = _hint(row, options, self._settings, purpose)
        return self._hints[tuple(names)]


def _is_context(part: str, value: object) -> bool:
    """Return whether a value is the context of a conversation; a column of such a name may also hold anything else."""
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
    """Check that rows which fit no format are not preferences.

    Raises:
        DataError: they are; its hint says how to train on the better answers.
    """
    for row in rows:
        if not settings.columns and (names := comparison_columns(row)):
            raise DataError(
                f"{name} holds preferences ({join_names(names)}), in which one answer is to be avoided: {NOT_HERE}",
                hint=_hint(row, _better_answer_flags(row, row), settings, _purpose(row)),
            )


def _purpose(row: Mapping[str, Any]) -> str:
    """Return what the flags of a hint about a preference are for; and how a pair is compared."""
    is_pair = all(part in row for part in PARTS[DataFormat.PREFERENCE])
    return f"{COMPARE}. {TRAIN_ON_BETTER}" if is_pair else TRAIN_ON_BETTER


def _better_answer_flags(special: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Flags]:
    """Yield flags that may train on the better answer of a row, the likeliest first."""
    for better in better_answer_columns(special):
        questions = [name for name in QUESTION_COLUMNS if name in row]
        yield DataFormat.MESSAGES, {"messages": better}
        for name in questions:
            if name in PARTS[DataFormat.ALPACA]["instruction"]:
                yield DataFormat.ALPACA, {"instruction": name, "output": better}
            if name in PARTS[DataFormat.QUESTION_ANSWER]["question"]:
                yield DataFormat.QUESTION_ANSWER, {"question": name, "answer": better}
            yield DataFormat.PROMPT_COMPLETION, {"prompt": name, "completion": better}
        if not questions:
            yield DataFormat.TEXT, {"text": better}


def _hint(row: Mapping[str, Any], options: Iterable[Flags], settings: DataSettings, purpose: str) -> str:
    """Return a hint that names the first of the `options` by which the row can be trained on."""
    flags = next((flags for flags in options if _can_train(row, flags, settings)), None)
    if flags is None:
        return "Write the answers to train on as rows of their own, or as messages."
    return f"{purpose}: {_format_flags(flags)}"


def _can_train(row: Mapping[str, Any], flags: Flags, settings: DataSettings) -> bool:
    """Return whether the row, read as `flags` say, has something to train on."""
    fmt, named = flags
    if any(set(name) & {",", "="} for name in named.values()):
        return False  # `--columns` can't express such a name
    try:
        layout = recognise(row.keys(), with_values(settings, format=fmt, columns=dict(named)), "row")
        example = read_row(reader_of(layout, settings.loss_on, use_chat=True), row)
    except (DataError, RowError):
        return False
    return not isinstance(example, Conversation) or (example.trained != () and example.trained[0] > 0)


def _format_flags(flags: Flags) -> str:
    """Return flags as they are typed in a shell."""
    fmt, named = flags
    columns = ",".join(f"{ours}={theirs}" for ours, theirs in named.items())
    return f"--format {fmt.value} --columns {shlex.quote(columns)}"
