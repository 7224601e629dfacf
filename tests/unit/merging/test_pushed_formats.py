"""The pushed files of a merge work from their repository alone, whichever formats are requested, in any order."""

from itertools import chain, permutations
from pathlib import Path

import pytest

from qlora_cli.errors import ModelError
from qlora_cli.merging.output_formats import RequestedFormats
from qlora_cli.settings.choices import ExportFormat
from qlora_cli.settings.models import MergeCommandSettings, MergeSettings

ORDERS = list(chain.from_iterable(permutations(ExportFormat, number) for number in range(1, len(ExportFormat) + 1)))
CONVERTER = Path(__file__).parents[2] / "support" / "runs" / "gguf_converter.py"
OUTPUT = Path("out")


def formats_of(formats: tuple[ExportFormat, ...], pushed_to: str | None = "me/x") -> RequestedFormats:
    merge = MergeSettings(adapters=("run",), formats=formats, push_to_hub=pushed_to, llama_cpp=CONVERTER)
    return RequestedFormats.of(MergeCommandSettings(merge=merge))


@pytest.mark.parametrize("order", ORDERS, ids=",".join)
def test_a_modelfile_is_pushed_with_the_model_that_it_names_or_not_at_all(order: tuple[ExportFormat, ...]) -> None:
    formats = formats_of(order, None)
    holds_it = formats.model(OUTPUT) == formats.pushed(OUTPUT)[0] and ExportFormat.GGUF not in order
    if order[0] is not ExportFormat.OLLAMA or holds_it:
        assert formats_of(order).pushed(OUTPUT)[0] == formats.pushed(OUTPUT)[0]
        return
    named = ExportFormat.GGUF if ExportFormat.GGUF in order else ExportFormat.HF
    with pytest.raises(ModelError, match=f"ollama, whose files name those of {named}") as caught:
        formats_of(order)
    assert caught.value.setting == "merge.push_to_hub"
    assert f"--format {named} before --format ollama" in str(caught.value.hint)
