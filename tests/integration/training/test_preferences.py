"""Training on pairs: losses and adapter are those of TRL's trainers, and all else is as of any run."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from qlora_cli.adapters.reader import read_tensors
from qlora_cli.data.feeding.collate import sequences_of
from qlora_cli.data.rows.examples import IGNORE_INDEX
from qlora_cli.errors import ModelError
from qlora_cli.events import Rewards, StepDone
from qlora_cli.model_files.adapter_files import ADAPTER_WEIGHTS
from qlora_cli.runs.find_runs import read_run
from qlora_cli.settings.objectives import COMPARED_BY
from qlora_cli.training.run_plan import PreparedRun, prepare_run, settle_run
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, train_settings
from tests.support.processes.killed_runs import Copier, assert_same, place_killed

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [
    ("def add(a, b):\n", "    return a + b\n", "    return a - b, None, 17\n"),
    ("def sub(a, b):\n", "    return a - b\n", "    return None\n"),
    ("def one():\n", "    return 1\n", "    return 2\n"),
    ("def two():\n", "    return 2\n", "    raise ValueError\n"),
    ("import os\n", "os.listdir('.')\n", "import sys\n"),
    ("import re\n", "re.compile('a')\n", "foo bar baz qux, and more than that\n"),
]
TARGETS = ["q_proj", "down_proj"]
NUM_STEPS = 3
SETTINGS: dict[str, object] = {
    "training__objective": "dpo",
    "training__beta": 0.5,
    "training__sampling": "sequential",
    "training__schedule": "constant",
    "training__warmup_ratio": 0,
    "training__max_steps": NUM_STEPS,
    "training__save_steps": 1,
    "quantization__method": "none",
    "lora__target_modules": TARGETS,
    "lora__rank": 4,
    "lora__alpha": 8,
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a prompt and two answers."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


@dataclass(frozen=True)
class Trained:
    """A run of pairs: what it reported, and its directory."""

    events: list[Any]
    directory: Path

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [event.loss for event in self.events if isinstance(event, StepDone)]

    @property
    def rewards(self) -> list[Rewards]:
        """What each step reported of its pairs."""
        return [event.rewards for event in self.events if isinstance(event, StepDone) and event.rewards is not None]

    @property
    def margins(self) -> list[float | None]:
        """The reward margin of each step."""
        return [rewards.margin for rewards in self.rewards]

    @property
    def accuracies(self) -> list[float]:
        """The reward accuracy of each step."""
        return [rewards.accuracy for rewards in self.rewards]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        """The weights of the adapter, by PEFT's names."""
        return read_tensors(self.directory / "adapter" / ADAPTER_WEIGHTS)


def write_pairs(file: Path, pairs: list[tuple[str, str, str]]) -> Path:
    """Write rows of a prompt and two answers."""
    parts = ("prompt", "chosen", "rejected")
    file.write_text("".join(json.dumps(dict(zip(parts, pair, strict=True))) + "\n" for pair in pairs), "utf-8")
    return file


def train_pairs(model: Path, pairs: Path, directory: Path, **flags: object) -> Trained:
    """Train on pairs in fp32, in the order of the file."""
    recorder = Recorder()
    train(train_settings(model, pairs, directory, **{**SETTINGS, **flags}), recorder)
    return Trained(recorder.events, directory)


