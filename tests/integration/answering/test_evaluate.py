"""Evaluations end to end: a run on its held-out rows, its checkpoints and merged model, and rows that were named."""

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_cli.errors import DataError, ModelError, QloraError, SettingsError
from qlora_cli.evaluating import evaluation as evaluating
from qlora_cli.evaluating import evaluation_plan
from qlora_cli.evaluating.evaluation import evaluate
from qlora_cli.evaluating.evaluation_plan import EvaluationPlan, plan_evaluation
from qlora_cli.evaluating.evaluation_result import Evaluation, SourceResult
from qlora_cli.events import Noted
from qlora_cli.loading.loader import LoadedModel, load_planned
from qlora_cli.loading.save import save_quantized
from qlora_cli.runs.run_result import TrainResult
from qlora_cli.settings.models import EvaluateSettings
from qlora_cli.settings.resolve import Sources, resolve
from qlora_cli.training.train_run import train
from tests.conftest import ASSETS, Recorder, train_settings, write_jsonl
from tests.support.models.loading import copy_tokenizer
from tests.support.models.shallow_model import save_shallow
from tests.support.runs.merging import save_changing

NUM_HELD_OUT = 7
# One batch of all held-out rows: the trainer averages the losses of batches, and that of one is its mean over tokens.
LEARNS = {"training__micro_batch_size": 12, "training__learning_rate": 5e-3, "training__max_steps": 4}


def write_rows(path: Path, source: str, begin: int, end: int) -> Path:
    lines = (ASSETS / source).read_text(encoding="utf-8").splitlines()[begin:end]
    return write_jsonl(path, [json.loads(line) for line in lines])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training rows, held-out rows and other rows, and a base, which no test may change."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_shallow(folder / "base")
    write_rows(folder / "train.jsonl", "train.jsonl", 0, 24)
    write_rows(folder / "held-out.jsonl", "held_out.jsonl", 0, NUM_HELD_OUT)
    write_rows(folder / "other.jsonl", "held_out.jsonl", 20, 32)
    return folder


def train_run(folder: Path, name: str, **changed: object) -> TrainResult:
    base, rows = folder / "base", folder / "train.jsonl"
    return train(train_settings(base, rows, folder / name, **{**LEARNS, **changed}), Recorder())


@pytest.fixture(scope="module")
def trained(folder: Path) -> TrainResult:
    """A run on an NF4 base that held out a file of rows."""
    held_out = str(folder / "held-out.jsonl")
    return train_run(folder, "run", data__eval_dataset=held_out, data__max_length=200, training__save_steps=2)


@pytest.fixture(scope="module")
def merged_run(folder: Path) -> TrainResult:
    """A run on an unquantized base that held out a share of its rows, and the model merged from it."""
    result = train_run(folder, "merged-run", data__eval_split="25%", quantization__method="none", training__seed=3)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32")
    merged = PeftModel.from_pretrained(base, result.adapter).merge_and_unload()
    merged.save_pretrained(result.output / "merged")
    copy_tokenizer(result.output / "merged")
    return result


def run_evaluation(
    model: Path, recorder: Recorder | None = None, request: dict[str, Any] | None = None, **flags: object
) -> Evaluation:
    values = {"model.name": str(model), "model.device": "cpu"}
    given = {**values, **{name.replace("__", "."): value for name, value in flags.items()}}
    given |= {f"evaluate.{key}": value for key, value in (request or {}).items()}
    resolved = resolve(Sources(flags={path: (path, value) for path, value in given.items()}), EvaluateSettings)
    return evaluate(resolved, recorder or Recorder())


def by_source(evaluation: Evaluation) -> dict[str, SourceResult]:
    return {source.source: source for source in evaluation.sources}


def warnings_of(recorder: Recorder) -> list[str]:
    return [event.message for event in recorder.events if isinstance(event, Noted) and event.level == "warning"]


# ---- what quantization costs


