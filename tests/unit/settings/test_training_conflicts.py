"""Settings of the loop that have no effect or can't work together with another: an error that names both."""

from pathlib import Path
from typing import get_args

import pytest

from qlora_cli.errors import Problem, SettingsError
from qlora_cli.settings.choices import Attention, Optimizer
from qlora_cli.settings.models import (
    EstimateSettings,
    InspectMemorySettings,
    LoadSettings,
    TrainSettings,
    all_settings,
    field_of,
    metadata_of,
)
from qlora_cli.settings.objectives import COMPARED_BY
from qlora_cli.settings.resolve import Resolved, Sources, resolve

HELD_OUT = {"data.eval_split": "10%", "training.eval_steps": "5"}


def problems(values: dict[str, str], kind: type[LoadSettings] = TrainSettings) -> list[Problem]:
    flags = {"model.name": "m", "data.dataset": "d.jsonl", "output.directory": "run", **values}
    try:
        resolve(Sources(flags={path: (f"--{path}", value) for path, value in flags.items()}), kind)
    except SettingsError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("objective", COMPARED_BY)
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.neftune_noise_alpha", "5", "the noise would differ"),
        ("training.torch_compile", "true", "compiled layers were not tried"),
        ("training.calibrate", "true", "the rows that calibrate a base have one answer"),
        ("training.memory_budget", "20GiB", "the rows that it is spent by have one answer"),
        ("data.packing", "true", "an answer is compared as a whole"),
        ("data.streaming", "true", "its rows are read before the first step"),
        ("data.loss_on", "all", "answers are compared, and prompts are not"),
        ("data.format", "alpaca", " compares "),
        ("training.loss", "dft", "it has a loss of its own"),
        ("lora.dropout", "0.1", "noise to the comparison"),
        ("lora.modules_to_save", "lm_head", "no gradient of single answers"),
        ("model.new_tokens", "<x>", "no gradient of single answers"),
    ],
)
def test_what_can_not_be_trained_by_comparison_is_refused(path: str, value: str, message: str, objective: str) -> None:
    asked = {"training.objective": objective}
    assert problems(asked) == []
    found = [problem for problem in problems({**asked, path: value}) if message in problem.message]
    assert [problem.where for problem in found] == [f"--{path}"]
    assert f"--objective {objective}" in found[0].message
    assert found[0].hint is not None
    assert not any(message in problem.message for problem in problems({path: value}))


def test_an_adapter_that_changes_the_base_is_refused_where_answers_are_compared_by_it() -> None:
    changed = {"lora.init_lora_weights": "pissa", "quantization.method": "none"}
    (problem,) = problems({"training.objective": "dpo", **changed})
    assert "begins elsewhere than the base" in problem.message
    assert problems({"training.objective": "orpo", **changed}) == []


def test_an_objective_implies_what_is_not_given() -> None:
    def resolved(**values: str) -> Resolved[TrainSettings]:
        flags = {"model.name": "m", "data.dataset": "d", "output.directory": "o", "training.objective": "dpo"}
        given = {**flags, **{name.replace("__", "."): value for name, value in values.items()}}
        return resolve(Sources(flags={path: (f"--{path}", value) for path, value in given.items()}), TrainSettings)

    implied = resolved()
    assert (implied.settings.data.format, implied.settings.training.learning_rate) == ("preference", 5e-6)
    assert resolved(training__objective="orpo").settings.training.learning_rate == 8e-5
    assert resolved(training__objective="kto").settings.data.format == "unpaired_preference"
    assert implied.origin_of("data.format").where == "training.objective"
    assert not implied.is_given("training.learning_rate")
    assert resolved(training__learning_rate="1e-4", data__format="auto").settings.training.learning_rate == 1e-4
    assert resolved(data__format="auto").settings.data.format == "preference"


def test_beta_and_pairs_need_an_objective_that_compares() -> None:
    assert ["no effect with --objective sft" in one.message for one in problems({"training.beta": "0.2"})] == [True]
    (problem,) = problems({"data.format": "preference"})
    assert "which --objective dpo or orpo compares" in problem.message
    (problem,) = problems({"data.format": "preference", "training.objective": "kto"})
    assert "which --objective dpo or orpo compares" in problem.message


def test_labels_and_their_weights_need_kto() -> None:
    (problem,) = problems({"data.format": "unpaired_preference", "training.objective": "dpo"})
    assert "which --objective kto compares" in problem.message
    for weight in ("desirable_weight", "undesirable_weight"):
        (problem,) = problems({f"training.{weight}": "2", "training.objective": "dpo"})
        assert "no effect with --objective dpo" in problem.message


