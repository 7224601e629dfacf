"""Recognise the format of a data set by its columns, and which column holds which part of the format."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches

from qlora_cli.data.limits import join_names
from qlora_cli.data.rows.special_columns import (
    HISTORY,
    LABELS,
    SYSTEM,
    TEMPLATE_VARIABLES,
    THINKING,
    TOOLS,
    may_change_meaning,
)
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.objectives import OBJECTIVES_OF_PAIRS, SEGMENTS_HINT, DataFormat

# The names of each part of a format: ours first, then those that popular data sets use.
PARTS: Mapping[DataFormat, Mapping[str, tuple[str, ...]]] = {
    DataFormat.MESSAGES: {"messages": ("messages", "conversation", "dialogue", "dialog", "chat")},
    DataFormat.SHAREGPT: {"conversations": ("conversations",)},
    DataFormat.PROMPT_COMPLETION: {
        "prompt": ("prompt",),
        "completion": ("completion", "response", "answer", "output"),
    },
    DataFormat.ALPACA: {
        "instruction": ("instruction",),
        "output": ("output", "response", "completion", "answer"),
    },
    DataFormat.QUESTION_ANSWER: {
        "question": ("question", "query", "problem"),
        "answer": ("answer", "response", "solution", "output", "reply"),
    },
    DataFormat.TEXT: {"text": ("text", "content")},
    DataFormat.TOKENS: {"input_ids": ("input_ids", "tokens")},
    DataFormat.PREFERENCE: {"chosen": ("chosen",), "rejected": ("rejected",)},
}
# The optional parts of each format.
CHAT = {
    "tools": TOOLS,
    "system": SYSTEM,
    "chat_template_kwargs": TEMPLATE_VARIABLES,
    "enable_thinking": (THINKING,),
}
OPTIONAL: Mapping[DataFormat, Mapping[str, tuple[str, ...]]] = {
    DataFormat.MESSAGES: CHAT,
    DataFormat.SHAREGPT: CHAT,
    DataFormat.PROMPT_COMPLETION: {"history": (HISTORY,), **CHAT},
    DataFormat.ALPACA: {"input": ("input", "context"), "history": (HISTORY,), **CHAT},
    DataFormat.QUESTION_ANSWER: {"context": ("context",), "history": (HISTORY,), **CHAT},
    DataFormat.TEXT: {},
    DataFormat.TOKENS: {
        "labels": ("labels",),
        "attention_mask": ("attention_mask",),
        "loss_mask": ("loss_mask", "completion_mask", "assistant_masks"),
    },
    DataFormat.PREFERENCE: {
        "prompt": ("prompt",),
        "question": ("question", "query", "problem", "instruction"),
        "history": (HISTORY,),
        **CHAT,
    },
}
# The formats of single answers that may have a label besides; the part of `unpaired_preference` that they lack.
LABELLED = (
    DataFormat.MESSAGES,
    DataFormat.SHAREGPT,
    DataFormat.PROMPT_COMPLETION,
    DataFormat.ALPACA,
    DataFormat.QUESTION_ANSWER,
)
LABEL_PART = "label"
COLUMNS = "data.columns"
# Names that are accepted only if the user chooses the format: each is the mark of the other format.
EXTRA_NAMES: Mapping[DataFormat, Mapping[str, tuple[str, ...]]] = {
    DataFormat.MESSAGES: {"messages": PARTS[DataFormat.SHAREGPT]["conversations"]},
    DataFormat.SHAREGPT: {"conversations": PARTS[DataFormat.MESSAGES]["messages"]},
}


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """A format, and the columns that hold its parts.

    Attributes:
        format: The format of the rows.
        answers: The format of their answers, if those have labels besides.
        columns: The column of the data set that holds each part, by our name for the part.
        unused: The columns that hold no part.
    """

    format: DataFormat
    columns: Mapping[str, str]
    unused: tuple[str, ...] = ()
    answers: DataFormat | None = None

    @property
    def answer_format(self) -> DataFormat:
        """The format of the rows without their labels."""
        return self.answers or self.format

    def describe(self) -> str:
        """Return the format, its renamed parts and the unused columns: `alpaca (output is response)`."""
        details = [f"{ours} is {theirs}" for ours, theirs in self.columns.items() if ours != theirs]
        details += [f"not used: {join_names(self.unused)}"] if self.unused else []
        names = self.format.value if self.answers is None else f"{self.format.value} of {self.answers.value}"
        return f"{names} ({'; '.join(details)})" if details else names


def recognise(columns: Collection[str], settings: DataSettings, name: str) -> RowLayout:
    """Return the layout of a data set with these `columns`.

    Raises:
        DataError: no format fits, several do, or the columns that the settings ask for are missing.
    """
    named = settings.columns or {}
    _check_named(named, columns, settings.format, name)
    if settings.format == DataFormat.UNPAIRED_PREFERENCE:
        return _labelled_layout(columns, named, name)
    if settings.format != DataFormat.AUTO:
        return _chosen_layout(settings.format, columns, named, name)
    # Two answers of a row are compared only if the objective says so, by choosing the format.
    fits = _fitting([fmt for fmt in PARTS if fmt != DataFormat.PREFERENCE], columns, named)
    if len(fits) > 1 and DataFormat.TEXT in fits:
        fits.remove(DataFormat.TEXT)  # often a copy of the other columns as one text
    if not fits:
        raise _no_format(columns, name)
    if len(fits) > 1:
        raise DataError(
            f"the columns of {name} fit several formats: {', '.join(fmt.value for fmt in fits)}",
            hint=f"Choose one, such as --format {fits[0].value}; if its files or rows differ in format, give each "
            "format as a --dataset of its own.",
        )
    return _layout(fits[0], columns, named)


def columns_in_use(columns: Collection[str], settings: DataSettings, name: str) -> Collection[str]:
    """Return which of a file's `columns` are read: those that may affect examples; all if no format is recognised."""
    parts = part_columns(columns, settings, name)
    return [column for column in columns if column in parts or may_change_meaning(column)]


