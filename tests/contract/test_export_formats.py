"""An export format is a module, a line in the table and a name: the rest of the program goes by the table."""

import re
from pathlib import Path

import qlora_cli
from qlora_cli.merging.exports.format import Format
from qlora_cli.merging.exports.table import FORMATS
from qlora_cli.settings.choices import ExportFormat

PACKAGE = Path(qlora_cli.__file__).parent
NAMED = re.compile(r"ExportFormat\.([A-Z]\w+)\b")
# A default; what llama.cpp's flags are for, before torch is imported; the key of the JSON that is called after it.
ELSEWHERE = {
    ("settings/sections/merge.py", "HF"),
    ("merging/preflight.py", "GGUF"),
    ("merging/run.py", "HF"),
    ("merging/run.py", "NF4"),
}


def test_every_format_that_can_be_asked_for_is_in_the_table_with_a_class_of_its_own() -> None:
    assert list(FORMATS) == sorted(FORMATS, key=list(ExportFormat).index)
    assert set(FORMATS) == set(ExportFormat)
    assert len(set(FORMATS.values())) == len(FORMATS)
    assert all(issubclass(kind, Format) for kind in FORMATS.values())


def test_nothing_but_its_module_and_the_table_names_a_format() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in sorted(PACKAGE.rglob("*.py"))
        if "exports" not in path.parts
        for name in NAMED.findall(path.read_text(encoding="utf-8"))
    }
    assert found <= ELSEWHERE, found - ELSEWHERE
    assert any(name == "HF" for _, name in found)
