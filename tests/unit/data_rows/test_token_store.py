"""Cached tokens are loaded exactly as this user wrote them, or rewritten; other files are never touched."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from qlora_cli import writing
from qlora_cli.cache import digest_of
from qlora_cli.data.reading.raw import RawRow
from qlora_cli.data.rows.examples import RowError
from qlora_cli.data.tokenizing import store
from qlora_cli.data.tokenizing.store import (
    ABOUT,
    CHECKSUM,
    SKIPPED,
    TOKENS,
    StoredTokens,
    TokenizedDataset,
    TokenRow,
    TokenWriter,
    load,
    write_tokens,
)
from qlora_cli.errors import DataError

KEY = digest_of(["the rows of this test"])
NUM_ROWS = 20


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cached table, in a separate cache."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    write_tokens(KEY, fill)
    return tmp_path / "cache" / "data" / KEY


def fill(writer: TokenWriter) -> TokenizedDataset:
    for begin in (0, NUM_ROWS // 2):
        writer.write([row(number) for number in range(begin, begin + NUM_ROWS // 2)])
    writer.skip(RawRow("rows.jsonl", 99, 99, None, "broken JSON", 1), RowError("it says: my secret"))
    return TokenizedDataset(
        name="rows",
        format="text",
        recognised="text",
        files=("rows.jsonl",),
        num_rows=writer.num_rows,
        num_bad=writer.num_bad,
        num_empty=writer.num_empty,
        notes=(),
    )


def row(number: int) -> TokenRow:
    ids = np.arange(number + 1, dtype=np.int32)
    return TokenRow(ids, ids, *([number] * (len(TokenRow._fields) - 2)))


def replace_tokens(table: Path, content: bytes) -> None:
    """Replace the tokens of a table, with a valid checksum."""
    about = json.loads((table / ABOUT).read_text())
    (table / TOKENS).unlink()  # an open file keeps its content
    (table / TOKENS).write_bytes(content)
    (table / ABOUT).write_text(json.dumps({**about, CHECKSUM: hashlib.sha256(content).hexdigest()}))


def content_of(stored: StoredTokens | None) -> list[dict[str, object]]:
    assert stored is not None
    return [dict(row) for row in stored.dataset]


def test_cached_tokens_are_loaded_as_written_and_private(table: Path) -> None:
    rows = content_of(load(KEY))
    assert len(rows) == NUM_ROWS
    assert rows[7]["input_ids"] == list(range(8))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (table, table.parent, *table.iterdir())}
    assert modes == {table.name: 0o700, "data": 0o700, TOKENS: 0o600, ABOUT: 0o600, SKIPPED: 0o600}


def test_the_first_bad_rows_are_listed_and_all_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_BAD_ROWS_LISTED", 2)
    writer = TokenWriter(tmp_path)
    for number in range(5):
        writer.skip(RawRow("rows.jsonl", number, None, None, "broken JSON", 1), RowError("it is broken"))
    writer.close()
    lines = (tmp_path / SKIPPED).read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [0, 1]
    assert writer.num_bad == 5


def test_a_flipped_bit_in_the_tokens_is_detected(table: Path) -> None:
    whole = (table / TOKENS).read_bytes()
    expected = content_of(load(KEY))
    chance = random.Random(0)  # noqa: S311 - no secret
    for position in chance.sample(range(len(whole)), 40):
        changed = bytearray(whole)
        changed[position] ^= 1 << chance.randrange(8)
        (table / TOKENS).unlink()  # an open file keeps its content
        (table / TOKENS).write_bytes(changed)
        assert load(KEY) is None
    assert content_of(write_tokens(KEY, fill)) == expected


@pytest.mark.slow
def test_damaged_tokens_with_a_valid_checksum_do_not_crash(table: Path) -> None:
    """A valid checksum proves nothing: no offset may point outside of the file."""
    whole = (table / TOKENS).read_bytes()
    chance = random.Random(0)  # noqa: S311 - no secret
    num_refused = 0
    for position in chance.sample(range(len(whole)), 300):
        changed = bytearray(whole)
        changed[position] = chance.randrange(256)
        replace_tokens(table, bytes(changed))
        stored = load(KEY)
        num_refused += stored is None
        if stored is not None:
            assert len(content_of(stored)) == NUM_ROWS
    assert 50 < num_refused < 300


def test_offsets_out_of_range_are_rejected(table: Path) -> None:
    offsets = np.cumsum(np.arange(NUM_ROWS // 2 + 1), dtype=np.int32)
    beyond = offsets.copy()
    beyond[3] = 2**30
    whole = (table / TOKENS).read_bytes()
    assert offsets.tobytes() in whole
    replace_tokens(table, whole.replace(offsets.tobytes(), beyond.tobytes()))
    assert load(KEY) is None


def test_other_columns_are_rejected(table: Path) -> None:
    other = pa.table({"input_ids": pa.array([[1]] * NUM_ROWS)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, other.schema) as stream:
        stream.write_table(other)
    replace_tokens(table, sink.getvalue().to_pybytes())
    assert load(KEY) is None


@pytest.mark.parametrize("about", ["", "[]", "{}", "7", "[" * 100_000, '{"sha256": 7}', "\0", '{"files": 7}'])
def test_an_invalid_description_of_a_table_is_rejected(table: Path, about: str) -> None:
    (table / ABOUT).write_text(about)
    assert load(KEY) is None


def link_to(elsewhere: Path) -> Callable[[Path], None]:
    return lambda file: file.symlink_to(elsewhere)


@pytest.mark.parametrize("name", [TOKENS, ABOUT, SKIPPED])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder", "nothing"])
def test_links_and_other_non_files_in_a_table_are_not_followed(
    table: Path, tmp_path: Path, name: str, kind: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (table / name).rename(elsewhere)
    before = elsewhere.read_bytes()
    make: dict[str, Callable[[Path], None]] = {
        "link": link_to(elsewhere),
        "hard link": lambda file: file.hardlink_to(elsewhere),
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "nothing": lambda _: None,
    }
    make[kind](table / name)
    assert load(KEY) is None
    assert len(content_of(write_tokens(KEY, fill))) == NUM_ROWS
    assert load(KEY) is not None
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize("name", ["", TOKENS, ABOUT, SKIPPED])
def test_a_table_of_another_user_is_not_used(table: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if os.getuid() == 0:
        os.chown(table / name, 54321, -1)
    else:
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        monkeypatch.setattr(writing, "_owner_of_new", lambda _: other)
    assert load(KEY) is None


def test_tables_are_used_on_a_disk_where_all_files_have_one_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    assert content_of(load(KEY)) == content_of(write_tokens(KEY, fill))


@pytest.mark.parametrize("kind", ["more in it", "another folder", "a file"])
def test_something_else_in_place_of_a_table_is_an_error_and_stays(table: Path, kind: str) -> None:
    if kind == "more in it":
        (table / TOKENS).write_bytes(b"damaged")
        (table / "thesis").touch()
    else:
        table.rename(table.with_name("moved"))
        if kind == "a file":
            table.write_text("thesis")
        else:
            table.mkdir()
            (table / "thesis").touch()
    assert load(KEY) is None
    with pytest.raises(DataError, match="it holds something else") as caught:
        write_tokens(KEY, fill)
    assert caught.value.hint
    assert table.read_text() == "thesis" if kind == "a file" else (table / "thesis").exists()