@pytest.fixture(scope="module")
def trained(base_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of three steps of two pairs; no test may change it."""
    return train_pairs(base_model, pairs, tmp_path_factory.mktemp("run") / "run")


class _Logged(TrainerCallback):
    """Keeps what a trainer logs."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        self.logs += [logs] if logs and "loss" in logs else []


def _dpo_row(row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = sequences_of(row)
    answers = [[token for token in one["labels"] if token != IGNORE_INDEX] for one in (chosen, rejected)]
    prompt = chosen["input_ids"][: -len(answers[0])]
    return {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]}


def _orpo_row(row: dict[str, Any]) -> dict[str, Any]:
    sides = dict(zip(("chosen", "rejected"), sequences_of(row), strict=True))
    return {
        f"{side}_{key}": values
        for side, one in sides.items()
        for key, values in (
            ("input_ids", one["input_ids"]),
            ("attention_mask", [1] * len(one["input_ids"])),
            ("labels", one["labels"]),
        )
    }


@dataclass(frozen=True)
class OfTrl:
    """A trainer of TRL: its rows, made of ours, and some that its own reading is content with."""

    config: type
    trainer: type
    rows_of: Callable[[Iterable[dict[str, Any]]], list[dict[str, Any]]]
    readable: Sequence[dict[str, Any]] = ({"prompt": "a", "chosen": "b", "rejected": "c"},)


DPO = OfTrl(DPOConfig, DPOTrainer, lambda rows: list(map(_dpo_row, rows)))
ORPO = OfTrl(ORPOConfig, ORPOTrainer, lambda rows: list(map(_orpo_row, rows)))


def train_by_trl(
    trl: OfTrl, prepared: PreparedRun, model: Path, folder: Path, **arguments: Any
) -> tuple[list[dict[str, float]], PeftModel]:
    """Train by TRL's own trainer on the same tokens, from the same adapter; return its logs and the model."""
    training = prepared.settings.training
    rows = trl.rows_of(prepared.train_data.dataset)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    begins = {name: weight for name, weight in prepared.model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                weight.copy_(begins[name])
    logged = _Logged()
    division = {
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
    }
    config = trl.config(
        output_dir=str(folder),
        beta=0.5,
        max_steps=NUM_STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        activation_checkpointing=False,
        seed=0,
        **{**division, **arguments},
    )
    trainer = trl.trainer(
        model=adapted,
        args=config,
        train_dataset=Dataset.from_list(list(trl.readable)),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[logged],
    )
    trainer.train_dataset = Dataset.from_list(rows)  # the tokens of our reader, which may differ from theirs
    trainer.train()
    return logged.logs, adapted


def test_losses_rewards_and_adapter_are_those_of_trl(
    trained: Trained, base_model: Path, pairs: Path, tmp_path: Path
) -> None:
    prepared = prepare_run(train_settings(base_model, pairs, tmp_path / "run", **SETTINGS), Recorder())
    logs, model = train_by_trl(DPO, prepared, base_model, tmp_path / "trl")
    assert trained.losses == pytest.approx([log["loss"] for log in logs], rel=1e-5)
    assert max(trained.losses) - min(trained.losses) > 0.01, "far more than what is allowed"
    assert trained.margins == pytest.approx([log["rewards/margins"] for log in logs], abs=1e-5)
    assert trained.accuracies == [log["rewards/accuracies"] for log in logs]
    theirs = dict(model.named_parameters())
    assert trained.adapter
    for name, weight in trained.adapter.items():
        torch.testing.assert_close(weight, theirs[name.replace(".weight", ".default.weight")], rtol=0, atol=1e-5)


def test_losses_parts_and_adapter_of_orpo_are_those_of_trl(base_model: Path, tmp_path: Path) -> None:
    # TRL's negative log-likelihood is of the prompt as well, and over all tokens of a micro-batch: hence a prompt of
    # the first token alone, which is never predicted, and a pair a micro-batch.
    pairs = write_pairs(
        tmp_path / "pairs.jsonl", [("", f"{prompt}{chosen}", f"{prompt}{other}") for prompt, chosen, other in PAIRS]
    )
    flags: dict[str, object] = {
        "training__objective": "orpo",
        "training__micro_batch_size": 1,
        "training__gradient_accumulation_steps": 2,
    }
    ours = train_pairs(base_model, pairs, tmp_path / "ours", **flags)
    prepared = prepare_run(train_settings(base_model, pairs, tmp_path / "run", **{**SETTINGS, **flags}), Recorder())
    logs, model = train_by_trl(ORPO, prepared, base_model, tmp_path / "trl")
    assert ours.losses == pytest.approx([log["loss"] for log in logs], rel=1e-5)
    assert max(ours.losses) - min(ours.losses) > 0.01, "far more than what is allowed"
    assert ours.margins == pytest.approx([log["rewards/margins"] for log in logs], abs=1e-5)
    assert ours.accuracies == [log["rewards/accuracies"] for log in logs]
    assert [one.chosen_nll for one in ours.rewards] == pytest.approx([log["nll_loss"] for log in logs], rel=1e-5)
    odds = [one.odds_ratio_loss for one in ours.rewards]
    assert odds == pytest.approx([-log["log_odds_ratio"] for log in logs], rel=1e-5)
    theirs = dict(model.named_parameters())
    assert ours.adapter
    for name, weight in ours.adapter.items():
        torch.testing.assert_close(weight, theirs[name.replace(".weight", ".default.weight")], rtol=0, atol=1e-5)


def test_micro_batches_and_recomputation_change_nothing(
    trained: Trained, base_model: Path, pairs: Path, tmp_path: Path
) -> None:
    filled = train_pairs(
        base_model,
        pairs,
        tmp_path / "filled",
        training__micro_batch_size=1,
        training__gradient_accumulation_steps=2,
        training__micro_batch_tokens=64,
        training__gradient_checkpointing="on",
    )
    assert filled.losses == pytest.approx(trained.losses, rel=1e-5)
    assert filled.margins == pytest.approx(trained.margins, abs=1e-5)
    for name, weight in filled.adapter.items():
        torch.testing.assert_close(weight, trained.adapter[name], rtol=0, atol=1e-5)


EXACT: dict[str, object] = {
    "data__eval_split": "2",
    "training__sampling": "random",
    "training__micro_batch_size": 1,
    "training__gradient_accumulation_steps": 2,
    "training__max_steps": 4,
    "training__eval_steps": 2,
    "training__logging_steps": 2,
}


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run with held-out pairs, with a copy next to it as it would be if killed after step 3."""

    directory: Path
    flags: dict[str, object]


@pytest.fixture(scope="module", params=[name for name in COMPARED_BY if name.has_pairs])
def whole(
    base_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Whole:
    """A run by each objective."""
    flags = {**SETTINGS, **EXACT, "training__objective": request.param}
    run = tmp_path_factory.mktemp("whole") / "run"
    train(train_settings(base_model, pairs, run, **flags), Copier(run, 3))
    return Whole(run, flags)


def test_a_killed_run_resumes_exactly_and_tells_its_rewards(
    whole: Whole, base_model: Path, pairs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    place_killed(whole.directory, 3, run)
    train(train_settings(base_model, pairs, run, **whole.flags), Recorder())
    assert_same(run, whole.directory)
    before, now = read_run(whole.directory), read_run(run)
    assert before.summary.rewards is not None
    assert [done.rewards for done in before.history.evaluations] == [done.rewards for done in now.history.evaluations]
    results = [
        json.loads((directory / "run.json").read_text("utf-8"))["result"] for directory in (whole.directory, run)
    ]
    assert [result["eval_rewards"] for result in results] == [asdict(before.summary.rewards)] * 2
    assert results[0]["rewards"] == results[1]["rewards"] is not None
    card = (run / "adapter" / "README.md").read_text("utf-8")
    objective = {"dpo": "dpo, beta 0.5, compared with the base", "orpo": "orpo, beta 0.5"}
    assert f"| objective | {objective[str(whole.flags['training__objective'])]} |" in card
    assert "nats a token" not in card


def test_the_held_out_loss_is_that_of_the_saved_adapter(
    whole: Whole, base_model: Path, pairs: Path, tmp_path: Path
) -> None:
    rows = settle_run(train_settings(base_model, pairs, tmp_path / "run", **whole.flags), Recorder()).rows
    assert rows.evaluation is not None
    plain = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, whole.directory / "adapter").eval()
    judge = {"dpo": _of_dpo, "orpo": _of_orpo}[str(whole.flags["training__objective"])]
    judged = [judge(model, *sequences_of(row)) for row in rows.evaluation.dataset]
    loss, margin = (torch.stack(values) for values in zip(*judged, strict=True))
    done = read_run(whole.directory).history.evaluations[-1]
    assert done.rewards is not None
    assert done.loss == pytest.approx(float(loss.mean()), rel=1e-5)
    assert done.rewards.margin == pytest.approx(float(margin.mean()), abs=1e-5)
    assert done.rewards.accuracy == pytest.approx(float((margin > 0).float().mean()))


def _of_dpo(model: PeftModel, *sides: dict[str, list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and the margin of a pair."""
    chosen, rejected = (_reward(model, side) for side in sides)
    return -torch.nn.functional.logsigmoid(chosen - rejected), chosen - rejected


@torch.no_grad()
def _of_orpo(model: PeftModel, *sides: dict[str, list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and the margin of a pair, by the odds themselves."""
    chosen, rejected = (
        log_prob(model, torch.tensor(side["input_ids"]), torch.tensor(side["labels"])).double()
        / sum(label != IGNORE_INDEX for label in side["labels"])
        for side in sides
    )
    odds_ratio = (chosen.exp() / (1 - chosen.exp())) / (rejected.exp() / (1 - rejected.exp()))
    return -chosen + 0.5 * torch.log1p(1 / odds_ratio), 0.5 * (chosen - rejected)


@torch.no_grad()
def _reward(model: PeftModel, side: dict[str, list[int]]) -> torch.Tensor:
    ids, labels = torch.tensor(side["input_ids"]), torch.tensor(side["labels"])
    with model.disable_adapter():
        reference = log_prob(model, ids, labels)
    return 0.5 * (log_prob(model, ids, labels) - reference)


def log_prob(model: PeftModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of the trained tokens of a sequence, by all logits."""
    log_probs = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)
    is_trained = labels[1:] != IGNORE_INDEX
    return log_probs.gather(1, ids[1:, None])[is_trained].sum()


def test_an_adapter_is_not_trained_further_where_pairs_are_compared_by_the_base(
    trained: Trained, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="can't be trained further with --objective dpo") as caught:
        settle_run(train_settings(trained.directory, pairs, tmp_path / "run", training__objective="dpo"), Recorder())
    assert "qlora merge" in str(caught.value.hint)


def test_orpo_trains_an_adapter_further(trained: Trained, base_model: Path, pairs: Path, tmp_path: Path) -> None:
    kept = {name: value for name, value in SETTINGS.items() if not name.startswith("lora")}
    flags = {**kept, "training__objective": "orpo", "training__max_steps": 1}
    recorder = Recorder()
    train(train_settings(trained.directory, pairs, tmp_path / "run", **flags), recorder)
    (loss,) = Trained(recorder.events, tmp_path / "run").losses
    rows = settle_run(train_settings(trained.directory, pairs, tmp_path / "again", **flags), Recorder()).rows
    plain = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, trained.directory / "adapter").eval()
    expected = [_of_orpo(model, *sequences_of(row))[0] for row in rows.train.dataset.select([0, 1])]
    assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_an_adapter_that_trains_parts_of_the_model_is_not_trained_further_on_pairs(
    base_model: Path, pairs: Path, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    config = LoraConfig(
        r=4, target_modules=TARGETS, task_type="CAUSAL_LM", trainable_token_indices={"embed_tokens": [5]}
    )
    get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="trains parts of the model itself") as caught:
        settle_run(
            train_settings(tmp_path / "adapter", pairs, tmp_path / "run", training__objective="orpo"), Recorder()
        )
    assert "qlora merge" in str(caught.value.hint)
