"""Preparing rows for training: long, duplicate, held-out, mixed and bad rows; cached tokens are never stale."""

import errno
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qlora_cli.data.feeding.order import padding_share, row_order
from qlora_cli.data.feeding.prepare import PreparedData, TrainingData, prepare_data
from qlora_cli.data.reading import readers
from qlora_cli.data.tokenizing import encode, store
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.errors import DataError, SettingsError
from qlora_cli.settings.choices import Sampling
from qlora_cli.settings.models import DataSettings, TrainSettings
from qlora_cli.settings.resolve import Sources, resolve
from tests.conftest import write_jsonl
from tests.support.models.chat_tokenizers import make_tokenizer

TEXT = make_tokenizer("chatml")


def prepare(*names: str | Path, text: TextTokenizer = TEXT, seed: int = 0, **settings: Any) -> TrainingData:
    return prepare_data(DataSettings(dataset=tuple(map(str, names)), **settings), text, seed=seed)


def pairs(count: int, begin: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"number {i}: ", "completion": f"it is {i}"} for i in range(begin, begin + count)]


def texts(data: PreparedData | None, text: TextTokenizer = TEXT) -> list[str]:
    assert data is not None
    return [str(text.tokenizer.decode(row["input_ids"])) for row in data.dataset]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", pairs(40))


LONG = [{"prompt": "one ", "completion": "two " * 50}, *pairs(3), {"prompt": "long " * 60, "completion": "unseen"}]


def test_long_rows_are_truncated_and_lost_tokens_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", LONG)
    whole = prepare(path).train.report
    cut = prepare(path, max_length=24, accept_lost=True).train
    report = cut.report
    assert (report.rows, report.rows_trained, report.truncated_rows, report.dropped_rows) == (5, 4, 2, 0)
    assert report.rows_without_supervision == 1
    assert report.supervised_tokens + report.supervised_tokens_lost == whole.supervised_tokens
    assert report.longest_row_tokens == 24
    assert sum(len(row["input_ids"]) for row in cut.dataset) == report.tokens
    assert sum(label != -100 for row in cut.dataset for label in row["labels"]) == report.supervised_tokens
    assert report.tokens_lost == sum(max(0, length - 24) for length in cut.table.length)


def test_long_rows_are_dropped_with_on_long_drop(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", LONG)
    whole = prepare(path).train
    report = prepare(path, max_length=24, on_long="drop", accept_lost=True).train.report
    assert (report.rows_trained, report.truncated_rows, report.dropped_rows) == (3, 0, 2)
    assert report.tokens_lost == int(whole.table.length[[0, 4]].sum())
    assert report.supervised_tokens_lost == int(whole.table.trained[[0, 4]].sum())
    assert report.rows_without_supervision == 0


def test_long_rows_are_an_error_with_on_long_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", LONG)
    with pytest.raises(DataError, match=r"d.jsonl, row 1: \d+ tokens, more than --max-length 24, as 1 other row"):
        prepare(path, max_length=24, on_long="error")


@pytest.mark.parametrize("on_long", ["truncate", "drop"])
def test_losing_more_than_a_hundredth_is_an_error_unless_accepted(tmp_path: Path, on_long: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", LONG)
    with pytest.raises(DataError, match=r"[0-9.]+ % of the tokens to train are lost") as caught:
        prepare(path, max_length=24, on_long=on_long)
    assert "--accept-lost" in (caught.value.hint or "")
    # A small share is reported, and preparation continues.
    many = write_jsonl(tmp_path / "many.jsonl", [*pairs(1500), {"prompt": "a ", "completion": "word " * 20}])
    report = prepare(many, max_length=24, on_long=on_long).train.report
    assert 0 < report.supervised_tokens_lost / report.supervised_tokens < 0.01


def test_a_weight_does_not_hide_losses(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", LONG)
    messages = {weight: str(refused(f"{path}*{weight}", max_length=24)) for weight in ("1", "20", "0.6")}
    shares = {text.split(": ")[1].split(" %")[0] for text in messages.values()}
    assert len(shares) == 1


def refused(*names: str | Path, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        prepare(*names, **settings)
    return caught.value


def test_no_row_left_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "long " * 60, "completion": "unseen"}] * 2)
    with pytest.raises(DataError, match="of 2 rows, 2 only prompt within the first 16 tokens"):
        prepare(path, max_length=16, accept_lost=True)
    with pytest.raises(DataError, match="of 2 rows, 2 longer than 16 tokens and dropped"):
        prepare(path, max_length=16, on_long="drop", accept_lost=True)


def test_duplicate_rows_are_counted_and_dropped_if_requested(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*pairs(3), *pairs(2), *pairs(1)])
    assert prepare(path).train.report.duplicate_rows == 3
    assert len(texts(prepare(path).train)) == 6
    once = prepare(path, drop_duplicates=True).train
    assert (once.report.duplicate_rows, once.report.duplicates_dropped, len(texts(once))) == (3, 3, 3)
    # Rows that are equal only up to where they are cut are not the same row.
    long = [{"prompt": "one ", "completion": "two " * 30 + end} for end in ("a", "b")]
    cut = prepare(write_jsonl(tmp_path / "e.jsonl", long), max_length=16, accept_lost=True)
    assert cut.train.report.duplicate_rows == 0