def part_columns(columns: Collection[str], settings: DataSettings, name: str) -> Collection[str]:
    """Return which of a file's `columns` hold a part of its format; all if no format is recognised."""
    try:
        return list(recognise(columns, settings, name).columns.values())
    except DataError:  # raised again once the rows are read
        return columns


def nearest(columns: Collection[str]) -> str:
    """Return the format whose parts are named most like these `columns`, and its parts: `text (text)`."""

    def similarity(fmt: DataFormat) -> float:
        ratios = [
            max((_similarity(name, column) for name in names for column in columns), default=0.0)
            for names in PARTS[fmt].values()
        ]
        return sum(ratios) / len(ratios)

    best = max(PARTS, key=similarity)
    return f"{best.value} ({', '.join(PARTS[best])})"


def _similarity(name: str, column: str) -> float:
    return SequenceMatcher(None, name, column.lower().strip()).ratio()


def _parts(fmt: DataFormat) -> dict[str, tuple[str, ...]]:
    return {**PARTS[fmt], **OPTIONAL[fmt]}


def _missing(fmt: DataFormat, columns: Collection[str], named: Mapping[str, str]) -> list[str]:
    free = set(columns) - set(named.values())
    return [ours for ours, names in PARTS[fmt].items() if ours not in named and not set(names) & free]


def _layout(fmt: DataFormat, columns: Collection[str], named: Mapping[str, str]) -> RowLayout:
    by_part = dict(named)
    taken = set(named.values())
    for ours, names in _parts(fmt).items():
        theirs = next((name for name in names if name in columns and name not in taken), None)
        if ours not in by_part and theirs is not None:
            by_part[ours] = theirs
            taken.add(theirs)
    return RowLayout(format=fmt, columns=by_part, unused=tuple(name for name in columns if name not in taken))


def _fitting(
    candidates: Collection[DataFormat], columns: Collection[str], named: Mapping[str, str]
) -> list[DataFormat]:
    return [fmt for fmt in candidates if _missing(fmt, columns, named) == [] and set(named) <= _parts(fmt).keys()]


