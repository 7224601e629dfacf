"""A GGUF is run by llama.cpp in a process of its own: which logits are returned, and what a failure says."""

from pathlib import Path

import pytest
import torch

from qlora_cli.errors import ExportError
from qlora_cli.merging.exports import gguf as exporting
from qlora_cli.merging.exports.gguf import MOST_KL, check_divergence
from qlora_cli.merging.exports.llama_cpp.run_gguf import run_gguf
from qlora_cli.merging.merge_result import Divergence

STAND_IN = Path(__file__).parents[2] / "support" / "runs" / "library"


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))


def test_each_row_is_run_from_its_start_and_all_logits_are_returned(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    logits = run_gguf(file, [(3, 1), (5, 6, 2)])
    expected = torch.zeros(5, 8)
    expected[range(5), [4, 2, 6, 7, 3]] = 1
    expected[:, 0] = torch.tensor([0, 0.1, 0, 0.1, 0.2])
    assert torch.equal(logits, expected)


def test_a_file_that_llama_cpp_does_not_load_is_an_error_with_its_last_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGML")
    with pytest.raises(ExportError, match=r"running a.gguf, failed with exit code 1(.|\n)*Failed to load") as caught:
        run_gguf(file, [(3, 1)])
    assert "--no-verify" in str(caught.value.hint)


def test_a_file_is_not_run_without_the_library_or_the_memory_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" * 1024)
    monkeypatch.setattr(exporting, "has_library", lambda: False)
    assert "pip install 'qlora-cli[llama-cpp]'" in str(exporting.why_not_run(file))
    monkeypatch.setattr(exporting, "has_library", lambda: True)
    assert exporting.why_not_run(file) is None
    monkeypatch.setattr(exporting, "free_bytes", lambda _: 1024)
    assert exporting.why_not_run(file) == "it takes 4.00 KiB of host memory, and 1.00 KiB are free"


@pytest.mark.parametrize("kl", [2 * MOST_KL, float("nan")])
def test_a_file_in_16_bit_that_runs_as_another_model_is_an_error(kl: float) -> None:
    with pytest.raises(ExportError, match=r"a.gguf is not the model that was merged: run by llama.cpp"):
        check_divergence(Path("a.gguf"), of_kl(kl))
    check_divergence(Path("a.gguf"), of_kl(MOST_KL))


def of_kl(kl: float) -> Divergence:
    return Divergence(
        num_tokens=9,
        max_logit_difference=1,
        mean_logit_difference=1,
        max_kl=kl,
        mean_kl=kl,
        median_kl=kl,
        top_token_agreement=0.9,
        reference_perplexity=8,
        perplexity=9,
    )