@pytest.mark.parametrize(("share", "count"), [("5%", 2), ("25%", 10), ("0.25", 10), ("7", 7), ("1%", 1)])
def test_a_share_is_held_out_by_the_seed_without_overlap(file: Path, share: str, count: int) -> None:
    data = prepare(file, eval_split=share)
    train, held = texts(data.train), texts(data.evaluation)
    assert (len(train), len(held)) == (40 - count, count)
    assert not set(train) & set(held)
    assert data.train.report.held_out_rows == count
    assert texts(prepare(file, eval_split=share).evaluation) == held
    assert texts(prepare(file, eval_split=share, seed=1).evaluation) != held


def test_equal_rows_are_held_out_together(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", pairs(10) * 4)
    for seed in range(5):
        data = prepare(path, eval_split="8", seed=seed)
        assert len(texts(data.evaluation)) == 8
        assert not set(texts(data.train)) & set(texts(data.evaluation))


def test_rows_of_a_separate_held_out_set_are_not_trained(tmp_path: Path, file: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", pairs(5, begin=38))
    data = prepare(file, eval_dataset=(str(held),))
    assert data.train.report.held_out_rows == 2
    assert len(texts(data.train)) == 38
    assert len(texts(data.evaluation)) == 5
    with pytest.raises(DataError, match="of 40 rows, 40 held out"):
        prepare(file, eval_dataset=(str(file),))


def test_rows_that_are_equal_after_truncation_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": "one two three " * 8 + str(number)} for number in range(10)]
    path = write_jsonl(tmp_path / "d.jsonl", [*rows, *pairs(5)])
    for seed in range(4):
        data = prepare(path, eval_split="3", max_length=16, accept_lost=True, seed=seed)
        assert not set(texts(data.train)) & set(texts(data.evaluation))


def test_equal_rows_cannot_be_held_out_and_a_weight_may_take_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", pairs(1) * 10)
    assert "they are all equal" in str(refused(path, eval_split="2"))
    assert "the weight of" in str(refused(f"{path}*0.01"))


def test_holding_out_all_rows_is_an_error(file: Path) -> None:
    with pytest.raises(DataError, match=r"data.eval_split: 40 can't be held out of .* there are 40 that can be used"):
        prepare(file, eval_split="40")


def test_data_sets_are_mixed_by_weight_and_sampled_by_seed(tmp_path: Path, file: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", pairs(10, begin=100))
    mixed = texts(prepare(f"{file}#5", f"{other}*2.5").train)
    numbers = [int(row.split("number ")[1].split(":")[0]) for row in mixed]
    assert sum(number < 100 for number in numbers) == 5
    counts = [numbers.count(number) for number in range(100, 110)]
    assert sorted(counts) == [2] * 5 + [3] * 5
    assert texts(prepare(f"{file}#5", seed=1).train) != texts(prepare(f"{file}#5").train)
    assert prepare(f"{file}#5", f"{other}*2.5").train.report.duplicate_rows == 0


def test_data_sets_of_different_formats_are_mixed(tmp_path: Path, file: Path) -> None:
    chat = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    report = prepare(file, write_jsonl(tmp_path / "chat.jsonl", chat)).train.report
    assert report.format == "prompt_completion, messages"
    assert report.rows == 41


BAD = [*pairs(2), {"prompt": "p", "completion": ""}, {"prompt": "p", "completion": None}, *pairs(1, begin=9)]


def test_bad_rows_are_listed_once_if_rows_are_held_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*BAD, *pairs(10)])
    data = prepare(path, on_bad_row="skip", eval_split="2")
    assert data.train.report.bad_rows == 2
    assert data.evaluation is not None
    assert (data.evaluation.report.bad_rows, data.evaluation.skipped, data.evaluation.notes) == (0, (), ())


def test_a_bad_row_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", BAD)
    with pytest.raises(DataError, match=r"d.jsonl, row 3 \(line 3\): 'completion' is empty") as caught:
        prepare(path)
    assert "--on-bad-row skip" in (caught.value.hint or "")


def test_bad_rows_are_skipped_if_requested_counted_and_listed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", BAD)
    with path.open("ab") as file:
        file.write(b'{"prompt": "caf\xe9"}\n[1]\n{"prompt": \n')
    for _ in range(2):  # tokenized, then loaded from the cache
        data = prepare(path, on_bad_row="skip").train
        assert (data.report.rows, data.report.bad_rows, data.report.empty_answers) == (3, 5, 1)
        (listed,) = data.skipped
        rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
        assert [row["row"] for row in rows] == [3, 4, 6, 7, 8]
        assert {row["file"] for row in rows} == {str(path)}
        assert rows[2]["problem"].startswith("not UTF-8")
    assert data.table.where(2) == f"{path}, row 5"


def test_columns_of_mixed_types_name_the_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [*pairs(1), {"prompt": "p", "completion": {"nested": [1, {"a": None}]}}])
    with pytest.raises(DataError, match=r"row 2 .*: 'completion' must be text, found an object"):
        prepare(path)