def plan_in_fp32(model: Path, rows: Path, quantization: str = "nf4") -> EvaluationPlan:
    """Return the plan to evaluate a model or adapter in fp32 on rows of at most 200 tokens."""
    flags: dict[str, Any] = {"model.name": str(model), "model.device": "cpu", "model.dtype": "fp32"}
    flags |= {"data.dataset": str(rows), "data.max_length": 200, "quantization.method": quantization}
    given = {path: (path, value) for path, value in flags.items()}
    return plan_evaluation(resolve(Sources(flags=given), EvaluateSettings), Recorder())


def exact_predictions(plan: EvaluationPlan) -> torch.Tensor:
    """Return the log-probabilities of all tokens where a trained one follows, and its id as the last column.

    `(trained tokens, vocabulary + 1)`, in fp64, by the model's own forward pass of a row at a time.
    """
    data, loaded = plan.read_rows(Recorder()).data.dataset, load_planned(plan.load_plan, Recorder())
    predictions = []
    for row in data:
        ids, labels = (torch.tensor(row[name])[None] for name in ("input_ids", "labels"))
        with torch.no_grad():
            log_probs = loaded.model(input_ids=ids).logits.double().log_softmax(-1)
        is_trained = labels[0, 1:] != -100
        chosen = log_probs[0, :-1][is_trained]
        predictions.append(torch.cat([chosen, labels[0, 1:][is_trained].double()[:, None]], 1))
    return torch.cat(predictions)


@pytest.mark.parametrize("has_adapter", [True, False])
def test_what_quantization_costs_is_the_divergence_from_the_model_itself(
    folder: Path, trained: TrainResult, has_adapter: bool
) -> None:
    held_out = folder / "held-out.jsonl"
    flags: dict[str, Any] = {"data__dataset": str(held_out), "data__max_length": 200, "model__dtype": "fp32"}
    model = trained.output if has_adapter else folder / "base"
    evaluation = run_evaluation(model, request={"with_unquantized": True, "batch_size": 3}, **flags)
    adapter = trained.adapter if has_adapter else None
    plans = [plan_in_fp32(adapter or folder / "base", held_out, method) for method in ("nf4", "none")]
    quantized, exact = (exact_predictions(plan) for plan in plans)
    targets = exact[:, -1].long()[:, None]
    one, two = quantized[:, :-1], exact[:, :-1]
    losses = [float(-log_probs.gather(1, targets).mean()) for log_probs in (one, two)]
    cost, sources = evaluation.quantization_cost, by_source(evaluation)
    assert cost is not None
    assert (cost.source, cost.quantization) == ("adapter" if has_adapter else "model", "nf4")
    assert sources["unquantized"].quantization == "none"
    assert cost.mean_kl == pytest.approx(float((two.exp() * (two - one)).sum(1).mean()), rel=1e-3)
    assert cost.top_token_agreement == pytest.approx(float((one.argmax(1) == two.argmax(1)).double().mean()))
    assert [sources[cost.source].loss, sources["unquantized"].loss] == pytest.approx(losses, rel=1e-5)
    assert cost.loss_difference == pytest.approx(float(losses[0] - losses[1]), abs=1e-5)
    assert cost.num_tokens == len(exact) == sources["unquantized"].num_tokens
    assert cost.mean_kl_stderr is not None
    assert cost.mean_kl is not None
    assert cost.mean_kl > 3 * cost.mean_kl_stderr > 0
    reversed_kl = float((one.exp() * (one - two)).sum(1).mean())
    assert cost.mean_kl != pytest.approx(reversed_kl, rel=1e-3)


