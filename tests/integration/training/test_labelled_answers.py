"""Training on answers with labels: losses and adapter are those of TRL's trainer, however a step is divided."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import KTOConfig, KTOTrainer

from qlora_cli.data.rows.examples import IGNORE_INDEX
from qlora_cli.runs.find_runs import read_run
from qlora_cli.training.run_plan import PreparedRun, prepare_run, settle_run
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, RunQlora, train_settings, write_jsonl
from tests.integration.training.test_preferences import (
    EXACT,
    PAIRS,
    SETTINGS,
    OfTrl,
    Trained,
    Whole,
    log_prob,
    train_by_trl,
    train_pairs,
)
from tests.support.processes.killed_runs import Copier, assert_same, place_killed

pytestmark = pytest.mark.usefixtures("one_thread")

# The first has the longest prompt and the longest answer, so that no prompt with another answer is cut.
LONGEST = {
    "prompt": "def three(first, second, third):\n",
    "completion": "    return first + second + third - 1, None\n",
}
LABELLED = [
    {**LONGEST, "label": True},
    *(
        {"prompt": prompt, "completion": answers[place], "label": place == 0}
        for (prompt, *answers), place in zip([*PAIRS, PAIRS[0]], (0, 1, 0, 1, 1, 0, 1), strict=True)
    ),
]
STEP = 4
LABELS: dict[str, object] = {
    **SETTINGS,
    "training__objective": "kto",
    "training__desirable_weight": 1.5,
    "training__undesirable_weight": 0.5,
    "training__micro_batch_size": 1,
    "training__gradient_accumulation_steps": STEP,
}
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a prompt, an answer and its label."""
    return write_jsonl(tmp_path_factory.mktemp("labels") / "labels.jsonl", LABELLED)


