"""llama.cpp itself, where llama-cpp-python is installed: it quantizes and runs what was converted, as it should."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_cli.merging.exports.gguf import MOST_KL
from qlora_cli.merging.exports.llama_cpp.converter import convert, find_converter
from qlora_cli.merging.exports.llama_cpp.gguf_file import read_gguf
from qlora_cli.merging.exports.llama_cpp.quantizer import (
    CONVERTED,
    Quantizer,
    has_library,
    library_command,
    quantize,
)
from qlora_cli.merging.exports.llama_cpp.run_gguf import run_gguf
from qlora_cli.merging.verifying.divergence import divergence
from qlora_cli.settings.choices import GgufType
from tests.support.runs.merge_command import merged, trained_run

pytestmark = pytest.mark.skipif(not has_library(), reason="llama-cpp-python is not installed")

STAND_IN = Path(__file__).parents[2] / "support" / "runs" / "gguf_converter.py"
ROWS = ((1, 70, 200, 900, 1800, 33, 40, 41), (1, 5, 6, 7, 8, 300))
TARGETS = torch.tensor([token for row in ROWS for token in (*row[1:], -100)])


def converted(base_model: Path, directory: Path) -> Path:
    file = directory / "tiny.gguf"
    convert(find_converter(STAND_IN), base_model, file, GgufType.F16)
    return file


@pytest.fixture(scope="module")
def expected(base_model: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])


def test_it_runs_the_file_as_transformers_runs_the_model(
    base_model: Path, tmp_path: Path, expected: torch.Tensor
) -> None:
    logits = run_gguf(converted(base_model, tmp_path), ROWS)
    assert logits.shape == expected.shape
    assert divergence(expected, logits, TARGETS).mean_kl < 1e-3


def test_heads_in_another_order_are_far_beyond_what_rounding_explains(
    base_model: Path, tmp_path: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRONG", "heads")
    logits = run_gguf(converted(base_model, tmp_path), ROWS)
    assert divergence(expected, logits, TARGETS).mean_kl > 2 * MOST_KL


def test_each_smaller_type_is_quantized_to_and_the_smallest_run(
    base_model: Path, tmp_path: Path, expected: torch.Tensor
) -> None:
    source, bits = converted(base_model, tmp_path), {}
    for outtype in (kind for kind in GgufType if kind not in CONVERTED):
        target = tmp_path / f"{outtype.value}.gguf"
        quantize(Quantizer(start=library_command("quantize")), source, target, outtype)
        bits[outtype] = read_gguf(target).bits_per_weight
    assert sorted(bits.values(), reverse=True)[0] == bits[GgufType.Q6_K] < 9
    for outtype in (GgufType.Q3_K_M, GgufType.IQ4_XS):
        logits = run_gguf(tmp_path / f"{outtype.value}.gguf", ROWS)
        assert divergence(expected, logits, TARGETS).mean_kl < 1, outtype
    assert bits[GgufType.Q5_K_M] > bits[GgufType.Q4_K_M] > bits[GgufType.Q3_K_M]


def test_a_merge_is_quantized_run_and_compared(shallow_base: Path, tmp_path: Path) -> None:
    run = trained_run(tmp_path, shallow_base)
    options = ("--format", "gguf", "--llama-cpp", STAND_IN, "--gguf-type", "q4_k_m", "--base", "dequantized")
    report = merged(run, "--output", tmp_path / "out", *options)
    assert report["requantized"]["gguf"]["to"] == "Q4_K_M"
    assert 0 < report["requantized"]["gguf"]["divergence"]["mean_kl"] < 1
    assert "| requantized | to Q4_K_M: from the merged model, mean KL" in (tmp_path / "out" / "README.md").read_text()
