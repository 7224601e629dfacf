"""Another separator than the suffix of a table implies is detected if it is clear, and reported."""

import gzip
from pathlib import Path

import pytest

from qlora_cli.data.finding.sources import find_dataset
from qlora_cli.data.opening.train_and_eval import source_notes
from qlora_cli.data.reading.separators import SAMPLE_BYTES, detect_separator
from qlora_cli.errors import DataError
from tests.support.data.reading import problems_of, read, values_of, write

ROWS = [{"question": "Name a metal, please.", "answer": 'Iron; "or" zinc.'}, {"question": "And\ta", "answer": "b|c"}]


def written(separator: str) -> str:
    """Return ROWS as a table; every value is in quotes, which no separator cuts."""
    values = [[value.replace('"', '""') for value in row.values()] for row in ROWS]
    lines = [["question", "answer"], *([f'"{value}"' for value in row] for row in values)]
    return "".join(separator.join(line) + "\r\n" for line in lines)


def note_of(path: Path) -> list[str]:
    return list(source_notes([find_dataset(str(path))], []))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize(
    ("separator", "name"),
    [
        (",", "commas"),
        (";", "semicolons"),
        ("\t", "tabs"),
        ("|", "bars (|)"),
        (", ", "commas and spaces"),
        ("; ", "semicolons and spaces"),
    ],
)
def test_the_separator_of_the_first_rows_is_detected_and_reported(
    tmp_path: Path, suffix: str, separator: str, name: str
) -> None:
    content = written(separator).encode()
    path = write(tmp_path / f"a.{suffix}", gzip.compress(content) if suffix.endswith("gz") else content)
    assert values_of(path) == ROWS
    assert values_of(f"{path}#2") == ROWS
    is_usual = separator == ("\t" if suffix == "tsv" else ",")
    assert note_of(path) == ([] if is_usual else [f"{path}: fields are separated by {name}"])


def test_the_first_line_may_declare_the_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\ufeffsep=^\r\ntext\r\na;b,c\r\n")
    assert values_of(path) == [{"text": "a;b,c"}]
    assert [row.line for row in read(path)] == [3]
    assert note_of(path) == [f"{path}: fields are separated by '^'"]


@pytest.mark.parametrize(
    "content",
    [
        "text\na;b\nc|d\n",  # of one column
        "text\n1;2\n3;4\n",
        "a,b\n1;2,3\n4,5\n",
        "a;b,c;d\n1;2,3;4\n",
        "a;b|c\n1;2|3\n4;5|6\n",  # of two that fit
        "a;;b\n1;2;3\n",  # a name that is none
        "a;a\n1;2\n",
        "a b\n1 2\n",
        "a;b\n1\n2\n3\n",  # every row is of one field
        "",
    ],
)
def test_commas_are_the_default_if_in_doubt(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "a.csv", content)
    assert (detect_separator(path).character, detect_separator(path).has_space) == (",", False)


def test_a_bad_row_does_not_change_the_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a;b\n1;2\n3;4;5\n6;7;8\n8;9\n")
    problem = "3 fields separated by semicolons, the header has 2"
    assert problems_of(path)[1:3] == [(2, 3, problem), (3, 4, problem)]
    assert read(path)[3].value == {"a": "8", "b": "9"}
    path = write(tmp_path / "b.csv", "a,b\n1,2\n3,4;5,6\n")
    assert problems_of(path)[1] == (2, 3, "3 fields, the header has 2")


def test_a_trailing_separator_is_accepted(tmp_path: Path) -> None:
    assert values_of(write(tmp_path / "a.csv", "a;b;\n1;2;\n")) == [{"a": "1", "b": "2", "": ""}]


def test_only_the_first_rows_decide_the_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'a;b\n"x";"' + "y" * SAMPLE_BYTES + '"\n1;2;3\n')
    assert [number for number, _, problem in problems_of(path) if problem] == [2]
    longest = write(tmp_path / "b.csv", '"' + "a" * SAMPLE_BYTES + '"\n1\n')
    assert len(values_of(longest)) == 1


@pytest.mark.parametrize("separator", ["\u2028", "\x0b", "\x1c"])
def test_other_line_separators_do_not_end_a_row(tmp_path: Path, separator: str) -> None:
    assert values_of(write(tmp_path / "a.csv", f"a;b\nx{separator}y;2\n")) == [{"a": f"x{separator}y", "b": "2"}]


def test_a_quote_within_a_field_is_explained(tmp_path: Path) -> None:
    (_, _, problem), *_ = problems_of(write(tmp_path / "a.csv", 'a,b\n"one "two" three",4\n'))
    assert str(problem).endswith("a quote within a field is written twice")


def test_a_table_in_another_encoding_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is UTF-16 text"):
        read(write(tmp_path / "a.csv", "a;b\n1;2\n".encode("utf-16")))
