"""Damaged files of rows: Arrow, Parquet, and text."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.fuzzing.frame import Generator, Target, damage
from tests.support.data.reading import read

ROWS = [
    {
        "n": n,
        "text": "é" * n,
        "kind": "ab"[n % 2],
        "chat": [{"role": "user", "content": str(n)}] * (n % 3),
        "deep": {"x": [None, {"y": 1.5}]} if n % 2 else None,
    }
    for n in range(40)
]
COMPRESSIONS = (None, "lz4", "zstd")


def _table() -> Any:
    table = pyarrow.Table.from_pylist(ROWS)
    index = table.schema.get_field_index("kind")
    return table.set_column(index, "kind", table["kind"].dictionary_encode())


def _arrow(path: Path, compression: str | None, *, as_stream: bool) -> bytes:
    table = _table()
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    make = pyarrow.ipc.new_stream if as_stream else pyarrow.ipc.new_file
    with make(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=25)
    return path.read_bytes()


def _arrow_rounds(directory: Path) -> Callable[[Generator], None]:
    path = directory / "a.arrow"
    kinds = [_arrow(path, each, as_stream=as_stream) for each in COMPRESSIONS for as_stream in (True, False)]

    def play_round(chance: Generator) -> None:
        path.write_bytes(damage(kinds[chance.integers(len(kinds))], chance))
        read(path)

    return play_round


def _parquet_rounds(directory: Path) -> Callable[[Generator], None]:
    path, kinds = directory / "a.parquet", []
    for compression in ("none", "snappy", "zstd"):
        pyarrow.parquet.write_table(_table(), path, compression=compression, row_group_size=25)
        kinds.append(path.read_bytes())

    def play_round(chance: Generator) -> None:
        path.write_bytes(damage(kinds[chance.integers(len(kinds))], chance))
        read(path)

    return play_round


def _text_rounds(directory: Path) -> Callable[[Generator], None]:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    table = "".join(f'{row["n"]},"{row["text"]}"\n' for row in ROWS)
    kinds = {"a.jsonl": lines, "a.json": json.dumps(ROWS), "b.json": json.dumps({"rows": ROWS}), "a.csv": table}
    contents = [(name, text.encode()) for name, text in kinds.items()]
    contents += [(f"{name}.gz", gzip.compress(content)) for name, content in contents]

    def play_round(chance: Generator) -> None:
        name, content = contents[chance.integers(len(contents))]
        (directory / name).write_bytes(damage(content, chance) or b" ")
        read(directory / name)

    return play_round


ARROW = Target(name="arrow", prepare=_arrow_rounds, num_rounds=350)
PARQUET = Target(name="parquet", prepare=_parquet_rounds, num_rounds=400)
TEXT = Target(name="text", prepare=_text_rounds, num_rounds=1500)
