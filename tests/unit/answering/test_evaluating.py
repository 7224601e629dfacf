"""Losses of rows: the same for every batch size, in halved batches if memory is short, paired, and shown."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from qlora_cli.cli.progress.plain_lines import PlainReporter
from qlora_cli.cli.rendering.evaluation_text import render_evaluation, source_cells
from qlora_cli.data.feeding.prepare import PreparedData, prepare_data
from qlora_cli.errors import ModelError, OutOfMemoryError
from qlora_cli.evaluating.evaluation_result import (
    EvaluatedAnswers,
    Evaluation,
    PreferenceResult,
    RowsOfAnswers,
    SourceResult,
    TaskResult,
)
from qlora_cli.evaluating.losses import RowLosses, measure_losses
from qlora_cli.evaluating.statistics import perplexity_of, ratio_stderr, summarize
from qlora_cli.events import Noted, WorkAdvanced
from qlora_cli.settings.models import DataSettings
from tests.conftest import Recorder, write_jsonl
from tests.support.models.chat_tokenizers import make_tokenizer
from tests.support.models.tiny_models import tiny_model

LENGTHS = (5, 9, 17, 30, 12, 23)
# Heads that scale, cap or bias their logits, layers with a state, experts, and a plain one.
HEADS = ("llama", "gemma2", "cohere", "granite", "falcon_h1", "phi", "mamba2", "qwen3_moe", "gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Six rows of unequal length, the first third of each a prompt."""
    chance, rows = np.random.default_rng(0), []
    for length in LENGTHS:
        ids = chance.integers(3, 127, size=length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    path = write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    return prepare_data(DataSettings(dataset=(str(path),), max_length=64), make_tokenizer("chatml"), seed=0).train


def measure(model: PreTrainedModel, data: PreparedData, **changed: Any) -> RowLosses:
    given = {"pad_token_id": 0, "dtype": torch.float32, "batch_size": 3, "title": "it", "reporter": Recorder()}
    return measure_losses(model, data, **{**given, **changed})


@torch.no_grad()
def one_by_one(model: PreTrainedModel, data: PreparedData) -> tuple[list[float], list[int], list[int]]:
    """Return the same from the model's own logits, one row at a time, without padding."""
    sums, correct, tokens = [], [], []
    for row in data.dataset:
        targets = torch.tensor([row["labels"]])[:, 1:]
        logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[:, :-1][targets != -100].double()
        targets = targets[targets != -100]
        sums.append(float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")))
        correct.append(int((logits.argmax(-1) == targets).sum()))
        tokens.append(len(targets))
    return sums, correct, tokens


# ---- losses


@pytest.mark.parametrize("family", HEADS)
def test_losses_equal_those_of_the_models_own_logits_row_by_row(family: str, data: PreparedData) -> None:
    model = tiny_model(family)
    losses = measure(model, data)
    sums, correct, tokens = one_by_one(model, data)
    np.testing.assert_allclose(losses.nll, sums, rtol=1e-5)
    assert (losses.correct.tolist(), losses.tokens.tolist()) == (correct, tokens)
    assert losses.num_fed == sum(LENGTHS)


def test_the_loss_is_the_mean_over_tokens_whatever_the_batch(data: PreparedData) -> None:
    model = tiny_model("llama")
    losses = [measure(model, data, batch_size=size).loss for size in (1, 2, 4, 100)]
    sums, _, tokens = one_by_one(model, data)
    assert losses == pytest.approx([sum(sums) / sum(tokens)] * 4, rel=1e-6)
    # The mean of the means of rows must differ, or this test proves nothing.
    assert losses[0] != pytest.approx(np.mean(np.array(sums) / tokens), rel=1e-4)


def test_16_bit_is_autocast_as_in_training(data: PreparedData) -> None:
    model = tiny_model("llama")
    exact, lower = measure(model, data), measure(model, data, dtype=torch.bfloat16)
    assert lower.loss == pytest.approx(exact.loss, rel=1e-2)
    assert (lower.nll != exact.nll).all()


def test_the_model_is_left_unchanged(data: PreparedData) -> None:
    model = tiny_model("llama").train()
    measure(model, data)
    assert model.training
    assert "forward" not in model.__dict__
    assert not any(parameter.grad is not None for parameter in model.parameters())


def fits_at_most(model: PreTrainedModel, num_rows: int) -> list[int]:
    """Let the model run out of memory on more than `num_rows` rows; return the list of tried batches."""
    tried = []

    def check(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        tried.append(len(inputs[0]))
        if len(inputs[0]) > num_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.get_input_embeddings().register_forward_pre_hook(check)
    return tried


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved_with_equal_losses(data: PreparedData) -> None:
    whole = measure(tiny_model("llama"), data)
    model, recorder = tiny_model("llama"), Recorder()
    tried = fits_at_most(model, 1)
    halved = measure(model, data, batch_size=4, reporter=recorder)
    assert tried == [4, 2, 1, 1, 1, 1, 1, 1, 1]  # once, after the first batch that fits, its head is checked
    np.testing.assert_allclose(halved.nll, whole.nll, rtol=1e-5)
    assert halved.batch_size == 1
    warnings = [event.message for event in recorder.events if isinstance(event, Noted) and event.level == "warning"]
    assert warnings == [
        "4 rows of 30 tokens do not fit in memory at once: going on with 2",
        "2 rows of 30 tokens do not fit in memory at once: going on with 1",
    ]


@pytest.mark.slow
def test_a_single_row_that_does_not_fit_is_an_out_of_memory_error_with_a_hint(data: PreparedData) -> None:
    model = tiny_model("llama")
    fits_at_most(model, 0)
    with pytest.raises(OutOfMemoryError, match="a row of 30 tokens") as caught:
        measure(model, data)
    assert caught.value.exit_code == 3
    assert "--max-length 15" in str(caught.value.hint)
    assert "forward" not in model.__dict__


def test_another_failure_of_the_model_is_not_reported_as_a_lack_of_memory(data: PreparedData) -> None:
    model = tiny_model("llama", vocab_size=64)  # the rows have larger ids
    with pytest.raises(IndexError):
        measure(model, data)


def test_a_model_whose_layers_are_not_known_is_refused(data: PreparedData) -> None:
    with pytest.raises(ModelError, match="Llama4ForCausalLM"):
        measure(tiny_model("llama4_text"), data)


def test_progress_counts_rows_up_to_all_of_them(data: PreparedData) -> None:
    recorder = Recorder()
    measure(tiny_model("llama"), data, batch_size=4, reporter=recorder)
    events = [event for event in recorder.events if isinstance(event, WorkAdvanced)]
    assert [(event.num_done, event.num_all) for event in events] == [(4, 6), (6, 6)]
    assert events[0].seconds_left > events[1].seconds_left == 0


# ---- statistics


def losses_of(nll: list[float], tokens: list[int]) -> RowLosses:
    return RowLosses(
        num_left_out=0,
        nll=np.array(nll),
        correct=np.zeros(len(nll), np.int64),
        tokens=np.array(tokens),
        seconds=2.0,
        num_fed=100,
        batch_size=1,
    )


def test_the_standard_error_of_rows_of_equal_length_is_that_of_their_mean() -> None:
    values = np.array([3.0, 5.0, 4.0, 8.0])
    assert ratio_stderr(values, np.array([1, 1, 1, 1])) == pytest.approx(values.std(ddof=1) / 2)
    assert ratio_stderr(values[:1], np.array([1])) is None


def test_rows_of_no_token_change_no_standard_error() -> None:
    values, sizes = np.array([1.0, 4.0, 2.0]), np.array([2, 3, 4])
    with_empty = ratio_stderr(np.append(values, [0.0, 0.0]), np.append(sizes, [0, 0]))
    assert with_empty == pytest.approx(ratio_stderr(values, sizes))


def test_the_standard_error_is_the_spread_of_losses_over_samples_of_rows() -> None:
    chance = np.random.default_rng(0)

    def draw() -> tuple[Any, Any]:
        tokens = chance.integers(5, 60, size=200)
        return tokens * chance.normal(2.0, 0.5, size=200), tokens  # the tokens of a row are alike

    samples = [draw() for _ in range(400)]
    spread = np.std([values.sum() / tokens.sum() for values, tokens in samples])
    estimated = np.mean([ratio_stderr(values, tokens) for values, tokens in samples])
    assert estimated == pytest.approx(spread, rel=0.1)


def test_a_difference_is_paired_by_row() -> None:
    tokens = [10, 20, 30]
    base = losses_of([10.0, 60.0, 150.0], tokens)
    better = losses_of([8.0, 56.0, 144.0], tokens)  # by 0.2 for each token of each row
    evaluated = summarize("adapter", "run", "nf4", better, base)
    assert evaluated.difference == pytest.approx(-0.2)
    assert evaluated.difference_stderr == pytest.approx(0, abs=1e-12)
    assert evaluated.loss_stderr is not None
    assert evaluated.loss_stderr > 0.5
    assert (evaluated.num_rows, evaluated.num_tokens, evaluated.tokens_per_second) == (3, 60, 50)
    alone = summarize("base", "base", "nf4", base, None)
    assert (alone.difference, alone.difference_stderr) == (None, None)


@pytest.mark.parametrize(
    ("loss", "perplexity"), [(0.0, 1.0), (2.0, math.exp(2)), (1e4, None), (math.inf, None), (math.nan, None)]
)
def test_a_perplexity_that_is_not_finite_is_none(loss: float, perplexity: float | None) -> None:
    assert perplexity_of(loss) == perplexity
    assert summarize("model", "m", "none", losses_of([loss], [1]), None).perplexity == perplexity


# ---- what is shown


def source(**changed: Any) -> SourceResult:
    values: dict[str, Any] = {
        **{"source": "base", "path": "base", "quantization": "nf4", "loss": 5.424, "loss_stderr": 0.1729},
        **{"perplexity": 226.79, "token_accuracy": 0.2729, "num_rows": 40, "num_tokens": 634, "seconds": 0.3},
        **{"tokens_per_second": 6073.5, "difference": None, "difference_stderr": None},
    }
    return SourceResult(**{**values, **changed})


EVALUATION = Evaluation(
    model="run",
    base_model="base",
    adapter=Path("run/adapter"),
    merged=None,
    device="cpu",
    compute_dtype="fp32",
    dataset="rows.jsonl",
    fingerprint="0a",
    is_training_data=False,
    sources=(
        source(),
        source(source="adapter", loss=3.5757, difference=-1.8484, difference_stderr=0.139),
    ),
    tasks=(TaskResult(source="base", task="own", metric="acc", value=0.525, stderr=0.08, num_documents=40),),
    notes=(),
)


def test_the_table_fits_in_80_columns_and_judges_differences(capsys: pytest.CaptureFixture[str]) -> None:
    render_evaluation(EVALUATION)
    shown = capsys.readouterr().out
    assert "run on rows.jsonl\n  40 rows, 634 tokens evaluated, fp32\n" in shown
    assert "  base (nf4)     5.4240 ± 0.1729       226.8     27.3%" in shown
    assert "-1.8484 ± 0.1390" in shown
    assert "  own   base  acc     0.5250 ± 0.0800" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_columns_without_a_figure_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    render_evaluation(Evaluation(**{**vars(EVALUATION), "sources": (source(source="model"),), "tasks": ()}))
    shown = capsys.readouterr().out
    assert "against base" not in shown
    assert "lm-eval" not in shown


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("pairs", "40 pairs, 634 tokens of the chosen answers"),
        ("labels", "40 answers with labels, 634 tokens of the 21 wanted ones"),
    ],
)
def test_answers_that_are_compared_have_a_column_for_each_model(
    rows: RowsOfAnswers, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
    result = PreferenceResult(
        **dict(zip(names, (0.5, 0.75, 0.25, 0.125, -0.125), strict=True)),
        **{f"{name}_stderr": 0.0625 for name in names},
        kl=None if rows == "pairs" else 1.5,
    )
    sources = (source(num_rows=21), source(source="adapter", preference=result))
    answers = EvaluatedAnswers(rows=rows, num_rows=40, objective="dpo", beta=0.1)
    render_evaluation(Evaluation(**{**vars(EVALUATION), "sources": sources, "compared_answers": answers}))
    shown = capsys.readouterr().out
    assert f"  {says} evaluated, fp32\n" in shown
    assert "  dpo, beta 0.1" in shown
    cells = {line[:22].strip(): line[22:].strip() for line in shown.splitlines()}
    assert (cells["accuracy"], cells["margin"]) == ("75.0% ± 6.2%", "+0.2500 ± 0.0625")
    assert ("  KL " in shown) == (rows == "labels")
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("perplexity", "shown"), [(54.3, "54.30"), (1.0, "1.00"), (226.79, "226.8"), (3000.0, "3,000"), (1.5e9, "1.5e+09")]
)
def test_perplexities_of_one_magnitude_have_equally_many_decimals(perplexity: float, shown: str) -> None:
    assert source_cells(source(perplexity=perplexity))[2] == shown


def test_a_missing_number_is_shown_as_a_dash() -> None:
    assert source_cells(source(loss=None, loss_stderr=None, perplexity=None))[1:3] == ("-", "-")


def test_an_evaluation_has_one_line_per_interval_in_a_log() -> None:
    advanced = [
        WorkAdvanced(title="Evaluating the base", unit="row", num_done=done, num_all=1200, seconds_left=65.0)
        for done in (400, 800, 1200)
    ]
    lines = {}
    for seconds in (0.0, 1000.0):
        file = io.StringIO()
        reporter = PlainReporter(file, interval_seconds=seconds)
        for event in advanced:
            reporter.report(event)
        lines[seconds] = file.getvalue().splitlines()
    first, second = (f"Evaluating the base: {done} of 1,200 rows, 1:05 left" for done in (400, 800))
    assert lines == {0.0: [first, second], 1000.0: [first]}
