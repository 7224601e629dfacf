"""Data sets are mixed by their weights: by how often each row is fed, or by probability."""

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, interleave_datasets

from qlora_cli.data.feeding.data_report import describe_mixture
from qlora_cli.data.feeding.mixing import mix
from qlora_cli.data.feeding.prepare import TrainingData, prepare_data
from qlora_cli.data.finding.sources import DatasetSource
from qlora_cli.data.showing.inspection import inspect_data
from qlora_cli.errors import DataError, SettingsError
from qlora_cli.settings.choices import Mixing
from qlora_cli.settings.models import DataSettings, TrainingSettings, TrainSettings
from qlora_cli.settings.resolve import Sources, resolve
from tests.conftest import write_jsonl
from tests.support.models.chat_tokenizers import make_tokenizer

TEXT = make_tokenizer("chatml")


def prepare(*names: str | Path, seed: int = 0, **settings: Any) -> TrainingData:
    return prepare_data(DataSettings(dataset=tuple(map(str, names)), **settings), TEXT, seed=seed)


def rows_of(path: Path, count: int) -> Path:
    return write_jsonl(path, [{"prompt": f"{path.stem} {i}: ", "completion": f"it is {i}"} for i in range(count)])


def fed(data: TrainingData) -> list[str]:
    """Return the beginning of each row that is fed: its file and number."""
    texts = [str(TEXT.tokenizer.decode(row["input_ids"])).removeprefix("<s>") for row in data.train.dataset]
    return [text.split(":")[0].strip() for text in texts]


def files_of(rows: list[str]) -> Counter[str]:
    return Counter(row.split()[0] for row in rows)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return rows_of(tmp_path / "small.jsonl", 30)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return rows_of(tmp_path / "large.jsonl", 140)


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        ("weights", {"small": 9, "large": 98}),
        ("first_exhausted", {"small": 30, "large": 70}),
        ("all_exhausted", {"small": 60, "large": 140}),
    ],
)
def test_weights_are_fractions_of_data_sets_or_shares_of_the_mixture(
    small: Path, large: Path, mixing: str, expected: dict[str, int]
) -> None:
    data = prepare(f"{small}*0.3", f"{large}*0.7", mixing=mixing)
    rows = fed(data)
    assert files_of(rows) == expected
    times = Counter(rows)
    for file, number in {"small": 30, "large": 140}.items():
        counts = [times[f"{file} {i}"] for i in range(number)]
        assert max(counts) - min(counts) <= 1  # no row is fed twice before each is fed once
    assert [part.rows for part in data.train.report.mixture] == list(expected.values())
    assert fed(prepare(f"{small}*0.3", f"{large}*0.7", mixing=mixing)) == rows


@pytest.mark.parametrize("mixing", [Mixing.FIRST_EXHAUSTED, Mixing.ALL_EXHAUSTED])
@pytest.mark.parametrize("probabilities", [(0.3, 0.7), (0.5, 0.5), (0.1, 0.2, 0.7)])
def test_a_mixture_equals_that_of_interleave_datasets(mixing: Mixing, probabilities: tuple[float, ...]) -> None:
    sizes = (2000, 3000, 9000)[: len(probabilities)]
    place = np.repeat(np.arange(len(sizes)), sizes)
    sources = [DatasetSource(name=f"d{i}", weight=Fraction(str(each))) for i, each in enumerate(probabilities)]
    ours = Counter(place[mix(np.arange(len(place)), place, sources, mixing, 0)].tolist())
    theirs = Counter(
        interleave_datasets(
            [Dataset.from_dict({"place": [number] * size}) for number, size in enumerate(sizes)],
            probabilities=list(probabilities),
            seed=0,
            stopping_strategy=mixing.value,
        )["place"]
    )
    assert ours.keys() == theirs.keys()
    for number, count in theirs.items():
        assert ours[number] == pytest.approx(count, rel=0.12)


def test_probabilities_need_not_sum_to_1(small: Path, large: Path) -> None:
    by_percent = fed(prepare(f"{small}*30", f"{large}*70", mixing="first_exhausted"))
    assert by_percent == fed(prepare(f"{small}*0.3", f"{large}*0.7", mixing="first_exhausted"))
    assert files_of(fed(prepare(small, large, mixing="first_exhausted"))) == {"small": 30, "large": 30}


