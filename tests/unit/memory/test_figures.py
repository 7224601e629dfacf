"""The figures and numbers of docs/explanation are reproduced when drawn and computed again."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]
EXPLANATION = ROOT / "docs" / "explanation"
HOW_TO = ROOT / "docs" / "how-to"
MIB, GIB = 1024**2, 1024**3


def page(path: Path) -> str:
    """Return the text of a page with its lines joined."""
    return " ".join(path.read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def figures() -> Iterator[ModuleType]:
    """`scripts/make_figures.py`, imported."""
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("make_figures")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def drawn(figures: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The figure, drawn again, and the errors that it shows."""
    directory = tmp_path_factory.mktemp("figures")
    return directory / "nf4.png", figures.write(directory)


@pytest.mark.slow
def test_the_figure_in_the_documentation_has_the_size_and_numbers_of_a_fresh_one(
    figures: ModuleType, drawn: tuple[Path, dict[str, float]]
) -> None:
    figure, errors = drawn
    shown = EXPLANATION / "figures" / "nf4.png"
    assert shown.stat().st_size < 200_000
    assert figure.stat().st_size < 200_000
    with Image.open(shown) as committed, Image.open(figure) as fresh:
        assert committed.size == fresh.size
        assert committed.info["Description"] == figures.describe(errors), "run: make figures"


def test_a_figure_is_drawn_the_same_each_time(figures: ModuleType, drawn: tuple[Path, dict[str, float]]) -> None:
    figure, errors = drawn
    again = figure.with_name("again.png")
    figures.save(errors, again)
    assert again.read_bytes() == figure.read_bytes()


def test_the_errors_in_the_text_equal_the_measured_ones(
    figures: ModuleType, drawn: tuple[Path, dict[str, float]]
) -> None:
    _, errors = drawn
    lines = (EXPLANATION / "nf4.md").read_text(encoding="utf-8").splitlines()
    for name, error in errors.items():
        (row,) = [line for line in lines if line.startswith(f"| {name} |")]
        assert row.endswith(f"| {figures.in_percent(error)} |")


def nf4_bytes(num_weights: int, *, double: bool = True) -> int:
    """Return the bytes of a 4-bit weight with its constants."""
    constants = num_weights // 64 + 4 * num_weights // (64 * 256) if double else 4 * num_weights // 64
    return num_weights // 2 + constants


def in_mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.1f} MiB"


def test_the_bytes_of_llama_2_7b_follow_from_its_shapes() -> None:
    width, middle, num_layers, vocabulary = 4096, 11008, 32, 32000
    linear = num_layers * (4 * width * width + 3 * width * middle)
    rest = 2 * vocabulary * width + (2 * num_layers + 1) * width
    rows = num_layers * (5 * width + 2 * middle)
    adapter = 64 * num_layers * (4 * (width + width) + 3 * (width + middle))
    text = page(EXPLANATION / "memory.md")
    for number in (linear, rest, linear + rest, adapter):
        assert f"{number:,}" in text
    for num_bytes in (
        *(linear // 2, linear // 64, 4 * linear // (64 * 256), nf4_bytes(linear), 2 * rest),
        *(nf4_bytes(linear) + 2 * rest, nf4_bytes(linear, double=False), linear + 4 * rows),
        *(linear + 4 * rows + 2 * rest, 4 * adapter, 8 * adapter, nf4_bytes(linear) + 2 * rest + 16 * adapter),
    ):
        assert in_mib(num_bytes) in text
    assert f"{4 * (linear + rest) / GIB:.1f} GiB in fp32" in text
    assert f"{2 * (linear + rest) / GIB:.1f} GiB in bf16" in text
    assert f"{(nf4_bytes(linear) + 2 * rest) / GIB:.1f} GiB in NF4" in text


def test_the_bytes_of_llama_3_2_1b_follow_from_its_shapes() -> None:
    width, middle, num_layers, vocabulary, keys = 2048, 8192, 16, 128256, 512
    linear = num_layers * (2 * width * width + 2 * width * keys + 3 * width * middle)
    rest = vocabulary * width + (2 * num_layers + 1) * width
    text = page(EXPLANATION / "when-not-to-use-qlora.md")
    for num_bytes in (nf4_bytes(linear), 2 * rest, nf4_bytes(linear) + 2 * rest, 2 * (linear + rest)):
        assert in_mib(num_bytes) in text


def test_the_bytes_of_the_experts_of_qwen3_30b_follow_from_their_shapes() -> None:
    width, middle, num_experts, num_layers = 2048, 768, 128, 48
    gate_up, down = num_experts * width * 2 * middle, num_experts * width * middle
    text = page(HOW_TO / "mixture-of-experts.md")
    for number in (gate_up, num_layers * (gate_up + down)):
        assert f"{number:,}" in text
    for gib in (2 * num_layers * (gate_up + down), nf4_bytes(num_layers * (gate_up + down))):
        assert f"{gib / GIB:.1f} GiB" in text
    assert f"{2 * gate_up / MIB:.0f} MiB" in text