def test_a_step_of_one_row_has_no_baseline() -> None:
    one = {"training.micro_batch_size": "1", "training.gradient_accumulation_steps": "1"}
    (problem,) = problems({**one, "training.objective": "kto"})
    assert "a step of one row has no other answer to compare with" in problem.message
    assert problems({**one, "training.objective": "dpo"}) == []


@pytest.mark.parametrize(
    ("values", "where", "message"),
    [
        ({"schedule": "constant", "warmup_ratio": "0.1"}, "warmup_ratio", "no effect with --schedule constant"),
        ({"schedule": "cosine", "min_lr_ratio": "0.2"}, "min_lr_ratio", "no effect with --schedule cosine"),
        ({"schedule": "linear", "decay_ratio": "0.2"}, "decay_ratio", "no effect with --schedule linear"),
        ({"schedule": "linear", "polynomial_power": "2"}, "polynomial_power", "no effect with --schedule linear"),
        ({"cosine_cycles": "3"}, "cosine_cycles", "no effect with --schedule cosine"),
        ({"schedule": "warmup_stable_decay", "decay_ratio": "0.98"}, "decay_ratio", "more than a run has"),
        ({"schedule": "warmup_stable_decay", "warmup_ratio": "0.95"}, "warmup_ratio", "more than a run has"),
        ({"optimizer": "sgd", "adam_beta2": "0.95"}, "adam_beta2", "no such moving average"),
        ({"optimizer": "adafactor", "adam_beta2": "0.95"}, "adam_beta2", "no such moving average"),
        ({"optimizer": "lion_8bit", "adam_beta2": "0.95"}, "adam_beta2", "Lion uses its own, 0.99"),
        ({"torch_compile": "true", "gradient_checkpointing": "offload"}, "torch_compile", "manage their own"),
        ({"torch_compile": "true", "gradient_checkpointing": "selective"}, "torch_compile", "manage their own"),
        ({"sample_tokens": "10"}, "sample_tokens", "without prompts"),
        ({"max_nan_skips": "3"}, "max_nan_skips", "nothing is skipped"),
    ],
)
@pytest.mark.parametrize("kind", [TrainSettings, EstimateSettings])
def test_a_setting_that_another_makes_ineffective_or_impossible_is_refused(
    kind: type[LoadSettings], values: dict[str, str], where: str, message: str
) -> None:
    (problem,) = problems({f"training.{key}": value for key, value in values.items()}, kind)
    assert problem.where == f"--training.{where}"
    assert message in problem.message
    assert f"training.{where}" in problem.message or "more than a run has" in problem.message
    assert problem.hint is not None


@pytest.mark.parametrize("kind", [TrainSettings, EstimateSettings])
def test_compiled_attention_keeps_no_products(kind: type[LoadSettings]) -> None:
    for attention in Attention:
        flags = {"model.attention": attention.value, "training.gradient_checkpointing": "selective"}
        found = problems(flags, kind)
        assert len(found) == (attention == Attention.FLEX_ATTENTION)
        assert all("store all scores" in problem.message and problem.hint for problem in found)


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": "constant", "warmup_ratio": "0"},
        {"schedule": "constant_with_warmup", "warmup_ratio": "0.1"},
        {"schedule": "warmup_stable_decay", "warmup_ratio": "0.25", "decay_ratio": "0.75", "min_lr_ratio": "0"},
        {"schedule": "polynomial", "polynomial_power": "2", "min_lr_ratio": "0.2"},
        {"schedule": "cosine_with_restarts", "cosine_cycles": "3"},
        {"schedule": "cosine_with_min_lr", "min_lr_ratio": "0.2"},
        {"optimizer": "paged_adamw_8bit", "adam_beta2": "0.95"},
        {"optimizer": "sgd", "weight_decay": "0.1"},
        {"torch_compile": "true", "gradient_checkpointing": "on"},
        {"sample_tokens": "10", "sample_prompts": "Hello"},
        {"max_nan_skips": "3", "on_nan": "skip"},
        {"auto_micro_batch": "true", "micro_batch_size": "1"},
        {"load_best_model_at_end": "false"},
    ],
)
def test_settings_that_work_together_are_accepted(values: dict[str, str]) -> None:
    assert problems({f"training.{key}": value for key, value in values.items()}) == []


@pytest.mark.parametrize(("setting", "value"), [("early_stopping_patience", "2"), ("load_best_model_at_end", "true")])
def test_settings_that_depend_on_evaluations_need_them(setting: str, value: str) -> None:
    path = f"training.{setting}"
    (neither,) = problems({path: value})
    assert "without training.eval_steps and held-out data" in neither.message
    (no_steps,) = problems({path: value, "data.eval_split": "10%"})
    assert "without training.eval_steps:" in no_steps.message
    no_data = problems({path: value, "training.eval_steps": "5"})
    assert any("without held-out data:" in problem.message and problem.where == f"--{path}" for problem in no_data)
    assert problems({path: value, **HELD_OUT}) == []
    assert problems({path: value}, EstimateSettings) == []  # reads no data


