"""Collected errors: a single one unchanged, several as problems, and errors in the input before those of memory."""

import pytest

from qlora_cli.errors import DataError, ModelError, OutOfMemoryError, Problem, SettingsError
from qlora_cli.settings.error_collector import ErrorCollector


def test_without_collected_errors_nothing_is_raised() -> None:
    wrong = ErrorCollector()
    with wrong.collecting("model.name"):
        pass
    wrong.raise_collected()
    assert wrong.error is None


def test_a_single_error_is_raised_unchanged() -> None:
    wrong, error = ErrorCollector(), ModelError("is none", hint="Look.")
    wrong.add("model.name", error)
    wrong.add("data.dataset", ModelError("is none", hint="Look."))  # the same again
    assert wrong.error is error


def test_several_errors_become_problems_of_one_each_with_its_setting() -> None:
    wrong = ErrorCollector()
    wrong.add("model.name", SettingsError([Problem(where="a", message="1"), Problem(where="b", message="2")]))
    wrong.extend([("data.dataset", DataError("has no column", hint="Name it.", setting="data.columns"))])
    with pytest.raises(SettingsError) as caught:
        wrong.raise_collected()
    assert caught.value.problems == (
        Problem(where="a", message="1"),
        Problem(where="b", message="2"),
        Problem(where="--columns", message="has no column", hint="Name it."),
    )


def test_a_lack_of_memory_is_reported_after_errors_in_the_input() -> None:
    wrong = ErrorCollector()
    with pytest.raises(OutOfMemoryError), wrong.collecting("model.name"):
        raise OutOfMemoryError("too large")
    wrong.add("data.dataset", DataError("has no rows"))
    with pytest.raises(DataError, match="has no rows"), wrong.collecting("model.name"):
        raise OutOfMemoryError("too large")