def test_unused_nested_columns_are_harmless(tmp_path: Path) -> None:
    rows = [{**row, "meta": meta} for row, meta in zip(pairs(3), ({"a": [1, {"b": 2}]}, "text", None), strict=True)]
    assert prepare(write_jsonl(tmp_path / "d.jsonl", rows)).train.report.rows == 3


def never(*_: Any) -> Any:
    raise AssertionError("tokenized again")


def digest_of(data: TrainingData) -> str:
    return data.train.report.fingerprint


def test_tokens_are_cached(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = digest_of(prepare(file))

    monkeypatch.setattr(store, "write_tokens", never)
    assert digest_of(prepare(file)) == first


def test_tokens_are_never_stale(file: Path) -> None:
    before = prepare(file)
    times = file.stat()
    content = file.read_bytes()
    # Same name, same size, same time: only the content differs.
    file.write_bytes(content.replace(b"it is 7", b"it is 5"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    after = prepare(file)
    assert digest_of(after) != digest_of(before)
    assert "number 7: it is 5<|im_end|>" in texts(after.train)
    file.write_bytes(content)
    assert digest_of(prepare(file)) == digest_of(before)


CHAT_ROW = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]


def test_another_template_tokenizer_or_setting_is_another_cache_entry(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", CHAT_ROW)
    other_template = make_tokenizer("chatml")
    other_template.tokenizer.chat_template = f"A chat.{other_template.tokenizer.chat_template}"
    other_vocabulary = make_tokenizer("chatml")
    other_vocabulary.tokenizer.add_tokens(["assistant"])
    digests = [
        digest_of(prepare(path)),
        digest_of(prepare(path, text=other_template)),
        digest_of(prepare(path, text=other_vocabulary)),
        digest_of(prepare(path, text=make_tokenizer("llama"))),
        digest_of(prepare(path, loss_on="all")),
        digest_of(prepare(path, max_length=8, accept_lost=True, loss_on="all")),
    ]
    assert len(set(digests)) == len(digests)


def test_a_template_that_writes_the_date_is_rendered_again_each_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", CHAT_ROW)
    text = make_tokenizer("chatml")
    text.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + str(text.tokenizer.chat_template)

    class Tomorrow(date):
        @classmethod
        def today(cls) -> "Tomorrow":
            return cls(2999, 1, 1)

    prepare(path, text=text)
    monkeypatch.setattr(encode, "date", Tomorrow)
    monkeypatch.setattr(store, "write_tokens", never)
    with pytest.raises(AssertionError, match="tokenized again"):
        prepare(path, text=text)


def test_a_damaged_table_is_rewritten(file: Path) -> None:
    first = prepare(file)
    for table in (Path(os.environ["QLORA_CACHE"]) / "data").glob("*/tokens.arrow"):
        table.unlink()  # what is open stays what it is
        table.write_bytes(b"damaged")
    assert digest_of(prepare(file)) == digest_of(first)


def test_inspected_data_is_trained_without_tokenizing_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_data(DataSettings(dataset=(str(file),)), TEXT, seed=0, inspect_only=True)
    monkeypatch.setattr(store, "write_tokens", never)
    prepare(file)
    assert len(texts(prepare(f"{file}*2").train)) == 80


def test_a_truncated_table_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "d.jsonl", pairs(3000))
    first = prepare(path)
    (table,) = (tmp_path / "cache" / "data").glob("*/tokens.arrow")
    batches = list(pa.ipc.open_stream(table.read_bytes()))
    table.unlink()  # what is open stays what it is
    assert len(batches) > 1
    with pa.OSFile(str(table), "wb") as sink, pa.ipc.new_stream(sink, batches[0].schema) as short:
        short.write_batch(batches[0])
    assert digest_of(prepare(path)) == digest_of(first)
    (table.parent / "about.json").write_text("{}")
    assert digest_of(prepare(path)) == digest_of(first)


def test_a_file_that_changes_while_it_is_read_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = readers.read_rows

    def changed_meanwhile(*arguments: Any, **options: Any) -> Any:
        file.write_bytes(file.read_bytes() + b"\n")
        return read(*arguments, **options)

    monkeypatch.setattr(encode, "read_rows", changed_meanwhile)
    with pytest.raises(DataError, match="was changed while it was read"):
        prepare(file)


def test_a_full_cache_disk_is_an_error_that_names_the_setting(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.TokenWriter, "write", full)
    error = refused(file)
    assert "tokens can't be cached in" in str(error)
    assert "QLORA_CACHE" in (error.hint or "")


def test_incomplete_tokens_leave_no_files(tmp_path: Path) -> None:
    cache = Path(os.environ["QLORA_CACHE"]) / "data"
    prepare(write_jsonl(tmp_path / "good.jsonl", pairs(1)))
    before = {path.name for path in cache.iterdir()}
    with pytest.raises(DataError):
        prepare(write_jsonl(tmp_path / "bad.jsonl", BAD))
    assert {path.name for path in cache.iterdir()} == before


def test_an_unwritable_cache_is_an_error_that_names_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    monkeypatch.setenv("QLORA_CACHE", str(blocked))
    with pytest.raises(DataError, match="tokens can't be cached in"):
        prepare(file)


def test_old_tables_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "MAX_TABLES", 3)
    monkeypatch.setattr(store, "MIN_UNUSED_SECONDS", 0)
    for number in range(5):
        prepare(write_jsonl(tmp_path / f"{number}.jsonl", pairs(2, begin=number)))
    tables = list((tmp_path / "cache" / "data").iterdir())
    assert len(tables) == 3
    assert {table.stat().st_mode & 0o777 for table in (*tables, tmp_path / "cache" / "data")} == {0o700}


def test_other_folders_in_the_cache_are_never_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    monkeypatch.setenv("QLORA_CACHE", str(disk))
    monkeypatch.setattr(store, "MAX_TABLES", 1)
    monkeypatch.setattr(store, "MIN_UNUSED_SECONDS", 0)
    elsewhere.mkdir()
    (elsewhere / store.TOKENS).touch()
    folders = ["project", ".project.1-a.saving", ".project.1.saving", "a" * 64, "b" * 64]
    for name in folders:
        (disk / "data" / name).mkdir(parents=True)
        (disk / "data" / name / "thesis").touch()
    (disk / "data" / ("c" * 64)).mkdir()  # an empty one is not known to be ours
    (disk / "data" / ("d" * 64)).symlink_to(elsewhere)
    for number in range(3):
        prepare(write_jsonl(tmp_path / f"{number}.jsonl", pairs(2, begin=number)))
    assert all((disk / "data" / name / "thesis").exists() for name in folders)
    assert (disk / "data" / ("c" * 64)).is_dir()
    assert (disk / "data" / ("d" * 64)).is_symlink()
    assert (elsewhere / store.TOKENS).exists()
    assert len(list((disk / "data").iterdir())) == len(folders) + 2 + 1


def test_a_link_in_place_of_a_table_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    file = write_jsonl(tmp_path / "rows.jsonl", pairs(2))
    prepare(file)
    (table,) = (tmp_path / "cache" / "data").iterdir()
    table.rename(tmp_path / "elsewhere")
    table.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / store.ABOUT).write_text("{")
    prepare(file)
    assert not table.is_symlink()
    assert (tmp_path / "elsewhere" / store.ABOUT).read_text() == "{"


