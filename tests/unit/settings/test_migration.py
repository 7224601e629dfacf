"""Configurations of other tools become settings files of ours that are read, and nothing in them is lost silently."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.errors import SettingsError
from qlora_cli.settings.foreign_names import FOREIGN, TABLE
from qlora_cli.settings.migration import TOOLS, Migration, as_yaml, migrate
from qlora_cli.settings.models import SECTIONS, TrainSettings, all_settings, value_adapter
from qlora_cli.settings.resolve import Resolved, Sources, resolve

AXOLOTL = """
base_model: owner/base-8b
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets:
  - {path: owner/rows, type: alpaca, split: train}
  - {path: data.jsonl, type: alpaca, split: train, field_instruction: question}
val_set_size: 0.05
output_dir: runs/axolotl
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 64
lora_target_linear: true
lora_target_modules:
train_on_inputs: true
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 1e-4
micro_batch_size: 2
num_epochs: 4
bf16: auto
gradient_checkpointing: true
warmup_steps: 10
evals_per_epoch: 4
wandb_project:
deepspeed: zero2.json
an_unknown_key: 3
"""
LLAMA_FACTORY = """
model_name_or_path: owner/base-8b
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
output_dir: saves/lora
quantization_bit: 4
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
val_size: 0.1
eval_strategy: steps
eval_steps: 500
plot_loss: true
use_dft_loss: true
"""
TRL = r"""
#!/bin/sh
trl sft --model_name_or_path owner/base-8b --dataset_name owner/rows --load_in_4bit --use_peft \
    --lora_r 8 --learning-rate=2e-4 --max_steps -1 --output_dir out --packing --loss_type dft  # comment
