"""Random columns of nested types: their values are read as generated, or their row is a bad one."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, reject
from hypothesis import settings as examples
from hypothesis import strategies as st

from qlora_cli.data.finding.sources import find_dataset
from qlora_cli.data.reading.raw import Selection
from qlora_cli.data.reading.readers import read_rows
from tests.support.data.reading import read

MOST_VALUES = 6
BAD = object()  # what can't be read
# An array, and what its values are; in objects with the nulls that are left out of them.
Drawn = tuple[Any, list[Any]]

TEXTS = [None, "", "a", "é\n"]
BYTES = {**{text and text.encode(): text for text in TEXTS}, b"\xff": BAD}
JSON = {None: None, "1.5": 1.5, '{"a": [null]}': {"a": [None]}, '"x"': "x", "{": BAD, "": BAD}
DAYS = {None: None, 0: "1970-01-01", -719163: BAD, 2932897: BAD, 2**31 - 1: BAD}
SECONDS = {None: None, 0: "00:00:00", 86399: "23:59:59", 86400: BAD, -1: BAD}
MOMENTS = {None: None, 0: "1970-01-01T00:00:00", 2**62: BAD, -(2**62): BAD}
IN_TOKYO = {None: None, 0: "1970-01-01T09:00:00+09:00", 253402300799: BAD}
NOWHERE = {None: None, 0: BAD}


def leaf(kind: Any, values: dict[Any, Any]) -> Callable[[list[Any]], Drawn]:
    """Return a function that makes an array of some of the keys; times are given as the numbers that store them."""
    stored = getattr(kind, "storage_type", kind)
    if pyarrow.types.is_temporal(kind):
        stored = pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()
    if pyarrow.types.is_string(kind) and b"\xff" in values:
        stored = pyarrow.binary()

    def make(keys: list[Any]) -> Drawn:
        array = pyarrow.array(keys, stored)
        if isinstance(kind, pyarrow.BaseExtensionType):
            array = pyarrow.ExtensionArray.from_storage(kind, array)
        return array.view(kind) if stored != kind and array.type == stored else array, [values[key] for key in keys]

    return make


LEAVES: list[tuple[Any, dict[Any, Any]]] = [
    (pyarrow.null(), {None: None}),
    (pyarrow.bool_(), {None: None, True: True, False: False}),
    (pyarrow.uint64(), {None: None, 2**64 - 1: 2**64 - 1}),
    (pyarrow.float16(), {None: None, 0.5: 0.5}),
    (pyarrow.float32(), {None: None, 0.5: 0.5}),
    (pyarrow.string(), BYTES),
    (pyarrow.large_string(), {text: text for text in TEXTS}),
    (pyarrow.string_view(), {text: text for text in TEXTS}),
    (pyarrow.large_binary(), BYTES),
    (pyarrow.binary(1), {None: None, b"a": "a", b"\xff": BAD}),
    (pyarrow.json_(), JSON),
    (pyarrow.date32(), DAYS),
    (pyarrow.time32("s"), SECONDS),
    (pyarrow.timestamp("s"), MOMENTS),
    (pyarrow.timestamp("s", "Asia/Tokyo"), IN_TOKYO),
    (pyarrow.timestamp("ns", "Mars/Olympus"), NOWHERE),
    (pyarrow.duration("us"), {None: None, 2**62: "PT4611686018427.387904S"}),
]


@st.composite
def leaves(draw: st.DrawFn) -> Drawn:
    kind, values = draw(st.sampled_from(LEAVES))
    return leaf(kind, values)(draw(st.lists(st.sampled_from(list(values)), max_size=MOST_VALUES)))


def masks(num_values: int) -> st.SearchStrategy[list[bool]]:
    """Draw which of so many values are null."""
    return st.lists(st.booleans(), min_size=num_values, max_size=num_values)


@st.composite
def cut(draw: st.DrawFn, children: st.SearchStrategy[Drawn]) -> Drawn:
    array, values = draw(children)
    inner = st.lists(st.integers(0, len(array)), max_size=MOST_VALUES)
    offsets = sorted(draw(inner)) or [0]
    is_null = draw(masks(len(offsets) - 1))
    kind, lists = draw(
        st.sampled_from([(pyarrow.int32(), pyarrow.ListArray), (pyarrow.int64(), pyarrow.LargeListArray)])
    )
    made = lists.from_arrays(pyarrow.array(offsets, kind), array, mask=pyarrow.array(is_null, pyarrow.bool_()))
    ranges = zip(offsets, offsets[1:], is_null, strict=False)
    return made, [None if null else values[begin:end] for begin, end, null in ranges]


@st.composite
def viewed(draw: st.DrawFn, children: st.SearchStrategy[Drawn]) -> Drawn:
    array, values = draw(children)
    begins = draw(st.lists(st.integers(0, len(array)), max_size=MOST_VALUES))
    sizes = [draw(st.integers(0, len(array) - begin)) for begin in begins]
    places = (pyarrow.array(numbers, pyarrow.int32()) for numbers in (begins, sizes))
    made = pyarrow.ListViewArray.from_arrays(*places, array)
    return made, [values[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]


@st.composite
def fixed(draw: st.DrawFn, children: st.SearchStrategy[Drawn]) -> Drawn:
    array, values = draw(children)
    size = draw(st.integers(1, 2))
    num_lists = len(array) // size
    made = pyarrow.FixedSizeListArray.from_arrays(array.slice(0, num_lists * size), size)
    return made, [values[place * size : (place + 1) * size] for place in range(num_lists)]


@st.composite
def objects(draw: st.DrawFn, children: st.SearchStrategy[Drawn]) -> Drawn:
    columns = draw(st.lists(children, min_size=1, max_size=3))
    length = min(len(array) for array, _ in columns)
    names = [f"f{number}" for number in range(len(columns))]
    is_null = draw(masks(length))
    made = pyarrow.StructArray.from_arrays(
        [array.slice(0, length) for array, _ in columns], names, mask=pyarrow.array(is_null, pyarrow.bool_())
    )
    rows = [
        dict(zip(names, row, strict=True)) for row in zip(*(values[:length] for _, values in columns), strict=True)
    ]
    plain = [{name: part for name, part in row.items() if part is not None} for row in rows]
    return made, [None if null else row for row, null in zip(plain, is_null, strict=True)]


@st.composite
def mapped(draw: st.DrawFn, children: st.SearchStrategy[Drawn]) -> Drawn:
    array, values = draw(children)
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=len(array), max_size=len(array)))
    offsets = sorted(draw(st.lists(st.integers(0, len(array)), max_size=MOST_VALUES))) or [0]
    made = pyarrow.MapArray.from_arrays(
        pyarrow.array(offsets, pyarrow.int32()), pyarrow.array(names, pyarrow.string()), array
    )
    pairs = [list(zip(names, values, strict=True))[begin:end] for begin, end in pairwise(offsets)]
    return made, [dict(pair) if len(dict(pair)) == len(pair) else BAD for pair in pairs]


@st.composite
def numbered(draw: st.DrawFn, children: st.SearchStrategy[Drawn]) -> Drawn:
    array, values = draw(children)
    if any(kind in str(array.type) for kind in ("dictionary<", "extension<")):
        reject()  # which pyarrow writes, and can't read itself
    numbers = st.none() | st.integers(0, len(array) - 1) if len(array) else st.none()
    places = draw(st.lists(numbers, max_size=MOST_VALUES))
    made = pyarrow.DictionaryArray.from_arrays(pyarrow.array(places, pyarrow.int32()), array)
    return made, [None if place is None else values[place] for place in places]


@st.composite
def repeated(draw: st.DrawFn, children: st.SearchStrategy[Drawn]) -> Drawn:
    array, values = draw(children)
    lengths = [draw(st.integers(1, 3)) for _ in values]
    ends = pyarrow.array([sum(lengths[: place + 1]) for place in range(len(lengths))], pyarrow.int32())
    try:
        made = pyarrow.RunEndEncodedArray.from_arrays(ends, array)
    except pyarrow.ArrowInvalid:  # pyarrow makes none of invalid text
        reject()
    return made, [value for value, length in zip(values, lengths, strict=True) for _ in range(length)]


def nested(children: st.SearchStrategy[Drawn]) -> st.SearchStrategy[Drawn]:
    """Draw an array that contains arrays drawn by `children`."""
    return st.one_of(*(make(children) for make in (cut, viewed, fixed, objects, mapped, numbered, repeated)))


@st.composite
def parts(draw: st.DrawFn, arrays: st.SearchStrategy[Drawn]) -> Drawn:
    """Draw a slice of an array, which still holds the rest of its memory."""
    array, values = draw(arrays)
    begin = draw(st.integers(0, len(array)))
    return array.slice(begin), values[begin:]


COLUMNS = parts(st.recursive(leaves(), lambda children: nested(parts(children)), max_leaves=5))


def is_bad(value: Any) -> bool:
    """Whether any part of `value` can't be read."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is BAD or any(map(is_bad, inner))


def write(path: Path, array: Any, *, as_stream: bool) -> None:
    texts = pyarrow.array([str(number) for number in range(len(array))], pyarrow.string())
    batch = pyarrow.record_batch([texts, array], names=["text", "a"])
    with (pyarrow.ipc.new_stream if as_stream else pyarrow.ipc.new_file)(path, batch.schema) as writer:
        writer.write_batch(batch)


@pytest.mark.slow
@examples(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(COLUMNS, st.booleans())
def test_values_of_any_type_round_trip(tmp_path: Path, column: Drawn, as_stream: bool) -> None:
    array, values = column
    path = tmp_path / "a.arrow"
    write(path, array, as_stream=as_stream)
    rows = read(path)
    assert [row.problem is not None for row in rows] == list(map(is_bad, values))
    good = [(row.value, value) for row, value in zip(rows, values, strict=True) if not is_bad(value)]
    assert [actual for actual, _ in good] == [{"text": (actual or {})["text"], "a": value} for actual, value in good]
    only_text = Selection(columns=lambda _: ["text"])
    unread = read_rows(find_dataset(str(path)), split="train", seed=0, selection=only_text)
    assert [row.value for row in unread] == [{"text": str(number), "a": None} for number in range(len(values))]
