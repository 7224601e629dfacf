"""GGUF: what the converter writes is read back and compared with the model; what is not the model is an error."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlora_cli.errors import ExportError
from qlora_cli.events import Noted, PhaseStarted
from qlora_cli.merging.exports.gguf import GgufExport, GgufWriter, check_gguf, export_gguf
from qlora_cli.merging.exports.llama_cpp.converter import find_converter
from qlora_cli.merging.exports.llama_cpp.quantizer import Quantizer
from qlora_cli.settings.choices import GgufType
from tests.conftest import Recorder

STAND_IN = Path(__file__).parents[2] / "support" / "runs" / "gguf_converter.py"
# By what is wrong: the message about it.
WRONG = {
    "layers": "4 layers, 3 by its metadata, and the model has 4",
    "width": "a hidden size of 257, and the model has 256",
    "weights": "3,279,104 weights, and the model has 3,541,248",
    "rows": "3,072 tokens and 3,071 rows of the embedding",
    "eos": "the end token 5, and the tokenizer has 4",
    "bos": "the begin token 2, and the tokenizer has 1",
    "template": "another chat template",
    "no template": "no chat template",
    "garbage": "can't be read as GGUF",
    "truncated": "can't be read as GGUF",
}


def export(model: Path, directory: Path, recorder: Recorder) -> GgufExport:
    writer = GgufWriter(converter=find_converter(STAND_IN), quantizer=None, outtype=GgufType.F16)
    return export_gguf(model, directory / "tiny.gguf", writer, recorder)


def test_the_written_file_is_the_model(base_model: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    done = export(base_model, tmp_path, recorder)
    assert done == GgufExport(
        file=tmp_path / "tiny.gguf",
        num_bytes=(tmp_path / "tiny.gguf").stat().st_size,
        outtype="f16",
        architecture="llama",
        num_tensors=38,
        num_parameters=3_541_248,
        bits_per_weight=16 * (1 + 9 * 256 / 3_541_248),  # norms are in fp32
        vocabulary_size=3072,
    )
    assert 2 * done.num_parameters < done.num_bytes < 2.2 * done.num_parameters
    titles = [event.title for event in recorder.events if isinstance(event, PhaseStarted)]
    assert titles == ["Converting to GGUF (f16) with llama.cpp", "Checking tiny.gguf"]
    assert not [event for event in recorder.events if isinstance(event, Noted)]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_not_the_model_is_an_error_and_is_deleted(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv("WRONG", wrong)
    with pytest.raises(ExportError) as caught:
        export(base_model, tmp_path, Recorder())
    assert WRONG[wrong] in str(caught.value)
    assert "git pull" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_what_the_converter_does_not_write_is_quantized_from_16_bit_which_is_deleted(
    base_model: Path, tmp_path: Path
) -> None:
    quantizer = Quantizer(start=[sys.executable, str(STAND_IN.with_name("gguf_quantizer.py"))])
    writer = GgufWriter(converter=find_converter(STAND_IN), quantizer=quantizer, outtype=GgufType.Q6_K)
    recorder = Recorder()
    done = export_gguf(base_model, tmp_path / "tiny.gguf", writer, recorder)
    assert done.num_parameters == 3_541_248
    assert 8.5 < done.bits_per_weight < 8.6  # of the stand-in
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    titles = [event.title for event in recorder.events if isinstance(event, PhaseStarted)]
    assert titles[:2] == ["Converting to GGUF (16 bit) with llama.cpp", "Quantizing to q6_k with llama.cpp"]
    [note] = [event.message for event in recorder.events if isinstance(event, Noted)]
    assert note.startswith(
        "4 of 29 matrices have rows that are no multiple of 256 weights, and are stored in Q8_0: 8.5"
    )


def test_text_that_would_begin_differently_causes_a_warning(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRONG", "adds no bos")
    recorder = Recorder()
    export(base_model, tmp_path, recorder)
    [note] = [event for event in recorder.events if isinstance(event, Noted)]
    assert note.level == "warning"
    assert "not begin text with <|bos|>" in note.message


def test_a_tokenizer_that_the_converter_does_not_know_is_reported_before_anything_is_merged(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRONG", "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    with pytest.raises(ExportError, match="pre-tokenizer was not recognized") as caught:
        check_gguf(base_model, tokenizer, find_converter(STAND_IN), Recorder())
    assert "tokenize differently from training" in str(caught.value.hint)


def test_a_known_tokenizer_passes_with_new_tokens_and_without_weights(base_model: Path, tmp_path: Path) -> None:
    config = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.add_tokens(["<new>", "<newer>"])  # beyond the rows that the base has
    before = sorted(tmp_path.iterdir())
    check_gguf(tmp_path, tokenizer, find_converter(STAND_IN), Recorder())
    assert sorted(tmp_path.iterdir()) == before
