"""Invisible characters are made visible, and no others are changed."""

import subprocess
import sys
import time
import unicodedata

import pytest

from qlora_cli.visible import TextPart, parts, visible


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("plain text, with  spaces inside", "plain text, with  spaces inside"),
        (" leading", " leading"),
        ("one\ntwo", "one⏎\ntwo"),
        ("\n\n", "⏎\n⏎\n"),
        ("a\tb", "a→b"),
        ("a\r\nb", "a[U+000D]⏎\nb"),
        ("nul \x00 bell \x07 escape \x1b[2J", "nul [U+0000] bell [U+0007] escape [U+001B][2J"),
        ("\x7f\x85\u2028", "[U+007F][U+0085][U+2028]"),
        ("zero\u200bwidth\u200d\ufeff", "zero[U+200B]width[U+200D][U+FEFF]"),
        ("user\u202egnp.exe\u202c\u2066x\u2069", "user[U+202E]gnp.exe[U+202C][U+2066]x[U+2069]"),
        ("soft\u00adhyphen, no\u00a0break, wide\u3000", "soft[U+00AD]hyphen, no[U+00A0]break, wide[U+3000]"),
        ("tag \U000e0041 \ufe01 \U000e0100", "tag [U+E0041] [U+FE01] [U+E0100]"),
        ("lone \ud800", "lone [U+D800]"),
        ("two  ", "two··"),
        (" ", "·"),
        ("end  \nnext \r\nlast ", "end··⏎\nnext·[U+000D]⏎\nlast·"),
        ("  \n  x", "··⏎\n  x"),
    ],
)
def test_invisible_characters_become_signs(text: str, expected: str) -> None:
    assert visible(text) == expected


@pytest.mark.parametrize(
    "text", ["Übermaß", "مرحبا بالعالم", "שלום", "日本語。", "é", "👩🏽", "❤️", "नमस्ते", "½ → · ⏎ ∅", "�"]
)
def test_visible_characters_are_unchanged(text: str) -> None:
    assert visible(text) == text


def test_a_sign_is_distinguished_from_the_same_character() -> None:
    assert list(parts("→\t· ")) == [
        TextPart("→", False),
        TextPart("→", True),
        TextPart("·", False),
        TextPart("·", True),
    ]


def test_spaces_are_not_at_an_end_if_the_line_continues() -> None:
    assert visible("a ", is_end=False) == "a "
    assert visible("a \nb ", is_end=False) == "a·⏎\nb "


def test_no_character_controls_a_terminal_or_fails_to_be_written() -> None:
    shown = visible("".join(map(chr, range(sys.maxunicode + 1))))
    shown.encode("utf-8")
    assert {char for char in shown if unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"}} == {"\n"}
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "BN"}
    assert {char for char in shown if unicodedata.bidirectional(char) in bidi} == set()


def test_a_row_of_only_spaces_is_fast() -> None:
    began = time.perf_counter()
    visible(" " * 200_000 + "x")
    assert time.perf_counter() - began < 1


@pytest.mark.slow
def test_it_imports_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'datasets'} & set(sys.modules)"
    light = "visible", "data.showing.page_file", "data.showing.page"
    code = f"import sys\nfor name in {light}: __import__(f'qlora_cli.{{name}}')\nassert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
