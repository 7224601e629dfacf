"""`qlora merge` as scripts and users see it: flags, keys of --json, the dry run, where the result goes, refusals."""

import json
import shlex
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.merging.merge_result import (
    AppliedAdapter,
    BaseChoice,
    Divergence,
    MergeReport,
    MergeResult,
    TensorPlan,
    Verification,
)
from tests.conftest import RunQlora
from tests.support.processes.forks import pipe_without_reader
from tests.support.processes.light_commands import LightQlora
from tests.support.runs.merge_command import adapter_alone, copy_run, merged, qlora_merge, refused, trained_run

FLAGS = (
    *("--output", "--base", "--dtype", "--format", "--weight", "--verify", "--no-verify", "--max-divergence"),
    *("--dry-run", "--base-model", "--revision", "--device", "--llama-cpp", "--gguf-type", "--push-to-hub"),
    *("--allow-pickle", "--trust-remote-code", "--overwrite", "--json"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("merge"))


@pytest.fixture(scope="module")
def result(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return merged(run, "--output", tmp_path_factory.mktemp("result") / "out")


def keys(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


# ---- what is shown


def test_json_is_one_object_with_every_key(result: dict[str, Any]) -> None:
    assert list(result) == keys(MergeResult)
    assert list(result["verification"]) == keys(Verification)
    assert list(result["verification"]["divergence"]) == keys(Divergence)
    assert list(result["base_choice"]) == keys(BaseChoice)
    assert list(result["adapters"][0]) == keys(AppliedAdapter)
    assert set(result) >= {
        *("output", "base", "num_merged_tensors", "bytes_written", "merge_seconds", "peak_host_bytes", "verification")
    }


def test_the_figures_are_of_what_was_done(run: Path, result: dict[str, Any]) -> None:
    output = Path(result["output"])
    assert (result["num_tensors"], result["num_merged_tensors"]) == (38, 28)
    assert result["bytes_written"] == sum(path.stat().st_size for path in output.iterdir())
    assert 0 < result["merge_seconds"] < result["total_seconds"]
    assert result["peak_host_bytes"] > 50 << 20
    assert result["outputs"] == {"hf": str(output)}
    assert result["adapters"][0]["path"] == str(run / "adapter")
    verification = result["verification"]
    assert verification["passed"]
    assert verification["max_divergence"] is None
    assert verification["divergence"]["mean_kl"] < 1e-3
    assert (verification["num_prompts"], verification["num_rows"]) == (4, 8)


def test_auto_takes_the_nearer_base_and_says_how_near_both_are(result: dict[str, Any]) -> None:
    choice = result["base_choice"]
    distances = {base: choice[base]["mean_kl"] for base in ("original", "dequantized")}
    assert choice["base"] == result["base"] == min(distances, key=lambda base: distances[base])
    assert any("is" in note and "into the original base" in note for note in result["notes"])


def test_the_text_says_what_was_merged_and_how_near_it_is(run: Path, tmp_path: Path) -> None:
    done = qlora_merge(run, "--output", tmp_path / "out", "--verbose")
    assert done.exit_code == 0, done.output
    first, *lines = done.stdout.splitlines()
    assert first == str(tmp_path / "out")
    for expected in ("28 of 38 merged, in bfloat16", "the nearer one as measured", "LoRA of rank 16"):
        assert expected in done.stdout
    headings = [line for line in lines if not line.startswith(" ")]
    assert headings == [
        "Distance from the model that was trained",
        "Verified against the base with the adapter on it",
    ]
    assert "\x1b" not in done.stdout
    assert "Merging into" in done.stderr
    assert done.stderr.endswith(f"next: vllm serve {shlex.quote(str(tmp_path / 'out'))}\n")


def test_a_dry_run_says_what_each_tensor_becomes_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    output = ("--output", tmp_path / "out")
    report = merged(run, *output, "--dry-run", "--base", "dequantized", "--dtype", "fp32")
    assert list(report) == keys(MergeReport)
    assert list(report["tensors"][0]) == keys(TensorPlan)
    by_name = {tensor["name"]: tensor for tensor in report["tensors"]}
    query = by_name["model.layers.0.self_attn.q_proj.weight"]
    assert (query["action"], query["base_dtype"], query["dtype"]) == ("merge", "BF16", "F32")
    assert (query["shape"], query["written_bytes"]) == ([256, 256], 4 * 256 * 256)
    assert by_name["model.norm.weight"]["action"] == "cast"
    actions = {count["action"]: count["num_tensors"] for count in report["actions"]}
    assert actions == {"cast": 10, "merge": 28}
    assert sum(count["written_bytes"] for count in report["actions"]) < report["disk_bytes"]
    assert report["base"] == "dequantized"
    text = qlora_merge(run, *output, "--dry-run")
    assert text.exit_code == 0
    assert text.stdout.startswith(f"{tmp_path / 'out'} (not written)\n")
    assert "merged, 256 x 256, BF16, in model.safetensors" in text.stdout
    assert "copied as bytes" in text.stdout
    assert "whichever base is measured to be nearer" in text.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_plan_and_the_merge_agree(run: Path, result: dict[str, Any], tmp_path: Path) -> None:
    plan = merged(run, "--output", tmp_path / "out", "--dry-run", "--base", result["base"])
    for key in ("num_tensors", "num_merged_tensors", "base_model", "adapters"):
        assert plan[key] == result[key]
    weights = Path(result["output"]) / "model.safetensors"
    written = sum(tensor["written_bytes"] for tensor in plan["tensors"])
    assert written < weights.stat().st_size < written + 10_000  # the header


# ---- flags


def test_it_has_every_promised_flag(run_qlora: RunQlora) -> None:
    shown = run_qlora("merge", "--help").stdout.replace("\n", " ") + " "
    assert [flag for flag in FLAGS if f" {flag} " not in shown] == []


def test_the_base_the_dtype_and_the_weight_change_what_is_written(run: Path, tmp_path: Path) -> None:
    plain = ("--no-verify", "--base", "original")
    contents = {}
    for name, options in {
        "original": plain,
        "dequantized": ("--no-verify", "--base", "dequantized"),
        "fp16": (*plain, "--dtype", "fp16"),
        "half": (*plain, "--weight", "0.5"),
    }.items():
        report = merged(run, "--output", tmp_path / name, *options)
        contents[name] = (tmp_path / name / "model.safetensors").read_bytes()
        assert report["base"] == ("dequantized" if name == "dequantized" else "original")
        assert report["dtype"] == ("float16" if name == "fp16" else "bfloat16")
        assert report["adapters"][0]["weight"] == (0.5 if name == "half" else 1)
    assert len(set(contents.values())) == 4


def test_several_adapters_are_added_together(run: Path, tmp_path: Path) -> None:
    twice = merged(
        run, run, "--weight", "0.5", "--weight", "0.5", "--output", tmp_path / "twice", "--base", "original"
    )
    merged(run, "--output", tmp_path / "once", "--base", "original")
    assert [adapter["weight"] for adapter in twice["adapters"]] == [0.5, 0.5]
    assert twice["verification"]["passed"]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice")]
    assert files[0] == files[1]


# ---- where the result goes


def test_the_result_of_a_run_goes_into_its_directory_and_that_of_an_adapter_next_to_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_run = copy_run(run, tmp_path / "own")
    plain = ("--no-verify", "--base", "original")
    assert merged(own_run, *plain)["output"] == str(own_run / "merged")
    assert "already holds another merge" in refused(own_run, *plain, "--dtype", "fp32")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert merged(adapter_alone(own_run), *plain)["output"] == "alone-merged"
    assert merged(own_run / "adapter", *plain)["output"] == "adapter-merged"
    assert sorted(path.name for path in Path().iterdir()) == ["adapter-merged", "alone-merged"]


# ---- a settings file of the run


@pytest.fixture
def train_file(run: Path, tmp_path: Path) -> Path:
    """A settings file that the run could have been trained with, except that its base has moved."""
    base = shutil.copytree(run.parent / "base", tmp_path / "moved")
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model: {{name: a/b, revision: v1, base_model: '{base}', dtype: fp16, device: cpu, new_tokens: '<x>'}}\n"
        "quantization: {method: int8}\n"
        "data: {dataset: rows.jsonl, eval_split: 5%}\n"
        "training: {max_steps: 2, eval_steps: 1}\n"
        f"output: {{directory: '{run}', push_to_hub: me/adapter, hub_private: false}}\n",
        encoding="utf-8",
    )
    return path


def test_a_settings_file_of_train_gives_the_base_and_nothing_about_the_output(
    run: Path, train_file: Path, tmp_path: Path
) -> None:
    options = ("--config", train_file, "--output", tmp_path / "out", "--no-verify", "--base", "original", "--json")
    done = qlora_merge(run, *options)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["base_model"] == str(tmp_path / "moved")
    assert (report["dtype"], report["pushed_to"]) == ("bfloat16", None)


def test_a_base_that_moved_can_be_given_by_a_file_as_well_as_by_the_flag(
    run: Path, train_file: Path, tmp_path: Path
) -> None:
    alone = adapter_alone(run, tmp_path / "alone")
    config = alone / "adapter_config.json"
    config.write_text(config.read_text().replace(str(run.parent / "base"), str(tmp_path / "gone")))
    options = ("--output", tmp_path / "out", "--dry-run")
    assert "gone" in refused(alone, *options)
    assert merged(alone, *options, "--config", train_file)["base_model"] == str(tmp_path / "moved")
    assert merged(alone, *options, "--base-model", tmp_path / "moved")["base_model"] == str(tmp_path / "moved")


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["RUN_OR_ADAPTER: is missing"]),
        (["./no"], ["RUN_OR_ADAPTER: no model at ./no"]),
        (
            ["./no", "--output", "FILE", "--weight", "0"],
            ["no model at ./no", "--output: ", "--weight: must", "3 problems"],
        ),
        (["RUN", "--weight", "1", "--weight", "2"], ["--weight: is given 2 times for 1 adapter"]),
        (["RUN", "--weight", "nan"], ["--weight: must be a number other than 0, got nan"]),
        (["RUN", "RUN"], ["--output: is missing"]),
        (["RUN", "--max-divergence", "-1"], ["--max-divergence: must be a number of nats"]),
        (["RUN", "--max-divergence", "1", "--no-verify"], ["--max-divergence: has no effect with --no-verify"]),
        (["RUN", "--llama-cpp", "."], ["--llama-cpp: merge.llama_cpp has no effect without --format gguf"]),
        (["RUN", "--gguf-type", "f16"], ["--gguf-type: merge.gguf_type has no effect without --format gguf"]),
        (["RUN", "--format", "gguf", "--llama-cpp", "./no"], ["--llama-cpp: no does not exist"]),
        (["RUN", "--public"], ["--public: merge.hub_private has no effect without merge.push_to_hub"]),
        (["RUN", "--push-to-hub", "me/x"], ["--push-to-hub: nothing can be pushed to the hub offline"]),
        (["RUN", "--base", "orignal"], ["--base: 'orignal' is not one of", "Did you mean original?"]),
        (["RUN", "--outptu", "x"], ["Did you mean --output?"]),
    ],
)
def test_mistakes_end_with_2_before_torch_is_imported(
    light_qlora: LightQlora, arguments: list[str], expected: list[str], run: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    given = [part.replace("RUN", str(run)).replace("FILE", str(tmp_path / "file")) for part in arguments]
    done = light_qlora("merge", *given, directory=tmp_path)
    assert (done.code, done.heavy) == (2, []), done.stderr
    assert [text for text in expected if text not in done.stderr] == []
    assert "hint: " in done.stderr
    assert done.stdout == ""


def test_an_error_with_json_is_one_object(run: Path) -> None:
    done = qlora_merge(run, "--revision", "main", "--json")
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert (error["type"], error["exit_code"]) == ("ModelError", 2)
    assert "Leave --revision out" in error["hint"]


# ---- streams


def test_the_reader_of_stdout_and_stderr_may_leave_and_the_model_exists(
    run_qlora: RunQlora, run: Path, tmp_path: Path
) -> None:
    command = ["merge", run, "--output", tmp_path / "out", "--no-verify", "--base", "original"]
    with pipe_without_reader() as pipe:
        assert run_qlora(*command, descriptors={1: pipe, 2: pipe}).code == 141
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_full_stdout_ends_with_1_and_the_model_exists(run_qlora: RunQlora, run: Path, tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full here")
    command = ["merge", run, "--output", tmp_path / "out", "--no-verify", "--base", "original", "--json"]
    with full.open("w") as stdout:
        done = run_qlora(*command, descriptors={1: stdout.fileno()})
    assert done.code == 1
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