"""


def migrated(text: str, tmp_path: Path, name: str = "theirs.yaml") -> Migration:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return migrate(path)


def as_read(migration: Migration, tmp_path: Path, **required: Any) -> Resolved[TrainSettings]:
    """Return the written file as `train` reads it."""
    path = tmp_path / "qlora.yaml"
    path.write_text(as_yaml(migration, Path("theirs.yaml")), encoding="utf-8")
    flags = {key.replace("__", "."): (key, value) for key, value in required.items()}
    return resolve(Sources(config=path, flags=flags), TrainSettings)


def test_a_configuration_of_axolotl(tmp_path: Path) -> None:
    migration = migrated(AXOLOTL, tmp_path)
    read = as_read(migration, tmp_path).settings
    assert migration.tool == "axolotl"
    assert (read.model.name, read.quantization.method, read.lora.rank, read.lora.alpha) == (
        "owner/base-8b",
        "nf4",
        32,
        64,
    )
    assert (read.data.dataset, read.data.format) == (("owner/rows", "data.jsonl"), "alpaca")
    assert (read.data.max_length, read.data.packing, read.data.loss_on, read.data.eval_split) == (
        4096,
        True,
        "all",
        "0.05",
    )
    training = read.training
    assert (training.optimizer, training.learning_rate, training.epochs) == ("adamw_8bit", 1e-4, 4)
    assert (training.micro_batch_size, training.gradient_accumulation_steps) == (2, 1)  # the second by default there
    left = {entry.key for entry in migration.left_out if not entry.is_needless}
    assert left == {"warmup_steps", "evals_per_epoch", "deepspeed", "an_unknown_key", "datasets.field_instruction"}
    assert {entry.key for entry in migration.left_out if entry.is_needless} == {"model_type"}


def test_a_configuration_of_llama_factory(tmp_path: Path) -> None:
    migration = migrated(LLAMA_FACTORY, tmp_path)
    read = as_read(migration, tmp_path, data__dataset="rows.jsonl").settings
    assert migration.tool == "LLaMA-Factory"
    assert (read.quantization.method, read.lora.rank, read.lora.alpha) == ("nf4", 8, 16)  # by default there
    assert read.lora.target_modules == "all-linear"
    assert (read.training.warmup_ratio, read.training.eval_steps, read.training.max_grad_norm) == (0.1, 500, 1.0)
    assert read.training.loss == "dft"
    reasons = {entry.key: entry.reason for entry in migration.left_out if not entry.is_needless}
    assert set(reasons) == {"dataset", "template", "eval_strategy"}
    assert "dataset_info.json" in reasons["dataset"]


def test_a_command_with_arguments_of_trl(tmp_path: Path) -> None:
    migration = migrated(TRL, tmp_path, "train.sh")
    read = as_read(migration, tmp_path).settings
    assert migration.tool == "TRL"
    assert (read.data.dataset, read.data.packing, read.training.max_steps) == (("owner/rows",), True, None)
    assert (read.quantization.method, read.lora.rank, read.training.learning_rate) == ("nf4", 8, 2e-4)
    assert (read.training.epochs, read.training.micro_batch_size, read.training.schedule) == (3, 8, "linear")
    assert read.training.loss == "dft"
    assert [entry.key for entry in migration.left_out] == ["use_peft"]


@pytest.mark.parametrize(
    ("more", "method"),
    [
        ("", "none"),
        ("adapter: lora", "none"),
        ("adapter: qlora", "nf4"),
        ("load_in_8bit: true\nadapter: lora", "int8"),
        ("adapter: lora\nload_in_4bit: true\nbnb_4bit_quant_type: fp4", "fp4"),
    ],
)
def test_what_is_not_quantized_there_is_not_quantized_here(tmp_path: Path, more: str, method: str) -> None:
    migration = migrated(f"base_model: m\nsequence_len: 64\n{more}\n", tmp_path)
    read = as_read(migration, tmp_path, data__dataset="d", output__directory="o").settings
    assert read.quantization.method == method


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\n", "has no key of axolotl"),
        ("- 1\n", "neither a mapping"),
        ("a: [\n", "is not valid YAML"),
        ("", "neither a mapping"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        migrated(text, tmp_path)


def test_every_entry_of_the_table_is_sound() -> None:
    assert len(FOREIGN) == sum(len(entry.names) for entry in TABLE) > 150  # no name twice
    for entry in TABLE:
        assert entry.setting is None or entry.setting in all_settings()
        assert entry.setting is not None or entry.advice
        assert all(name == name.lower() and "-" not in name for name in entry.names)
        for value in entry.values.values():
            if value is not None:
                assert entry.setting is not None
                section, key = entry.setting.split(".")
                value_adapter(SECTIONS[section], key).validate_python(value)


def test_every_default_of_a_tool_is_a_value_of_ours_and_not_our_default() -> None:
    for tool in TOOLS:
        for path, value in tool.defaults.items():
            section, key = path.split(".")
            assert (
                value_adapter(SECTIONS[section], key).validate_python(value)
                != SECTIONS[section].model_fields[key].default
            )


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5000),
    st.floats(-2, 2),
    st.text(max_size=12),
    st.lists(st.text(max_size=5)),
)


@given(
    st.dictionaries(
        st.sampled_from(sorted({*FOREIGN, "learning_rate", "packing", "nobody", "bell\x07"})), VALUES, min_size=1
    )
)
def test_no_key_is_lost_and_what_is_written_is_read(keys: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "theirs.yaml"
        path.write_text(yaml.safe_dump(keys), encoding="utf-8")
        try:
            migration = migrate(path)
        except SettingsError:
            return
    written = yaml.safe_load(as_yaml(migration, path))
    assert {f"{section}.{key}" for section, values in written.items() for key in values} == set(migration.values)
    told = {*migration.sources.values(), *(entry.key for entry in migration.left_out)}
    for key, value in keys.items():
        entry = FOREIGN.get(key)
        is_default = entry is not None and str(value).lower() in entry.values
        is_off = value is False and entry is not None and entry.setting is None
        is_replaced = entry is not None and entry.setting in migration.values
        own = next((path for path in migration.values if path.endswith(f".{key}")), None)
        assert key in told or value in (None, "", [], {}) or is_default or is_off or is_replaced or own, key


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        ("dpo", "rl: dpo\nrl_beta: 0.2"),
        ("dpo", "stage: dpo\npref_beta: 0.2\npref_loss: sigmoid"),
        ("orpo", "rl: orpo\norpo_alpha: 0.2"),
        ("orpo", "pref_loss: orpo\npref_beta: 0.2\nstage: dpo"),
    ],
)
def test_training_by_comparison_is_translated(objective: str, text: str, tmp_path: Path) -> None:
    migration = migrated(f"base_model: owner/base-8b\ndatasets: rows.jsonl\noutput_dir: run\n{text}\n", tmp_path)
    training = as_read(migration, tmp_path).settings.training
    assert (training.objective, training.beta) == (objective, 0.2)
    assert migration.left_out == []


@pytest.mark.parametrize(
    ("desirable", "undesirable"),
    [("kto_chosen_weight", "kto_rejected_weight"), ("kto_desirable_weight", "kto_undesirable_weight")],
)
def test_weights_of_labels_are_translated_where_they_are_read(
    desirable: str, undesirable: str, tmp_path: Path
) -> None:
    text = f"base_model: owner/base-8b\ndatasets: rows.jsonl\noutput_dir: run\n{desirable}: 1.5\n{undesirable}: 0.5\n"
    text += "micro_batch_size: 4\n"
    training = as_read(migrated(f"{text}rl: kto\n", tmp_path), tmp_path).settings.training
    assert (training.objective, training.desirable_weight, training.undesirable_weight) == ("kto", 1.5, 0.5)
    assert {entry.key for entry in migrated(f"{text}rl: dpo\n", tmp_path).left_out} == {desirable, undesirable}


@pytest.mark.parametrize("stage", ["", "stage: sft\n", "rl: null\n"])
def test_what_other_tools_read_of_pairs_alone_is_left_out_without_them(stage: str, tmp_path: Path) -> None:
    text = (
        f"base_model: owner/base-8b\ndatasets: rows.jsonl\noutput_dir: run\npref_loss: orpo\npref_beta: 0.2\n{stage}"
    )
    migration = migrated(text, tmp_path)
    assert as_read(migration, tmp_path).settings.training.objective == "sft"
    assert {(entry.key, entry.is_needless) for entry in migration.left_out} == {
        ("pref_loss", True),
        ("pref_beta", True),
    }
    assert not {"training.objective", "training.beta"} & set(migration.values)