def test_the_quantized_model_is_freed_before_the_unquantized_one_is_loaded(
    trained: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(*args: Any, **kwargs: Any) -> LoadedModel:
        assert all(model() is None for model in loaded)
        model = load_planned(*args, **kwargs)
        loaded.append(weakref.ref(model.model))
        return model

    monkeypatch.setattr(evaluating, "load_planned", load)
    evaluation = run_evaluation(trained.output, request={"with_unquantized": True})
    assert [source.source for source in evaluation.sources] == ["base", "adapter", "unquantized"]
    assert len(loaded) == 2


def test_where_nothing_is_quantized_it_is_refused(merged_run: TrainResult) -> None:
    request = {"with_unquantized": True}
    with pytest.raises(ModelError, match="is evaluated unquantized already") as refused:
        run_evaluation(merged_run.output, request=request)
    assert refused.value.setting == "evaluate.with_unquantized"


def test_a_base_that_is_stored_quantized_is_compared_with_the_one_that_it_was_made_from(folder: Path) -> None:
    request, rows, quantized = {"with_unquantized": True}, str(folder / "other.jsonl"), folder / "quantized"
    loaded = load_planned(plan_in_fp32(folder / "base", folder / "other.jsonl").load_plan, Recorder())
    save_quantized(loaded, quantized, Recorder())
    flags: dict[str, Any] = {"data__dataset": rows, "model__dtype": "fp32"}
    expected = run_evaluation(folder / "base", request=request, **flags).quantization_cost
    assert run_evaluation(quantized, request=request, **flags).quantization_cost == expected
    note = json.loads((quantized / "qlora.json").read_text())
    for changed, message in (
        ({"source_digest": "of other weights"}, "has other weights now"),
        ({"source": str(folder / "gone")}, "is not here"),
        ({"source": None}, "is quantized already, without the weights"),
    ):
        (quantized / "qlora.json").write_text(json.dumps({**note, **changed}))
        with pytest.raises(ModelError, match=message) as refused:
            run_evaluation(quantized, request=request, **flags)
        assert refused.value.setting == "evaluate.with_unquantized"


# ---- a run


def test_the_adapter_has_the_loss_that_its_run_measured_and_the_base_another(
    folder: Path, trained: TrainResult
) -> None:
    evaluation = run_evaluation(trained.output)
    base, adapter = evaluation.sources
    assert adapter.loss == pytest.approx(trained.eval_loss, abs=1e-5)
    assert (base.source, adapter.source, base.quantization, adapter.quantization) == ("base", "adapter", "nf4", "nf4")
    assert base.loss is not None
    assert adapter.loss is not None
    assert adapter.difference == pytest.approx(adapter.loss - base.loss)
    assert adapter.loss < base.loss - 0.1
    assert base.num_rows == adapter.num_rows == NUM_HELD_OUT
    assert evaluation.model == str(trained.output)
    assert (evaluation.base_model, evaluation.adapter) == (str(folder / "base"), trained.adapter)
    assert evaluation.compute_dtype == "fp32"


def test_the_length_of_a_run_is_too_much_for_a_base_with_fewer_positions(
    folder: Path, trained: TrainResult, tmp_path: Path
) -> None:
    base = shutil.copytree(folder / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    with pytest.raises(ModelError, match="more than the 16 positions"):
        run_evaluation(trained.output, model__base_model=str(base))


def test_the_base_under_an_adapter_is_evaluated_like_the_base_alone(trained: TrainResult, folder: Path) -> None:
    held_out = str(folder / "held-out.jsonl")
    base = by_source(run_evaluation(trained.output))["base"]
    (alone,) = run_evaluation(folder / "base", data__dataset=held_out, model__dtype="fp32").sources
    assert alone.source == "model"
    assert alone.loss == pytest.approx(base.loss, abs=1e-6)
    assert (alone.num_tokens, alone.token_accuracy) == (base.num_tokens, base.token_accuracy)


def test_rows_that_a_run_drew_are_the_same_rows(merged_run: TrainResult) -> None:
    evaluation = run_evaluation(merged_run.output, request={"with_base": False})
    assert by_source(evaluation)["adapter"].loss == pytest.approx(merged_run.eval_loss, abs=1e-5)
    assert by_source(evaluation)["adapter"].num_rows == 6
    recorded = json.loads((merged_run.output / "run.json").read_text())["data"]["eval"]["fingerprint"]
    assert evaluation.fingerprint == recorded


@pytest.mark.parametrize("flags", [{"data__max_length": 40}, {"data__loss_on": "all"}, {"training__seed": 4}])
def test_rows_that_a_run_drew_are_not_drawn_differently(merged_run: TrainResult, flags: dict[str, Any]) -> None:
    # Other rows would be held out, including rows that were trained on.
    with pytest.raises(DataError, match="not those of") as caught:
        run_evaluation(merged_run.output, data__accept_lost=True, **flags)
    assert "--dataset" in str(caught.value.hint)


def test_changed_held_out_data_is_noted(trained: TrainResult) -> None:
    recorder = Recorder()
    evaluation = run_evaluation(trained.output, recorder, data__loss_on="all")
    assert any("are not those of" in message for message in warnings_of(recorder))
    assert evaluation.notes
    assert run_evaluation(trained.output).notes == ()


def test_settings_of_the_run_decide_how_other_rows_are_read(trained: TrainResult, folder: Path) -> None:
    other_rows = str(folder / "other.jsonl")
    as_trained = run_evaluation(trained.output, data__dataset=other_rows)
    on_all = run_evaluation(trained.output, data__dataset=other_rows, data__loss_on="all")
    assert on_all.sources[0].num_tokens > as_trained.sources[0].num_tokens
    assert (as_trained.dataset, as_trained.is_training_data) == (other_rows, False)
    sample = run_evaluation(trained.output, data__dataset=f"{other_rows}#5", request={"with_base": False})
    assert sample.sources[0].num_rows == 5


def test_training_rows_are_noted_as_such(trained: TrainResult, folder: Path) -> None:
    recorder = Recorder()
    evaluation = run_evaluation(trained.output, recorder, data__dataset=str(folder / "train.jsonl#3"))
    assert evaluation.is_training_data
    assert any("was trained on" in message for message in warnings_of(recorder))
    copy = folder / "copy.jsonl"
    copy.write_bytes((folder / "train.jsonl").read_bytes())
    assert run_evaluation(trained.output, data__dataset=str(copy)).is_training_data
    held_out = run_evaluation(trained.output, data__eval_dataset=str(folder / "train.jsonl"))  # under another name
    assert held_out.is_training_data
    assert any("was trained on" in note for note in held_out.notes)


def test_a_run_without_held_out_rows_is_reported(folder: Path) -> None:
    result = train_run(folder, "without", training__max_steps=1)
    with pytest.raises(DataError, match="held no rows out") as caught:
        run_evaluation(result.output)
    assert "--dataset" in str(caught.value.hint)
    assert caught.value.exit_code == 2


def test_groups_held_out_from_a_mixture_are_held_out_again(folder: Path) -> None:
    names = [folder / f"{name}.jsonl" for name in ("small", "large")]
    for path, count in zip(names, (6, 18), strict=True):
        rows = [{"prompt": f"{path.stem} {i} ", "completion": f"it is {i}", "user": i % 4} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = train_run(
        folder,
        "mixed",
        data__dataset=(f"{names[0]}*0.5", f"{names[1]}*0.5"),
        data__mixing="all_exhausted",
        data__eval_split="25%",
        data__eval_group="user",
        training__max_steps=1,
    )
    held_out = run_evaluation(result.output, request={"with_base": False})
    assert held_out.sources[0].loss == pytest.approx(result.eval_loss, abs=1e-5)
    # Named rows are all read, whatever the run mixed or grouped.
    named = run_evaluation(result.output, data__dataset=tuple(map(str, names)), request={"with_base": False})
    assert named.sources[0].num_rows == 24


def test_a_checkpoint_is_evaluated_on_the_held_out_rows_of_its_run(trained: TrainResult) -> None:
    first, last = trained.checkpoints
    losses = [by_source(run_evaluation(path, request={"with_base": False}))["adapter"].loss for path in (first, last)]
    assert losses[1] == pytest.approx(trained.eval_loss, abs=1e-5)
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)


# ---- merged


def test_the_merged_model_in_a_run_is_compared_on_the_same_rows(merged_run: TrainResult) -> None:
    sources = by_source(run_evaluation(merged_run.output))
    assert list(sources) == ["base", "adapter", "merged"]
    assert sources["merged"].loss == pytest.approx(sources["adapter"].loss, abs=1e-5)
    assert sources["merged"].difference == pytest.approx(sources["adapter"].difference, abs=1e-5)
    assert sources["merged"].path == str(merged_run.output / "merged")
    assert sources["merged"].num_tokens == sources["adapter"].num_tokens


def test_a_checkpoint_is_not_compared_with_the_final_merged_model(merged_run: TrainResult) -> None:
    sources = by_source(run_evaluation(merged_run.checkpoints[0]))
    assert list(sources) == ["base", "adapter"]
    named = run_evaluation(merged_run.checkpoints[0], request={"merged": merged_run.output / "merged"})
    assert list(by_source(named)) == ["base", "adapter", "merged"]


def test_a_merged_model_is_compared_with_a_plain_base(merged_run: TrainResult, folder: Path) -> None:
    evaluation = run_evaluation(
        folder / "base",
        data__dataset=str(folder / "other.jsonl"),
        quantization__method="none",
        model__dtype="fp32",
        request={"merged": merged_run.output / "merged"},
    )
    sources = by_source(evaluation)
    assert list(sources) == ["base", "merged"]
    assert sources["merged"].difference is not None
    assert sources["merged"].difference < 0


def test_the_first_model_is_freed_before_the_merged_one_is_loaded(
    merged_run: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []

    def watched(*args: Any, **kwargs: Any) -> LoadedModel:
        gc.collect()
        assert [model() for model in alive if model() is not None] == []
        loaded = load_planned(*args, **kwargs)
        alive.append(weakref.ref(loaded.base))
        return loaded

    monkeypatch.setattr(evaluating, "load_planned", watched)
    run_evaluation(merged_run.output)
    assert len(alive) == 2


def test_a_merged_model_with_other_tokens_is_refused_before_weights_are_read(
    trained: TrainResult, merged_run: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in (merged_run.output / "merged").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    monkeypatch.delattr(evaluation_plan, "read_rows")  # and no rows are tokenized
    with pytest.raises(ModelError, match="the tokenizer of"):
        run_evaluation(trained.output, request={"merged": other})


def test_a_truncated_merged_model_is_refused_before_the_first_model_is_evaluated(
    trained: TrainResult, merged_run: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncated = tmp_path / "truncated"
    shutil.copytree(merged_run.output / "merged", truncated)
    (weights,) = truncated.glob("*.safetensors")
    with weights.open("rb+") as file:
        file.truncate(weights.stat().st_size - 1)
    monkeypatch.delattr(evaluation_plan, "read_rows")
    with pytest.raises(ModelError, match=weights.name):
        run_evaluation(trained.output, request={"merged": truncated})


# ---- what can't be evaluated


@pytest.mark.parametrize("with_base", [True, False])
def test_a_model_without_an_adapter_has_no_base(with_base: bool, folder: Path) -> None:
    with pytest.raises(ModelError, match="has no effect"):
        run_evaluation(folder / "base", data__dataset=str(folder / "other.jsonl"), request={"with_base": with_base})


@pytest.mark.parametrize("kind", ["pissa", "olora", "layers"])
def test_a_base_that_the_adapter_changes_is_skipped_with_a_note(kind: str, folder: Path, tmp_path: Path) -> None:
    adapter, recorder = save_changing(folder / "base", tmp_path / "adapter", kind), Recorder()
    flags: dict[str, Any] = {"data__dataset": str(folder / "other.jsonl"), "quantization__method": "none"}
    evaluation = run_evaluation(adapter, recorder, **flags)
    assert list(by_source(evaluation)) == ["adapter"]
    (note,) = [note for note in evaluation.notes if "the base is left out" in note]
    assert note in warnings_of(recorder)
    assert list(by_source(run_evaluation(adapter, request={"with_base": False}, **flags))) == ["adapter"]
    with pytest.raises(ModelError, match=r"evaluate.with_base: the base of .* can't be shown") as caught:
        run_evaluation(adapter, request={"with_base": True}, **flags)
    assert "evaluate the base by itself" in str(caught.value.hint)


def broken(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield records that do not fully say how their data was read."""
    yield {key: value for key, value in record.items() if key != "data"}
    yield {**record, "seed": None}
    yield {**record, "settings": {**record["settings"], "data": {**record["settings"]["data"], "loss_on": "some"}}}


def test_a_record_without_data_settings_is_reported_by_key(trained: TrainResult) -> None:
    run_file = trained.output / "run.json"
    whole = run_file.read_text()
    try:
        for number, record in enumerate(broken(json.loads(whole))):
            run_file.write_text(json.dumps(record))
            with pytest.raises(QloraError, match=r"run\.json") as caught:
                run_evaluation(trained.output)
            assert caught.value.exit_code == 2, number
    finally:
        run_file.write_text(whole)


def test_settings_in_a_file_hold_out_rows_as_training_would(folder: Path, merged_run: TrainResult) -> None:
    config = folder / "run.yaml"
    data = {"dataset": str(folder / "train.jsonl"), "eval_split": "25%"}
    config.write_text(json.dumps({"data": data, "training": {"seed": 3}}))  # JSON is YAML
    flags = {path: (path, value) for path, value in {"model.name": str(folder / "base")}.items()}
    resolved = resolve(Sources(config=config, flags=flags), EvaluateSettings)
    evaluation = evaluate(resolved, Recorder())
    assert evaluation.fingerprint == run_evaluation(merged_run.output, request={"with_base": False}).fingerprint
    config.write_text(json.dumps({"data": {"dataset": data["dataset"]}}))
    with pytest.raises(SettingsError, match="--dataset"):
        evaluate(resolve(Sources(config=config, flags=flags), EvaluateSettings), Recorder())


# ---- an adapter that grew the vocabulary

NEW = "<a1>"


@pytest.fixture(scope="module")
def with_new_tokens(folder: Path) -> TrainResult:
    return train_run(folder, "new-tokens", model__new_tokens=f"{NEW},<a2>", quantization__method="none")


def test_the_base_of_an_adapter_that_grew_the_vocabulary_is_the_base(
    folder: Path, with_new_tokens: TrainResult
) -> None:
    request = {"batch_size": 1}
    asked: dict[str, Any] = {"data__dataset": [str(folder / "held-out.jsonl")], "quantization__method": "none"}
    compared = by_source(run_evaluation(with_new_tokens.output, request=request, model__dtype="fp32", **asked))
    alone = by_source(run_evaluation(folder / "base", request=request, model__dtype="fp32", **asked))
    assert compared["base"].loss == alone["model"].loss
    assert compared["base"].token_accuracy == alone["model"].token_accuracy


def test_tokens_missing_in_the_base_are_left_out_of_every_compared_loss(
    with_new_tokens: TrainResult, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": f"It is {NEW} and {NEW}."}]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}] * 2)
    asked: dict[str, Any] = {"data__dataset": [str(rows)], "quantization__method": "none"}
    recorder = Recorder()
    compared = run_evaluation(with_new_tokens.output, recorder, **asked)
    sources = by_source(compared)
    note = "4 tokens to predict that the base does not have: left out of every loss; --no-base counts them"
    assert note in compared.notes
    assert note in warnings_of(recorder)
    assert sources["base"].loss is not None
    alone = by_source(run_evaluation(with_new_tokens.output, request={"with_base": False}, **asked))
    assert sources["base"].num_tokens == sources["adapter"].num_tokens == alone["adapter"].num_tokens - 4


def test_rows_without_a_token_that_the_base_can_predict_are_an_error(
    with_new_tokens: TrainResult, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Who?", "completion": NEW * 40}])
    with pytest.raises(DataError, match=r"\d+ tokens to predict, all of them new, which the base does not have"):
        run_evaluation(
            with_new_tokens.output,
            data__dataset=[str(rows)],
            data__max_length=24,
            data__accept_lost=True,
            quantization__method="none",
        )