@pytest.fixture(scope="module")
def trained(base_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of three steps of four answers, each a micro-batch; no test may change it."""
    return train_pairs(base_model, rows, tmp_path_factory.mktemp("run") / "run", **LABELS)


def _rows_of_trl(rows: Iterable[dict[str, Any]], batch_rows: int) -> list[dict[str, Any]]:
    """Return rows as TRL makes them itself, with the answer of the row before them in their batch."""
    made = []
    for row in rows:
        ids, num_trained = row["input_ids"], sum(label != IGNORE_INDEX for label in row["labels"])
        answer, label = ids[-num_trained:], bool(row["desirable"])
        made.append({"prompt_ids": ids[:-num_trained], "completion_ids": answer, "label": label})
    batches = [made[start : start + batch_rows] for start in range(0, len(made), batch_rows)]
    return [
        {**row, "KL_completion_ids": other["completion_ids"]}
        for batch in batches
        for row, other in zip(batch, [batch[-1], *batch[:-1]], strict=True)
    ]


def _of_trl(
    prepared: PreparedRun, model: Path, folder: Path, batch_rows: int
) -> tuple[list[dict[str, float]], PeftModel]:
    """Train by TRL's trainer, which has a baseline for each batch of so many rows."""
    readable = [{"prompt": text, "completion": text, "label": text == "a"} for text in ("a", "b")]
    trl = OfTrl(KTOConfig, KTOTrainer, partial(_rows_of_trl, batch_rows=batch_rows), readable)
    division = {
        "per_device_train_batch_size": batch_rows,
        "gradient_accumulation_steps": STEP // batch_rows,
    }
    return train_by_trl(trl, prepared, model, folder, **division, **WEIGHTS)


@pytest.fixture(scope="module")
def prepared(base_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedRun:
    """The tokens and the adapter that the run begins with."""
    return prepare_run(train_settings(base_model, rows, tmp_path_factory.mktemp("prepared"), **LABELS), Recorder())


def test_losses_rewards_and_adapter_are_those_of_trl_whose_batch_is_a_step(
    trained: Trained, prepared: PreparedRun, base_model: Path, tmp_path: Path
) -> None:
    logs, model = _of_trl(prepared, base_model, tmp_path / "trl", STEP)
    assert trained.losses == pytest.approx([log["loss"] for log in logs], rel=1e-5)
    assert [one.kl for one in trained.rewards] == pytest.approx([log["kl"] for log in logs], abs=1e-5)
    assert max(log["kl"] for log in logs) > 0.01, "or the baseline is never tried"
    assert trained.margins == pytest.approx([log["rewards/margins"] for log in logs], abs=1e-5)
    theirs = dict(model.named_parameters())
    assert trained.adapter
    for name, weight in trained.adapter.items():
        torch.testing.assert_close(weight, theirs[name.replace(".weight", ".default.weight")], rtol=0, atol=2e-5)


def test_a_baseline_of_each_micro_batch_gives_other_losses(
    trained: Trained, prepared: PreparedRun, base_model: Path, tmp_path: Path
) -> None:
    logs, _ = _of_trl(prepared, base_model, tmp_path / "trl", STEP // 2)
    differences = [abs(ours - log["loss"]) for ours, log in zip(trained.losses, logs, strict=True)]
    assert max(differences) > 1e-3, "the control of the test before: how a step is divided would matter"


@pytest.mark.parametrize(
    "division",
    [
        {"training__micro_batch_size": 2, "training__gradient_accumulation_steps": 2},
        {"training__micro_batch_tokens": 64, "training__gradient_checkpointing": "on"},
    ],
    ids=["in two", "filled and recomputed"],
)
def test_the_division_of_a_step_changes_nothing(
    division: dict[str, object], trained: Trained, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    divided = train_pairs(base_model, rows, tmp_path / "run", **{**LABELS, **division})
    assert divided.losses == pytest.approx(trained.losses, rel=1e-5)
    assert divided.margins == pytest.approx(trained.margins, abs=1e-5)
    for name, weight in divided.adapter.items():
        torch.testing.assert_close(weight, trained.adapter[name], rtol=0, atol=2e-5)


HELD_OUT: dict[str, object] = {**LABELS, **EXACT, "training__gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def whole(base_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run with two held-out rows, one of each kind, and a copy as if it was killed after step 3."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(train_settings(base_model, rows, run, **HELD_OUT), Copier(run, 3))
    return Whole(run, HELD_OUT)


def test_a_killed_run_resumes_exactly_within_a_logging_interval(
    whole: Whole, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    place_killed(whole.directory, 3, run)
    train(train_settings(base_model, rows, run, **whole.flags), Recorder())
    assert_same(run, whole.directory)
    before, now = read_run(whole.directory), read_run(run)
    assert before.summary.rewards == now.summary.rewards is not None
    results = [json.loads((one / "run.json").read_text("utf-8"))["result"] for one in (whole.directory, run)]
    assert results[0]["rewards"] == results[1]["rewards"]
    assert results[0]["rewards"]["kl"] is not None
    card = (run / "adapter" / "README.md").read_text("utf-8")
    assert "| objective | kto, beta 0.5, weights 1.5 (wanted) and 0.5 (not), compared with the base |" in card
    assert "| held-out answers | reward accuracy" in card
    assert "nats a token" not in card
    assert "pairs" not in card


def test_the_held_out_loss_is_that_of_the_saved_adapter(
    whole: Whole, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    held_out = settle_run(
        train_settings(base_model, rows, tmp_path / "run", **whole.flags), Recorder()
    ).rows.evaluation
    assert held_out is not None
    plain = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, whole.directory / "adapter").eval()
    made = _rows_of_trl(held_out.dataset, 2)
    baseline = torch.stack([_gain(model, row["prompt_ids"], row["KL_completion_ids"]) for row in made]).mean().clamp(0)
    gains = torch.stack([_gain(model, row["prompt_ids"], row["completion_ids"]) for row in made])
    signs = torch.tensor([1.0 if row["label"] else -1.0 for row in made])
    losses = torch.where(signs > 0, 1.5, 0.5) * (1 - torch.sigmoid(0.5 * signs * (gains - baseline)))
    done = read_run(whole.directory).history.evaluations[-1]
    assert done.rewards is not None
    assert done.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert done.rewards.kl == pytest.approx(float(baseline), abs=1e-5)
    assert done.rewards.accuracy == pytest.approx(float((signs * (gains - baseline) > 0).float().mean()))
    assert done.rewards.margin == pytest.approx(float(0.5 * (gains * signs).sum()), abs=1e-5), "one of each kind"


@torch.no_grad()
def _gain(model: PeftModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return by how much, in nats, an answer is more likely with the adapter than without it."""
    ids = torch.tensor([*prompt, *answer])
    labels = torch.tensor([*[IGNORE_INDEX] * len(prompt), *answer])
    with model.disable_adapter():
        reference = log_prob(model, ids, labels)
    return log_prob(model, ids, labels) - reference


def test_a_wrong_label_ends_with_2(base_model: Path, tmp_path: Path, run_qlora: RunQlora) -> None:
    file = write_jsonl(tmp_path / "labels.jsonl", [*LABELLED, {**LONGEST, "label": "maybe"}])
    command = ("train", "--model", base_model, "--dataset", file, "--output", tmp_path / "run", "--objective", "kto")
    refused = run_qlora(*command)
    assert refused.code == 2
    assert "row 9 (line 9): 'label' must be true if the answer is wanted" in refused.stderr
