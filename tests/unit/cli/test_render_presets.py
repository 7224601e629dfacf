"""The table of presets: a name can be copied whole, at any width."""

import pytest

from qlora_cli.cli.rendering.preset_table import preset_lines
from qlora_cli.settings.files.preset_files import presets


@pytest.mark.parametrize("width", [None, 200, 98, 97, 80, 60])
def test_names_and_hub_ids_are_whole_at_any_width(width: int | None) -> None:
    lines = [line.plain for line in preset_lines(presets(), width)]
    words = {word for line in lines for word in line.split()}
    assert words >= {one.name for one in presets()} | {one.model for one in presets()}
    assert width is None or max(map(len, lines)) <= width


def test_a_wide_window_and_a_pipe_get_a_line_for_each_preset() -> None:
    for width in (None, 200):
        assert len(preset_lines(presets(), width)) == 1 + len(presets())
    models = [one.model for one in presets()]
    assert len(preset_lines(presets(), 80)) == 1 + len(presets()) + len(set(models))
