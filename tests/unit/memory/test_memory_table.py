"""docs/reference/memory.md and the figure of a step are reproduced by predicting again."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from qlora_cli.memory.catalogue import find_in_catalogue
from qlora_cli.memory.gpus import find_gpu

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "reference" / "memory.md"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """`scripts/make_memory_table.py` and `make_memory_figure.py`, imported."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("make_memory_table"), importlib.import_module("make_memory_figure")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def table(scripts: tuple[ModuleType, ModuleType]) -> ModuleType:
    """`scripts/make_memory_table.py`."""
    return scripts[0]


def rows() -> dict[str, str]:
    """Return the rows of the page by the name of the model."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def test_every_row_is_of_a_model_of_the_catalogue_in_the_order_of_the_script(table: ModuleType) -> None:
    names = [name for family in table.FAMILIES.values() for name in family]
    assert len(names) >= 35
    assert list(rows()) == names, "run: make memory-table"
    for name in names:
        model = find_in_catalogue(name)
        assert model is not None
        assert model.name == name


def test_every_card_has_its_name_in_the_catalogue_and_the_smallest_comes_first(table: ModuleType) -> None:
    cards = [find_gpu(card) for card in table.CARDS]
    assert [card.name for card in cards] == list(table.CARDS)
    assert cards == sorted(cards, key=lambda card: card.total_bytes)


def test_the_text_around_the_rows_is_up_to_date(table: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(table.HEAD), "run: make memory-table"
    for family in table.FAMILIES:
        assert "\n".join([f"## {family}", "", *table.header()]) in text, "run: make memory-table"


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "tinyllama-1.1b"])
def test_a_predicted_row_equals_the_one_on_the_page(table: ModuleType, name: str) -> None:
    assert rows()[name] == table.row(name), "run: make memory-table"


def test_the_figure_of_a_step_shows_the_predicted_peaks(
    scripts: tuple[ModuleType, ModuleType],
) -> None:
    figure = scripts[1]
    shown = figure.FIGURES / figure.FIGURE
    assert shown.stat().st_size < 200_000
    with Image.open(shown) as image:
        assert image.info["Description"] == figure.describe(figure.second_step()), "run: make figures"
