"""Data sets on the hub, against a hub on loopback: rows, samples, commits, errors, and offline use.

Names are read in separate processes, several in each, because the client reads its environment when it is imported.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.finding.sources import find_dataset
from qlora_cli.data.reading.readers import read_rows, resolve_hub
from qlora_cli.errors import QloraError
from tests.support.processes.forks import output_of
from tests.support.processes.hub_server import COMMIT, OLD_COMMIT, Hub, Repo, serving

TOOLS = [{"tools": [{"name": "f", "schema": {"a": 1}}]}, {"tools": [{"name": "g"}]}, {"tools": None}]
CARD = """---
configs:
- config_name: first
  data_files: [{split: train, path: one.jsonl}, {split: dev, path: two.jsonl}]
- config_name: second
  data_files: two.jsonl
---
"""


def lines(*values: object) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def numbered(letter: str, count: int) -> bytes:
    return lines(*({"text": f"{letter}{number}"} for number in range(1, count + 1)))


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    configs = {"README.md": CARD.encode(), "one.jsonl": numbered("one", 2), "two.jsonl": numbered("two", 2)}
    plain = {"train.jsonl": numbered("t", 40), "validation.jsonl": numbered("v", 3)}
    repos = {
        "owner/plain": Repo(
            commits={COMMIT: plain, OLD_COMMIT: {"train.jsonl": numbered("old", 2)}},
            refs={"main": COMMIT, "v1": OLD_COMMIT},
        ),
        "owner/configs": Repo(commits={COMMIT: configs}),
        "owner/tools": Repo(commits={COMMIT: {"train.jsonl": lines(*TOOLS)}}),
        "owner/script": Repo(commits={COMMIT: {"script.py": b"x"}}),
        "owner/empty": Repo(commits={COMMIT: {"notes.docx": b"x"}}),
        "owner/broken": Repo(commits={COMMIT: {"train.jsonl": b'{"a": 1}\n{"a": \n'}}),
        "owner/gated": Repo(commits={COMMIT: configs}, is_gated=True),
    }
    with serving(Hub(repos=repos)) as hub:
        yield hub


@pytest.fixture
def env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return hub.environment(tmp_path / "hf-home")


def ask(env: dict[str, str], *names: str, streaming: bool = False) -> list[dict[str, Any]]:
    """Return for each name its commit and its rows as `[number, value]`, or the error."""
    asked = json.dumps({"names": names, "streaming": streaming})
    code, stdout, stderr = output_of([asked], {**os.environ, **env}, module="tests.integration.data.test_data_hub")
    assert code == 0, stderr
    return [json.loads(line) for line in stdout.splitlines()]


def texts(result: dict[str, Any]) -> list[str]:
    assert "error" not in result, result
    return [value["text"] for _, value in result["rows"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_revision_config_and_split_of_the_name_are_read(env: dict[str, str], streaming: bool) -> None:
    names = (
        "owner/plain",
        "owner/plain@v1",
        "owner/plain::validation",
        "owner/configs:first:dev",
        "owner/configs:second",
    )
    plain, old, held_out, dev, second = ask(env, *names, streaming=streaming)
    assert texts(plain) == [f"t{number}" for number in range(1, 41)]
    assert [number for number, _ in plain["rows"]] == list(range(1, 41))
    assert texts(old) == ["old1", "old2"]
    assert texts(held_out) == ["v1", "v2", "v3"]
    assert texts(dev) == texts(second) == ["two1", "two2"]
    assert [dataset["commit"] for dataset in (plain, old, second)] == [COMMIT, OLD_COMMIT, COMMIT]
    assert plain["files"] == ["owner/plain"]


@pytest.mark.parametrize("streaming", [False, True])
def test_nested_nulls_are_missing_keys_and_a_null_column_stays(env: dict[str, str], streaming: bool) -> None:
    (dataset,) = ask(env, "owner/tools", streaming=streaming)
    assert [value for _, value in dataset["rows"]] == TOOLS


def test_a_sample_keeps_the_numbers_and_order_of_its_rows(env: dict[str, str]) -> None:
    sample, again, part, too_many = ask(
        env, "owner/plain#10", "owner/plain#10*2", "owner/plain::train[50%:]", "owner/plain#41"
    )
    numbers = [number for number, _ in sample["rows"]]
    assert numbers == sorted(set(numbers))
    assert texts(sample) == [f"t{number}" for number in numbers]
    assert len(numbers) == 10
    assert again["rows"] == sample["rows"]
    assert texts(part) == [f"t{number}" for number in range(21, 41)]
    assert (too_many["error"], "asks for 41 rows, but has 40 rows" in too_many["message"]) == ("DataError", True)


def test_a_streamed_sample_is_shuffled_and_has_the_requested_size(env: dict[str, str]) -> None:
    sample, again, too_many, part = ask(
        env, "owner/plain#10", "owner/plain#10*2", "owner/plain#41", "owner/plain::train[50%:]", streaming=True
    )
    assert len(set(texts(sample))) == 10
    assert texts(sample) != [f"t{number}" for number in range(1, 11)]
    assert again["rows"] == sample["rows"]
    assert "asks for 41 rows, but has 40 rows" in too_many["message"]
    assert "can't be streamed" in part["hint"]


REFUSALS = [
    ("owner/none", "DatasetNotFoundError", "the hub does not have it", "hf auth login"),
    ("json", "DatasetNotFoundError", "the hub does not have it", "Check the name"),  # no reader of `datasets`
    ("owner/plain@v2", "DatasetNotFoundError", "owner/plain has no revision 'v2'", "branch, tag or commit"),
    ("owner/gated", "DatasetNotFoundError", "owner/gated is gated", "huggingface.co/datasets/owner/gated"),
    ("owner/plain:en", "DataError", "'en' not found", "It has default"),
    ("owner/configs", "DataError", "Config name is missing", "It has first, second"),
    ("owner/configs:third", "DataError", "'third' not found", "write owner/configs:first"),
    (
        "owner/configs:first:test",
        "DataError",
        "test",
        "It has train, dev; for the first one write owner/configs:first:train",
    ),
    ("owner/plain::test", "DataError", "test", "It has train, validation; for the first one write owner/plain::train"),
    ("owner/script", "DataError", "Dataset scripts are no longer supported", "owner/script@refs/convert/parquet"),
    ("owner/empty", "DataError", "owner/empty holds no data", "Look at its files"),
    ("owner/broken", "DataError", "JSON parse error", "the same columns"),
]


@pytest.mark.parametrize("streaming", [False, True])
def test_errors_name_the_available_configs_and_splits(env: dict[str, str], streaming: bool) -> None:
    errors = ask(env, *(name for name, *_ in REFUSALS), streaming=streaming)
    assert [(name, refused["error"]) for (name, *_), refused in zip(REFUSALS, errors, strict=True)] == [
        (name, error) for name, error, *_ in REFUSALS
    ]
    for (_, _, message, hint), refused in zip(REFUSALS, errors, strict=True):
        assert message in refused["message"]
        assert hint in refused["hint"]


def test_offline_reads_the_cached_commit_and_never_another_one(env: dict[str, str]) -> None:
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    (unknown,) = ask(offline, "owner/plain")
    assert unknown["error"] == "DatasetNotFoundError"
    assert "HF_HUB_OFFLINE=1 is set" in unknown["message"]
    before = ask(env, "owner/plain@v1", "owner/plain")
    assert texts(before[0]) == ["old1", "old2"]
    plain, by_commit, old = ask(offline, "owner/plain", f"owner/plain@{COMMIT}", "owner/plain@v1")
    assert (plain["rows"], plain["commit"]) == (before[1]["rows"], COMMIT)
    assert by_commit["rows"] == before[1]["rows"]
    # The library would take the rows that were cached last.
    assert old["error"] == "DatasetNotFoundError"
    assert f"commit {OLD_COMMIT[:12]}, but the local cache was last filled with {COMMIT[:12]}" in old["message"]


def test_an_unreachable_or_failing_hub_is_an_error(hub: Hub, env: dict[str, str]) -> None:
    (away,) = ask({**env, "HF_ENDPOINT": "http://127.0.0.1:9"}, "owner/plain")
    assert away["error"] == "DatasetNotFoundError"
    assert "the hub can't be reached (ConnectError: " in away["message"]
    hub.statuses["api/datasets/owner/plain"] = [500]
    (broken,) = ask(env, "owner/plain")
    assert broken["error"] == "DatasetNotFoundError"
    assert "500" in broken["message"]


def main() -> None:
    """Print what `ask` returns, one object a line."""
    asked = json.loads(sys.argv[1])
    for name in asked["names"]:
        try:
            source = find_dataset(name)
            rows = list(read_rows(source, split="train", seed=3, streaming=asked["streaming"]))
            assert all(row.problem is None and row.line is None for row in rows)
            files = sorted({row.file for row in rows})
            result = {"rows": [[row.number, row.value] for row in rows], "files": files, "commit": resolve_hub(source)}
        except QloraError as error:
            result = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
        print(json.dumps(result))


if __name__ == "__main__":
    main()
