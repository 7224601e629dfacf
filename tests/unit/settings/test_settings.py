"""Settings: precedence, origins, and every problem at once."""

import os
import subprocess
import threading
from pathlib import Path

import pytest

from qlora_cli.errors import SettingsError
from qlora_cli.settings.choices import METHODS, Checkpointing, Quantization
from qlora_cli.settings.models import SECTIONS, EstimateSettings, LoadSettings, TrainSettings, json_schema
from qlora_cli.settings.resolve import Sources, describe, resolve
from qlora_cli.settings.value_sources import read_assignments

REQUIRED = {
    "model.name": ("--model", "base"),
    "data.dataset": ("--dataset", "rows.jsonl"),
    "output.directory": ("--output", "run"),
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(sources: Sources, kind: type[LoadSettings] = TrainSettings) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        resolve(sources, kind)
    return [f"{problem} | {problem.hint}" for problem in caught.value.problems]


def test_flag_beats_set_beats_file_beats_default(tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", "lora:\n  rank: 4\n  alpha: 4\n  dropout: 0.1\n")
    resolved = resolve(
        Sources(
            config=config,
            assignments=["lora.rank=5", "lora.alpha=5"],
            flags={**REQUIRED, "lora.rank": ("--rank", "6")},
        ),
        TrainSettings,
    )
    lora = resolved.settings.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (6, 5, 0.1, "all-linear")
    assert resolved.origin_of("lora.rank").where == "--rank"
    assert resolved.origin_of("lora.alpha").where == "--set lora.alpha"
    assert resolved.origin_of("lora.dropout").where == f"{config}:4"
    assert resolved.origin_of("lora.target_modules").kind == "default"


def test_all_problems_are_reported_at_once_with_file_line_and_flag(tmp_path: Path) -> None:
    config = write(
        tmp_path / "run.yaml",
        "model:\n  dtpe: bf16\ntraning:\n  seed: 1\ntraining:\n  optimizer: adamw_toch\n  seed: -1\n",
    )
    problems = problems_of(
        Sources(config=config, assignments=["lora.alpa=1", "lora"], flags={"training.epochs": ("--epochs", "many")})
    )
    for expected in (
        f"{config}:2: unknown setting 'model.dtpe' | Did you mean dtype?",
        f"{config}:3: unknown section 'traning' | Did you mean training?",
        f"{config}:6 training.optimizer: 'adamw_toch' is not one of",
        f"{config}:7 training.seed: must be greater than or equal to 0, got -1",
        "--set lora.alpa: unknown setting 'lora.alpa' | Did you mean alpha?",
        "--set lora: expected section.key=value",
        "--epochs: expected a number, got 'many'",
        "model.name: is missing",
        "data.dataset: is missing",
        "output.directory: is missing",
    ):
        assert any(expected in line for line in problems), (expected, problems)
    assert len(problems) == 10


def test_a_key_in_the_wrong_section_gets_a_hint_at_the_right_one(tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", "training:\n  rank: 8\nrank: 8\n")
    problems = problems_of(Sources(config=config, flags=REQUIRED))
    assert [line for line in problems if "Did you mean lora.rank?" in line] == problems
    assert len(problems) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1\n", "must be a mapping"),
        ("lora: [1, 2]\n", "must be a mapping of settings"),
        ("lora:\n  rank: 1\n  rank: 2\n", ":3: 'rank' is given twice, first on line 2"),
        ("lora:\n  rank: 1\n bad\n", ":3: is not valid YAML"),
        ("lora:\n  target_modules: &a [*a]\n", ":2: &a is an anchor or alias"),
        ("lora: &a\n  rank: 1\ntraining: {seed: *a}\n", ":1: &a is an anchor or alias"),
        ("lora:\n  rank: *a\n", ":2: *a is an anchor or alias"),
        ("lora:\n  rank: 1\n  target_modules: " + "[" * 50_000 + "]" * 50_000, ":3: nested too deeply (more than 20"),
        ("lora:\n  target_modules:\n  " + "- " * 50_000 + "x", ":3: nested too deeply (more than 20"),
        ("lora:\n  ? " + "{" * 21 + "}" * 21 + "\n  : 1", ":2: nested too deeply (more than 20"),
        ("lora:\n" + "# a comment\n" * 25_000, "is larger than 256.00 KiB: no settings file"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    config = write(tmp_path / "run.yaml", text)
    problems = problems_of(Sources(config=config, flags=REQUIRED))
    assert any(expected in line for line in problems), problems


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    config = tmp_path / "pipe"
    os.mkfifo(config)
    threading.Thread(target=config.write_text, args=["lora:\n  rank: 3\n"], daemon=True).start()
    assert resolve(Sources(config=config, flags=REQUIRED), TrainSettings).settings.lora.rank == 3


def test_an_endless_pipe_is_read_only_up_to_the_size_limit_of_a_file(tmp_path: Path) -> None:
    config = tmp_path / "pipe"
    os.mkfifo(config)
    with subprocess.Popen(["/bin/sh", "-c", 'while :; do echo "# more"; done > "$1"', "sh", str(config)]) as endless:
        problems = problems_of(Sources(config=config, flags=REQUIRED))
        endless.kill()
    assert any("is larger than 256.00 KiB: no settings file" in line for line in problems), problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training:\n  seed: !number 1\n", ":2 training.seed: can't be read: could not determine a constructor"),
        ("training:\n  seed: 2024-13-45\n", ":2 training.seed: can't be read: month must be in 1..12"),
        ("lora: !section {rank: 1}\n? [a]\n: 1\n", ":2: unknown section"),
        ("lora: !section 1\n", ":1: section 'lora' must be a mapping of settings"),
        ("training:\n  epochs: .inf\n", ":2 training.epochs: must be a finite number, got inf"),
        ("lora:\n  alpha: .nan\n", "lora.alpha: must be"),
        ("model:\n  revision: 1234567\n", "got 1234567 | Put it in quotes: YAML reads it as a number."),
        ("model:\n  rope_scaling: ''\n", "model.rope_scaling: expected TYPE:FACTOR"),
        ("training:\n  memory_budget: [1, 2]\n", "expected a size such as 6GiB or 500MB, got '[1, 2]'"),
        ("training:\n  memory_budget: 1.5\n", "expected a size such as 6GiB or 500MB, got 1.5"),
        ("model:\n  dtype: BF17\n", "'BF17' is not one of auto, bf16, fp16, fp32 | Did you mean bf16?"),
        ("quantization:\n  method:\n", "quantization.method: 'None' is not one of nf4, fp4, int8, none"),
    ],
)
def test_an_unusable_value_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    config = write(tmp_path / "run.yaml", text)
    (problem,) = problems_of(Sources(config=config, flags=REQUIRED))
    assert expected in problem


def test_values_of_set_that_yaml_cannot_read_are_text() -> None:
    problems = problems_of(
        Sources(assignments=["training.seed=2024-13-45", "training.max_steps=!x 1"], flags=REQUIRED)
    )
    assert sorted(line.split(" | ")[0] for line in problems) == [
        "--set training.max_steps: expected a whole number, got '!x 1'",
        "--set training.seed: expected a whole number, got '2024-13-45'",
    ]


@pytest.mark.parametrize("value", ["*a", "&a", "[&a x, *a]", "[" * 21 + "]" * 21])
def test_unsupported_yaml_in_set_is_text(value: str) -> None:
    sources = Sources(assignments=[f"data.format={value}"], flags=REQUIRED)
    assert f"--set data.format: {value!r} is not one of" in problems_of(sources)[0]


LONG_NUMBERS = {  # of more than 4,300 decimal digits, which Python refuses to convert in base 10
    "base 16": "0x" + "F" * 4000,
    "base 16, quoted": f'!!int "0x {"F" * 4000}"',
    "base 2": "-0b" + "1" * 15_000,
    "base 8": "0" + "7" * 5000,
    "base 10": "+" + "9" * 400,
    "base 60": "1" + ":59" * 5000,
    "base 60, with a fraction": "1" + ":59" * 5000 + ".5",
    "base 60, as a float": f'!!float "1{":59" * 5000}"',
}
NUMBERED = ("lora.rank", "lora.dropout", "lora.target_modules", "data.dataset", "data.columns", "training.max_steps")


@pytest.mark.parametrize("number", LONG_NUMBERS)
@pytest.mark.parametrize("form", ["{}", "[{}]", "{{a: {}}}", "{{{}: a}}", "{{? {} : a}}"])
def test_a_number_of_thousands_of_digits_is_an_error_anywhere(tmp_path: Path, number: str, form: str) -> None:
    for path in NUMBERED:
        section, key = path.split(".")
        text = form.format(LONG_NUMBERS[number])
        config = write(tmp_path / "run.yaml", f"{section}:\n  {key}: {text}\n")
        (problem,) = problems_of(Sources(config=config, flags=REQUIRED))
        assert f"{config}:2: a number of more than 256 characters" in problem
        read, _ = read_assignments([f"{path}={text}"])
        assert [entry.value for entry in read] == [text]


@pytest.mark.parametrize("setting", ["data.eval_split=", "model.rope_scaling=linear:"])
def test_a_number_beyond_a_float_is_an_error_in_a_text(setting: str) -> None:
    (problem,) = problems_of(Sources(assignments=[f"{setting}{'9' * 400}"], flags=REQUIRED))
    assert ": expected " in problem


def test_a_long_text_is_not_a_number_and_a_long_value_is_truncated(tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", f"model:\n  system: '{'9' * 400}'\n  dtype: {'9 x' * 400}\n")
    problems = problems_of(Sources(config=config, flags=REQUIRED))
    assert all(len(line) < 600 and "a number" not in line for line in problems), problems


def test_an_empty_file_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    assert resolve(Sources(config=write(tmp_path / "a.yaml", "# nothing\n"), flags=REQUIRED), TrainSettings)
    marked = tmp_path / "b.yaml"
    marked.write_bytes(b"\xef\xbb\xbflora:\n  rank: 3\n")
    assert resolve(Sources(config=marked, flags=REQUIRED), TrainSettings).settings.lora.rank == 3


def test_a_missing_or_binary_file_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    assert "No such file" in problems_of(Sources(config=tmp_path / "no.yaml", flags=REQUIRED))[0]
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in problems_of(Sources(config=binary, flags=REQUIRED))[0]


def test_yaml_1_1_surprises_are_read_as_intended(tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", "training:\n  learning_rate: 2e-4\n  gradient_checkpointing: on\nlora:\n")
    training = resolve(Sources(config=config, flags=REQUIRED), TrainSettings).settings.training
    assert training.learning_rate == 2e-4
    assert training.gradient_checkpointing is Checkpointing.ON
    off = resolve(
        Sources(assignments=["training.gradient_checkpointing=off"], flags=REQUIRED), TrainSettings
    ).settings.training
    assert off.gradient_checkpointing is Checkpointing.OFF


def test_target_modules_are_a_list_however_they_are_given() -> None:
    by_flag = {**REQUIRED, "lora.target_modules": ("--target-modules", "q_proj, v_proj")}
    assert resolve(Sources(flags=by_flag), TrainSettings).settings.lora.target_modules == ("q_proj", "v_proj")
    by_set = Sources(assignments=["lora.target_modules=[q_proj]"], flags=REQUIRED)
    assert resolve(by_set, TrainSettings).settings.lora.target_modules == ("q_proj",)
    empty = {**REQUIRED, "lora.target_modules": ("--target-modules", ",")}
    assert "must name at least one" in problems_of(Sources(flags=empty))[0]


def test_load_needs_only_a_model_but_checks_the_rest(tmp_path: Path) -> None:
    flags = {"model.name": ("MODEL", "base")}
    config = write(tmp_path / "run.yaml", "training:\n  seed: 3\n")
    assert resolve(Sources(config=config, flags=flags), LoadSettings).settings.model.name == "base"
    config = write(tmp_path / "run.yaml", "training:\n  seed: x\n")
    assert "training.seed" in problems_of(Sources(config=config, flags=flags), LoadSettings)[0]


def test_a_setting_that_can_have_no_effect_is_an_error() -> None:
    alone = {**REQUIRED, "training.eval_steps": ("--eval-steps", "5")}
    assert "no effect without held-out data" in problems_of(Sources(flags=alone))[0]
    unquantized = {
        **REQUIRED,
        "quantization.method": ("--quant", "none"),
        "quantization.compute_dtype": ("--compute-dtype", "bf16"),
    }
    assert "no effect with --quant none" in problems_of(Sources(flags=unquantized))[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("key", "off"),
    [
        ("double_quant", "false"),
        ("compute_dtype", "auto"),
        ("skip_modules", "null"),
        ("int8_has_fp16_weight", "false"),
        ("int8_cpu_offload", "false"),
    ],
)
def test_a_value_that_turns_a_setting_off_is_accepted_with_every_method(
    method: Quantization, key: str, off: str
) -> None:
    sources = Sources(assignments=[f"quantization.{key}={off}", f"quantization.method={method.value}"], flags=REQUIRED)
    assert resolve(sources, TrainSettings).settings.quantization.method is method


@pytest.mark.parametrize(
    ("path", "synonym", "canonical"),
    [
        (path, synonym, name)
        for path in ("model.dtype", "quantization.compute_dtype", "quantization.quant_storage")
        for name, synonyms in {
            "bf16": ("bfloat16", "torch.bfloat16"),
            "fp16": ("float16", "half", "torch.float16"),
            "fp32": ("float32", "float", "torch.float32"),
        }.items()
        for synonym in synonyms
    ]
    + [("quantization.method", "8bit", "int8"), ("quantization.method", "8-bit", "int8")],
)
def test_synonyms_of_a_value_are_accepted_and_shown_by_its_canonical_name(
    path: str, synonym: str, canonical: str
) -> None:
    sources = Sources(assignments=[f"{path}={synonym}"], flags=REQUIRED)
    section, key = path.split(".")
    assert getattr(getattr(resolve(sources, TrainSettings).settings, section), key).value == canonical
    shown = {path: value for path, value, _ in describe(sources)}
    assert shown[path].value == canonical


@pytest.mark.parametrize("value", ["4bit", "int4", "4-bit"])
def test_a_name_that_could_mean_two_methods_is_an_error_with_a_hint(value: str) -> None:
    (problem,) = problems_of(Sources(assignments=[f"quantization.method={value}"], flags=REQUIRED))
    assert problem.endswith("Choose nf4 or fp4; nf4 is the default.")


@pytest.mark.parametrize(
    "assignment",
    [
        "training.early_stopping_patience=null",
        "training.load_best_model_at_end=false",
        "data.accept_lost=false",
        "training.eval_steps=null",
        "training.sample_prompts=null",
    ],
)
def test_a_setting_that_is_off_needs_no_other(assignment: str) -> None:
    assert resolve(Sources(assignments=[assignment, "data.on_long=error"], flags=REQUIRED), TrainSettings)


def test_schema_and_show_know_every_setting() -> None:
    paths = [f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields]
    assert len(paths) >= 35
    assert [path for path, _, _ in describe(Sources())] == paths
    schema = json_schema()
    for section, model in SECTIONS.items():
        reference = schema["properties"][section]
        name = (reference.get("$ref") or reference["allOf"][0]["$ref"]).rsplit("/", 1)[-1]
        definition = schema["$defs"][name]
        assert set(definition["properties"]) == set(model.model_fields)
        assert definition["additionalProperties"] is False
        assert all(field.description for field in model.model_fields.values())


def test_a_switch_is_not_a_number(tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", "training:\n  seed: yes\n  epochs: true\n  max_steps: on\n")
    problems = problems_of(Sources(config=config, flags=REQUIRED))
    assert len(problems) == 3
    assert all("expected a number, got True" in line for line in problems)


@pytest.mark.parametrize(
    "assignment",
    ["merge.max_divergence=true", "merge.weights=[yes, 2]", "lora.rank_pattern={q_proj: on}", "generate.top_k=yes"],
)
def test_a_switch_within_a_list_or_pattern_is_not_a_number(assignment: str) -> None:
    (problem,) = problems_of(Sources(assignments=[assignment], flags=REQUIRED))
    assert "expected a number" in problem


# ---- settings of a prediction

MODEL_ONLY = {"model.name": ("MODEL", "base")}


def test_an_estimate_needs_a_model_and_nothing_else() -> None:
    settings = resolve(Sources(flags=MODEL_ONLY), EstimateSettings).settings
    assert settings.data.dataset is None
    assert settings.data.max_length == 2048
    assert (settings.lora.rank, settings.training.micro_batch_size) == (16, 1)
    with pytest.raises(SettingsError, match="MODEL: is missing"):
        resolve(Sources(), EstimateSettings, {"model.name": "MODEL"})


def test_an_estimate_accepts_a_train_file_unchanged(tmp_path: Path) -> None:
    text = "model: {name: base}\ndata: {dataset: rows.jsonl, max_length: 512}\noutput: {directory: run}\n"
    config = write(tmp_path / "train.yaml", text)
    settings = resolve(Sources(config=config, flags=MODEL_ONLY), EstimateSettings).settings
    assert (settings.data.dataset, settings.data.max_length) == (("rows.jsonl",), 512)
    assert "output" not in type(settings).model_fields
    assert resolve(Sources(config=config), TrainSettings).settings.data.max_length == 512


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {max_length: 1}\n", "data.max_length: must be greater than or equal to 8"),
        ("data: {dataset: ''}\n", "data.dataset: must not be empty"),
        ("data: {datset: x}\n", "unknown setting 'data.datset' | Did you mean dataset?"),
        ("output: {report_to: paper}\n", "output.report_to: 'paper' is not one of"),
        (
            "training: {gradient_checkpointing: offlod}\n",
            "is not one of auto, on, selective, off, offload | Did you mean offload",
        ),
    ],
)
def test_an_estimate_checks_every_section_of_a_file(tmp_path: Path, text: str, expected: str) -> None:
    config = write(tmp_path / "run.yaml", text)
    (problem,) = problems_of(Sources(config=config, flags=MODEL_ONLY), EstimateSettings)
    assert expected in problem


def test_an_estimate_of_evaluation_needs_no_held_out_data() -> None:
    sources = Sources(assignments=["training.eval_steps=5"], flags=MODEL_ONLY)
    assert resolve(sources, EstimateSettings).settings.training.eval_steps == 5


def test_an_estimate_refuses_settings_without_effect_and_dangers_in_a_file(tmp_path: Path) -> None:
    flags = {**MODEL_ONLY, "quantization.method": ("--quant", "none")}
    sources = Sources(assignments=["quantization.compute_dtype=bf16"], flags=flags)
    assert "no effect with --quant none" in problems_of(sources, EstimateSettings)[0]
    config = write(tmp_path / "run.yaml", "model: {trust_remote_code: true}\n")
    assert "in a settings file" in problems_of(Sources(config=config, flags=MODEL_ONLY), EstimateSettings)[0]


def test_checkpointing_can_be_offloaded() -> None:
    flags = {**REQUIRED, "training.gradient_checkpointing": ("--gradient-checkpointing", "offload")}
    settings = resolve(Sources(flags=flags), TrainSettings).settings
    assert settings.training.gradient_checkpointing is Checkpointing.OFFLOAD


@pytest.mark.parametrize("value", ["!!bool x", '!!int ""', "!!int _", '!!float ""', "!!timestamp x"])
def test_a_value_that_does_not_match_its_tag_is_an_error(tmp_path: Path, value: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"lora:\n  rank: {value}\n")
    for sources, where in (
        (Sources(config=file), f"{file}:2 lora.rank"),
        (Sources(assignments=[f"lora.rank={value}"]), "--set lora.rank"),
    ):
        with pytest.raises(SettingsError) as caught:
            resolve(sources, TrainSettings)
        assert where in {problem.where for problem in caught.value.problems}