LENGTHS = np.array([3, 9, 5, 7, 1, 8, 2, 6])


@pytest.mark.parametrize("sampling", list(Sampling))
@pytest.mark.parametrize("longest_first", [True, False])
def test_every_order_has_every_row_once(sampling: Sampling, longest_first: bool) -> None:
    orders = [
        row_order(LENGTHS, sampling, batch_rows=2, longest_first=longest_first, seed=3, epoch=epoch)
        for epoch in (0, 0, 1)
    ]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] == orders[1]
    if sampling != Sampling.SEQUENTIAL:
        assert orders[0] != orders[2]
    if longest_first:
        assert orders[0][:2] == [1, 5]


def test_batches_of_one_length_have_less_padding() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 400)

    def share(sampling: Sampling) -> float:
        return padding_share(lengths, row_order(lengths, sampling, batch_rows=8, longest_first=False, seed=0), 8)

    assert share(Sampling.RANDOM) > 0.3
    assert share(Sampling.GROUP_BY_LENGTH) < 0.1
    assert padding_share(LENGTHS, list(range(8)), 2) == pytest.approx(1 - 41 / 60)
    assert padding_share(LENGTHS, list(range(8)), 1) == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"data.packing": True, "training.sampling": "group_by_length"}, "no effect with packing"),
        ({"data.packing": True, "training.longest_first": True}, "no effect with packing"),
        ({"data.eval_split": "5%", "data.eval_dataset": "e.jsonl"}, "would hold rows out"),
        ({"data.streaming": True}, "training.max_steps must say where to stop"),
        ({"data.streaming": True, "training.max_steps": 1, "data.eval_split": "5%"}, "needs to read all rows"),
        ({"data.streaming": True, "training.max_steps": 1, "data.drop_duplicates": True}, "to know duplicates"),
        ({"data.streaming": True, "training.max_steps": 1, "training.longest_first": True}, "to know the longest"),
        ({"data.streaming": True, "training.max_steps": 1, "training.sampling": "sequential"}, "to order them"),
        ({"training.eval_steps": 2}, "no effect without held-out data"),
        ({"data.eval_split": "120%"}, "expected a share above 0% and below 100%"),
        ({"data.eval_split": "0.0"}, "expected a share above 0% and below 100%"),
        ({"data.eval_split": "1.5"}, "expected a share above 0% and below 100%"),
        ({"data.columns": "prompt"}, "expected pairs such as"),
    ],
)
def test_conflicting_settings_are_refused(flags: dict[str, object], expected: str) -> None:
    values = {"model.name": "m", "data.dataset": "d.jsonl", "output.directory": "o", **flags}
    with pytest.raises(SettingsError, match=expected):
        resolve(Sources(flags={path: (path, value) for path, value in values.items()}), TrainSettings)
