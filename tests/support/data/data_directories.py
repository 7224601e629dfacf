"""What is read of a data set in a directory `set`, the error that refuses it, and the notes on it."""

from qlora_cli.data.finding.sources import check_dataset_name, find_dataset
from qlora_cli.data.opening.train_and_eval import held_out_sources, source_notes, trained_sources
from qlora_cli.errors import DataError
from qlora_cli.settings.models import DataSettings


def files_of(name: str, split: str = "train") -> list[str]:
    """Return the files of a split, relative to the directory."""
    source = find_dataset(name, split)
    top = next(path for path in source.files[0].parents if path.name == "set")
    return [str(path.relative_to(top)) for path in source.files]


def refusal(name: str, split: str = "train") -> DataError:
    """Return the error that refuses a name."""
    problem = check_dataset_name(name, split)
    assert isinstance(problem, DataError)
    assert problem.hint
    return problem


def notes_of(*names: str, **settings: object) -> list[str]:
    """Return the notes on data sets."""
    data = DataSettings.model_validate({"dataset": names, **settings})
    return list(source_notes(trained_sources(data), held_out_sources(data)))