def test_a_fraction_of_a_data_set_is_sampled_by_the_seed(small: Path, large: Path) -> None:
    names = (f"{small}*0.3", f"{large}*0.7")
    drawn = [set(fed(prepare(*names, mixing="first_exhausted", seed=seed))) for seed in range(3)]
    assert drawn[0] != drawn[1] != drawn[2]
    assert all(len(rows) == 100 for rows in drawn)


def test_shares_are_of_the_rows_left_to_train_on(tmp_path: Path, small: Path) -> None:
    rows = [{"prompt": f"other {i}: ", "completion": "" if i % 2 else "yes"} for i in range(40)]
    other = write_jsonl(tmp_path / "other.jsonl", rows)
    held = write_jsonl(
        tmp_path / "held.jsonl", [{"prompt": f"small {i}: ", "completion": f"it is {i}"} for i in range(10)]
    )
    data = prepare(small, other, mixing="first_exhausted", on_bad_row="skip", eval_dataset=(str(held),))
    assert files_of(fed(data)) == {"small": 20, "other": 20}


def test_a_data_set_without_rows_cannot_be_mixed_by_probability(tmp_path: Path, small: Path) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "word " * 60, "completion": "yes"}])
    settings: dict[str, Any] = {"max_length": 32, "on_long": "drop", "accept_lost": True}
    with pytest.raises(DataError, match=r"no row of .*long.jsonl can be trained, so it can't be mixed"):
        prepare(small, long, mixing="all_exhausted", **settings)
    assert f"no row of {long} is fed" in prepare(small, long, **settings).train.notes


def test_a_mixture_that_repeats_rows_too_often_is_an_error(small: Path, large: Path) -> None:
    with pytest.raises(DataError, match=r"each row of .*small.jsonl\*1000 would be fed 4,667 times") as caught:
        prepare(f"{small}*1000", large, mixing="all_exhausted")
    assert "--mixing first_exhausted" in (caught.value.hint or "")
    assert files_of(fed(prepare(f"{small}*1000", large, mixing="first_exhausted"))) == {"small": 30}


def test_the_contribution_of_each_data_set_is_reported(small: Path, large: Path) -> None:
    settings = DataSettings(dataset=(f"{small}*0.3", f"{large}*0.7"), mixing=Mixing.FIRST_EXHAUSTED)
    inspection = inspect_data(settings, TrainingSettings(), TEXT, num_previews=1)
    parts = inspection.as_json()["mixture"]
    assert [(part["name"], part["rows"], part["share"]) for part in parts] == [
        (f"{small}*0.3", 30, 0.3),
        (f"{large}*0.7", 70, 0.7),
    ]
    assert sum(part["supervised_tokens"] for part in parts) == inspection.data.supervised_tokens
    assert f"{small}*0.3: 30 rows (30.0%, " in describe_mixture(inspection.data)


def test_weights_that_sum_to_1_get_a_note_about_probabilities(small: Path, large: Path) -> None:
    note = "to mix by probability give --mixing first_exhausted or all_exhausted"

    def gets_note(*names: str, **settings: Any) -> bool:
        return any(note in each for each in prepare(*names, **settings).train.notes)

    assert gets_note(f"{small}*0.3", f"{large}*0.7")
    assert not gets_note(f"{small}*0.3", f"{large}*0.7", mixing="first_exhausted")
    assert not gets_note(f"{small}*0.3", f"{large}*0.5")
    assert not gets_note(str(small))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"data.dataset": "d.jsonl"}, "has no effect on a single data set"),
        ({"data.dataset": ["a", "b"], "data.streaming": True, "training.max_steps": 1}, "has no effect on a stream"),
    ],
)
def test_a_mixing_without_effect_is_an_error(flags: dict[str, object], expected: str) -> None:
    values = {"model.name": "m", "output.directory": "o", "data.mixing": "first_exhausted", **flags}
    with pytest.raises(SettingsError, match=expected):
        resolve(Sources(flags={path: (path, value) for path, value in values.items()}), TrainSettings)