def test_a_private_or_public_repository_needs_a_push_to_it() -> None:
    (problem,) = problems({"output.hub_private": "false"})
    assert problem.message == "output.hub_private has no effect without output.push_to_hub"
    assert problems({"output.hub_private": "false", "output.push_to_hub": "me/adapter"}) == []


def test_every_setting_that_needs_another_names_valid_values_of_it() -> None:
    needing = {path: needed for path in all_settings() if (needed := metadata_of(path).effective_with) is not None}
    assert len(needing) >= 5
    for path, needed in needing.items():
        other = field_of(f"{path.split('.')[0]}.{needed.key}")
        assert needed.values
        assert {type(value) for value in needed.values} <= {other.annotation, *get_args(other.annotation)}


def test_each_optimizer_belongs_to_one_family_or_none() -> None:
    assert {name.value for name in Optimizer if name.is_adam} == {
        *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
    }
    lions = {name.value for name in Optimizer if name.is_lion}
    assert lions == {"lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"}
    assert {name.value for name in Optimizer if not name.is_adam and not name.is_lion} == {"sgd", "adafactor"}
    assert {name.value for name in Optimizer if name.is_8bit} == {
        *("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit")
    }


def test_the_file_and_line_of_a_conflict_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("model:\n  name: m\ndata:\n  dataset: d\ntraining:\n  optimizer: sgd\n  adam_beta2: 0.9\n")
    with pytest.raises(SettingsError, match=r"s\.yaml:7"):
        resolve(Sources(config=path, flags={"output.directory": ("--output", "run")}), TrainSettings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization.method": "int8"}, "--quant int8: bitsandbytes keeps a copy"),
        ({"quantization.method": "auto"}, "--quant auto: which method fits"),
        ({"training.torch_compile": "true"}, "training.torch_compile: compiled layers"),
        ({"training.auto_micro_batch": "true"}, "--auto-micro-batch: a process that runs out of memory"),
        ({"model.offload_embedding": "true"}, "--offload-embedding: the embedding is sharded"),
        ({"lora.use_dora": "true"}, "lora.use_dora: magnitudes"),
        ({"lora.modules_to_save": "lm_head"}, "lora.modules_to_save: a module that is trained whole"),
        ({"lora.init_lora_weights": "loftq"}, "lora.init_lora_weights=loftq: the matrices"),
    ],
)
def test_what_needs_whole_weights_is_refused_with_a_sharded_base(values: dict[str, str], message: str) -> None:
    assert problems({**values, "training.strategy": "ddp"}) == []
    (problem,) = problems({**values, "training.strategy": "FSDP", "training.num_gpus": "2"})
    assert f"--strategy fsdp can't be used with {message}" in problem.message
    assert problem.hint is not None


def test_a_base_in_host_memory_is_a_sharded_one() -> None:
    offloaded = {"training.offload_base": "true", "training.num_gpus": "2"}
    for strategy in ("auto", "fsdp"):
        assert problems({**offloaded, "training.strategy": strategy}) == []
    for kind in (TrainSettings, InspectMemorySettings):
        (problem,) = problems({**offloaded, "training.strategy": "ddp"}, kind)
        assert "--offload-base can't be used with --strategy ddp" in problem.message
        assert "--strategy fsdp" in (problem.hint or "")
    (problem,) = problems({**offloaded, "lora.use_dora": "true"})
    assert "--offload-base can't be used with lora.use_dora" in problem.message


def test_a_prediction_refuses_what_a_sharded_base_can_not_be_used_with() -> None:
    sharded = {"training.strategy": "fsdp", "training.num_gpus": "2"}
    assert problems(sharded, InspectMemorySettings) == []
    (problem,) = problems({**sharded, "lora.use_dora": "true"}, InspectMemorySettings)
    assert "lora.use_dora" in problem.message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training.num_gpus": "2"}, "is spent by one process, and --num-gpus starts several"),
        ({"quantization.method": "none"}, "is spent on layers in 16 bit, as all are with --quant none"),
        ({"data.streaming": "true", "training.max_steps": "5"}, "data.streaming reads none before the first step"),
    ],
    ids=str,
)
def test_a_memory_budget_needs_layers_to_choose_and_rows_to_choose_by(values: dict[str, str], message: str) -> None:
    (problem,) = problems({**values, "training.memory_budget": "20GiB"})
    assert problem.where.startswith("--training.memory_budget")
    assert message in problem.message
    assert problems(values) == []
    assert problems({"training.memory_budget": "20GiB", "quantization.method": "auto"}) == []
