"""The merged model of a run is found in any of the formats that it was written in."""

import json
from pathlib import Path

import pytest

from qlora_cli.model_files.given_model import CONFIG
from qlora_cli.model_files.merged import merged_model_of
from qlora_cli.model_files.source import ModelSource
from qlora_cli.runs.directory import RunDirectory

PLAIN: dict[str, object] = {"model_type": "llama"}
QUANTIZED: dict[str, object] = {**PLAIN, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


def source_of(run: RunDirectory, adapter: Path) -> ModelSource:
    base = run.path / "base"
    return ModelSource(name="run", path=base, base_name="base", tokenizer_path=base, run=run.path, adapter=adapter)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({".": PLAIN}, "."),
        ({".": QUANTIZED}, "."),
        ({"hf": PLAIN, "nf4": QUANTIZED}, "hf"),
        ({"nf4": QUANTIZED, "ollama": PLAIN}, "ollama"),
        ({"nf4": QUANTIZED, "gguf": None}, "nf4"),
        ({"failed-verification": PLAIN}, None),
        ({"gguf": None}, None),
        ({}, None),
    ],
)
def test_a_format_that_is_not_requantized_is_preferred(
    tmp_path: Path, written: dict[str, dict[str, object] | None], expected: str | None
) -> None:
    run = RunDirectory(tmp_path)
    for name, config in written.items():
        (run.merged / name).mkdir(parents=True, exist_ok=True)
        if config is not None:
            (run.merged / name / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    assert merged_model_of(source_of(run, run.adapter)) == (None if expected is None else run.merged / expected)
    assert merged_model_of(source_of(run, tmp_path / "checkpoints" / "step-1")) is None