def _labelled_layout(columns: Collection[str], named: Mapping[str, str], name: str) -> RowLayout:
    """Return the layout of answers with labels: that of the answers, and the column of the label."""
    found = [column for column in LABELS if column in columns and column not in named.values()]
    labels = [named[LABEL_PART]] if LABEL_PART in named else found
    if len(labels) != 1:
        pairs = "; rows of chosen and rejected answers are for " + OBJECTIVES_OF_PAIRS if "chosen" in columns else ""
        raise DataError(
            f"{name} has no column {LABEL_PART}, which the format {DataFormat.UNPAIRED_PREFERENCE.value} needs"
            if not labels
            else f"several columns of {name} may say whether an answer is wanted: {join_names(labels)}",
            hint=f"Its columns are {join_names(columns)}; --columns {LABEL_PART}=NAME says which one it is{pairs}.",
        )
    rest = [column for column in columns if column != labels[0]]
    others = {ours: theirs for ours, theirs in named.items() if ours != LABEL_PART}
    fits = _fitting(LABELLED, rest, others)
    if len(fits) != 1:
        known = "; ".join(f"{fmt.value}: {', '.join(PARTS[fmt])}" for fmt in fits or LABELLED)
        raise DataError(
            f"the columns of {name} fit {'several formats' if fits else 'no known format'} of answers with a label: "
            f"{join_names(columns)}",
            hint=f"Name the parts of one with --columns: {known}.",
        )
    layout = _layout(fits[0], rest, others)
    return RowLayout(
        format=DataFormat.UNPAIRED_PREFERENCE,
        columns={**layout.columns, LABEL_PART: labels[0]},
        unused=layout.unused,
        answers=layout.format,
    )


def _chosen_layout(fmt: DataFormat, columns: Collection[str], named: Mapping[str, str], name: str) -> RowLayout:
    named = {**_extra_names(fmt, columns, named), **named}
    if missing := _missing(fmt, columns, named):
        raise DataError(
            f"{name} has no column {', '.join(missing)}, which the format {fmt.value} needs",
            hint=f"Its columns are {join_names(columns)}; --columns {missing[0]}=NAME says which one it is.",
        )
    return _layout(fmt, columns, named)


def _extra_names(fmt: DataFormat, columns: Collection[str], named: Mapping[str, str]) -> dict[str, str]:
    """Return the columns of missing parts that are present under the other format's name for them."""
    missing, free = _missing(fmt, columns, named), set(columns) - set(named.values())
    candidates = {ours: EXTRA_NAMES.get(fmt, {}).get(ours, ()) for ours in missing}
    return {ours: name for ours, names in candidates.items() for name in names if name in free}


def _check_named(named: Mapping[str, str], columns: Collection[str], fmt: DataFormat, name: str) -> None:
    known = _known_parts(fmt)
    for theirs in named.values():
        parts = [ours for ours, other in named.items() if other == theirs]
        if len(parts) > 1:
            raise DataError(
                f"{theirs!r} is named twice, as {' and as '.join(parts)}",
                hint="Name each column once.",
                setting=COLUMNS,
            )
    for ours, theirs in named.items():
        if ours not in known:
            raise DataError(
                f"{ours}={theirs}: no format has a part {ours!r}"
                if fmt == DataFormat.AUTO
                else f"{ours}={theirs}: the format {fmt.value} has no part {ours!r}",
                hint=f"The parts are {', '.join(sorted(known))}.",
                setting=COLUMNS,
            )
        if theirs not in columns:
            near = get_close_matches(theirs, columns, n=1)
            raise DataError(
                f"{ours}={theirs}: {name} has no column {theirs!r}",
                hint=f"Did you mean {near[0]}?" if near else f"Its columns are {join_names(columns)}.",
                setting=COLUMNS,
            )


def _known_parts(fmt: DataFormat) -> set[str]:
    """Return the names of the parts that rows of a format may have; of those of any format if that is open."""
    if fmt == DataFormat.UNPAIRED_PREFERENCE:
        return {LABEL_PART}.union(*(_parts(each) for each in LABELLED))
    return set().union(*(_parts(each) for each in PARTS)) if fmt == DataFormat.AUTO else set(_parts(fmt))


def _no_format(columns: Collection[str], name: str) -> DataError:
    if "segments" in columns:
        return DataError(f"{name} holds segments of text, a format that is not supported", hint=SEGMENTS_HINT)
    known = "; ".join(f"{fmt.value}: {', '.join(parts)}" for fmt, parts in PARTS.items())
    return DataError(
        f"the columns of {name} fit no known format: {join_names(columns) or 'there are none'}",
        hint=f"The nearest is {nearest(columns)}; choose with --format and --columns. Known formats are {known}.",
    )
