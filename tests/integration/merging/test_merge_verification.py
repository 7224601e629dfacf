"""Faults that verification finds, however little an adapter does; and merged models older than their adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qlora_cli.cli.app import app
from qlora_cli.merging import companion_files, merger
from qlora_cli.merging.merge_result import Action
from qlora_cli.merging.merger import Merger
from qlora_cli.merging.planning.buffer import Buffer
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.merging.planning.merge_plan import MergePlan, PlannedTensor
from qlora_cli.merging.planning.weight_changes import LowRankUpdate
from qlora_cli.merging.verifying.comparison import ModelComparer
from tests.conftest import write_jsonl
from tests.support.runs.merge_command import adapter_alone, copy_run, merged, qlora_merge, refused, trained_run
from tests.support.runs.merging import change_adapter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gentle(shallow_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt so little that a bound of 0.001 nats on all differences would be far above its effect."""
    return trained_run(tmp_path_factory.mktemp("gentle"), shallow_base, training__learning_rate=2e-5)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on all layers of the bundled model, in which rounding adds up."""
    return trained_run(tmp_path_factory.mktemp("deep"), training__learning_rate=2e-5)


def failed(run: Path, *arguments: str) -> str:
    """Merge, which must end with 1 and keep what it wrote; return the message."""
    done = qlora_merge(run, *arguments, "--device", "cpu", "--json")
    assert done.exit_code == 1, done.output
    assert (run / "merged-failed-verification" / "config.json").is_file()
    assert not (run / "merged").exists()
    message: str = json.loads(done.stdout)["error"]["message"]
    return message


def test_a_right_merge_passes_by_a_wide_margin(gentle: Path, tmp_path: Path) -> None:
    verification = merged(copy_run(gentle, tmp_path / "copy"))["verification"]
    assert verification["passed"]
    assert 0 <= verification["unrounded"]["mean_kl"] < verification["max_unexplained"] / 100
    assert verification["differing_parameters"] == []
    assert verification["num_parameters"] == 21  # all tensors, one of which is embedding and head


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_an_update_of_another_scale_is_found(
    gentle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, base: str
) -> None:
    delta = LowRankUpdate.delta

    def scaled(self: LowRankUpdate, index: int | None = None, buffer: Buffer | None = None) -> torch.Tensor:
        return delta(self, index, buffer).mul_(factor)

    monkeypatch.setattr(LowRankUpdate, "delta", scaled)
    assert "rounding does not explain" in failed(copy_run(gentle, tmp_path / "copy"), "--base", base)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_tensor_that_was_not_merged_into_its_file_is_found(
    gentle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    value, forgotten = Merger.value, []

    def forgetful(self: Merger, planned: PlannedTensor) -> torch.Tensor:
        if planned.action == Action.MERGE and planned.name == f"model.layers.{layer}.mlp.down_proj.weight":
            forgotten.append(planned.name)
            return self._model.tensors[planned.name]
        return value(self, planned)

    monkeypatch.setattr(Merger, "value", forgetful)
    message = failed(copy_run(gentle, tmp_path / "copy"), "--base", "original")
    assert message == f"1 weight not in the files as merged, such as {forgotten[0]}"


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_one_module_whose_update_is_of_another_scale_is_named(
    gentle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    delta, seen = LowRankUpdate.delta, []

    def scaled(self: LowRankUpdate, index: int | None = None, buffer: Buffer | None = None) -> torch.Tensor:
        # The same layer has the same address each time: the values are mapped from the adapter's file.
        seen.append(self.left)
        wrong = self.left.data_ptr() == seen[0].data_ptr()
        return delta(self, index, buffer).mul_(factor if wrong else 1.0)

    monkeypatch.setattr(LowRankUpdate, "delta", scaled)
    message = failed(copy_run(gentle, tmp_path / "copy"), "--base", "original")
    assert "computes something else with the adapter merged" in message
    assert "model.layers.0." in message


def rounded_twice(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return (weight.float() + delta).half().bfloat16()


def update_rounded_first(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return weight.bfloat16() + delta.bfloat16()


def rounded_towards_zero(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return (weight.float() + delta).view(torch.int32).bitwise_and(-65536).view(torch.float32).bfloat16()


@pytest.mark.parametrize("rounded", [rounded_twice, update_rounded_first, rounded_towards_zero])
def test_a_value_that_is_not_the_sum_in_fp32_cast_once_is_found(
    gentle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounded: Callable[..., torch.Tensor]
) -> None:
    """Also if the same code computes what the file should hold: in fp32 it is correct."""
    added = merger._added

    def wrong(weight: torch.Tensor, delta: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        if delta is None or dtype != torch.bfloat16:
            return added(weight, delta, dtype)
        return rounded(weight, delta)

    monkeypatch.setattr(merger, "_added", wrong)
    message = failed(copy_run(gentle, tmp_path / "copy"), "--base", "original")
    assert message.startswith("14 weights not in the files as merged, such as model.layers.0.")


def test_a_tensor_in_another_dtype_is_found(gentle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy_run(gentle, tmp_path / "copy")
    fill = companion_files.write_companion_files

    def also_change(inputs: Inputs, plan: MergePlan, model: Path) -> None:
        fill(inputs, plan, model)
        tensors = load_file(model / "model.safetensors")
        save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].float()}, model / "model.safetensors")

    monkeypatch.setattr("qlora_cli.merging.merge_run.write_companion_files", also_change)
    assert failed(run, "--base", "original") == "1 weight not in the files as merged, such as model.norm.weight"


@pytest.mark.parametrize(("share", "passes"), [(0.1, True), (0.6, False)])
def test_a_difference_of_few_tokens_in_fp32_is_expert_routing_and_one_of_most_tokens_is_a_wrong_merge(
    gentle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, passes: bool
) -> None:
    unrounded = ModelComparer.unrounded

    def moved(self: ModelComparer, plan: MergePlan) -> torch.Tensor:
        logits = unrounded(self, plan).clone()
        logits[: int(share * len(logits)), ::2] += 1
        return logits

    monkeypatch.setattr(ModelComparer, "unrounded", moved)
    run = copy_run(gentle, tmp_path / "copy")
    if passes:
        verification = merged(run, "--base", "original")["verification"]
        assert (
            verification["unrounded"]["mean_kl"]
            > verification["max_unexplained"]
            > verification["unrounded"]["median_kl"]
        )
    else:
        assert "in fp32 the median KL divergence is" in failed(run, "--base", "original")


# ---- what rounding costs


Tensors = dict[str, torch.Tensor]


def coarse(run: Path) -> Path:
    """Return a strong adapter on a base of weights around 0.5, of which rounding to bf16 loses much of the update."""
    file, adapter = run.parent / "base" / "model.safetensors", adapter_alone(run)
    tensors = load_file(file)
    for name in tensors:
        if "up_proj" in name or "v_proj" in name:
            tensors[name] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    change_adapter(adapter, lambda state: {k: v * (40 if "lora_B" in k else 1) for k, v in state.items()})
    return adapter


def test_a_right_merge_with_large_rounding_passes_and_a_more_precise_dtype_is_suggested(
    deep: Path, tmp_path: Path
) -> None:
    adapter = coarse(copy_run(deep, tmp_path / "copy"))
    report = merged(adapter, "--output", tmp_path / "bf16")
    verification = report["verification"]
    assert verification["passed"]
    assert verification["is_exact"]
    far, less = verification["divergence"]["mean_kl"], verification["less_rounded"]
    assert far > 1e-3
    assert less["dtype"] == "fp16"
    assert less["mean_kl"] < far / 10
    assert any(f"--dtype fp16 moves it by {less['mean_kl']:.2g}, at the same size" in note for note in report["notes"])
    in_fp16 = merged(adapter, "--output", tmp_path / "fp16", "--dtype", "fp16")["verification"]
    assert in_fp16["divergence"]["mean_kl"] == pytest.approx(less["mean_kl"], rel=1e-3)
    assert in_fp16["less_rounded"] is None


ATTENTION = tuple(f"layers.0.self_attn.{name}_proj" for name in "qkv")


def scaled(tensors: Tensors, ends: tuple[str, ...], factor: float) -> Tensors:
    return {name: value * factor if any(end in name for end in ends) else value for name, value in tensors.items()}


def test_fp32_is_suggested_if_the_range_of_fp16_is_too_small(deep: Path, tmp_path: Path) -> None:
    """One weight is beyond the range and others are smaller to make up for it: the model computes the same."""
    adapter = coarse(copy_run(deep, tmp_path / "copy"))
    file = adapter.parent / "base" / "model.safetensors"
    large = scaled(load_file(file), ("layers.0.input_layernorm",), 2.0**20)
    save_file(scaled(large, ATTENTION, 2.0**-20), file, metadata={"format": "pt"})
    change_adapter(adapter, lambda state: scaled(state, tuple(f"{name}.lora_A" for name in ATTENTION), 2.0**-20))
    verification = merged(adapter, "--output", tmp_path / "out")["verification"]
    assert verification["passed"]
    assert verification["less_rounded"]["dtype"] == "fp32"
    assert verification["less_rounded"]["mean_kl"] < 1e-6


def test_a_bound_below_what_rounding_does_fails(gentle: Path, tmp_path: Path) -> None:
    message = failed(copy_run(gentle, tmp_path / "copy"), "--base", "original", "--max-divergence", "1e-9")
    assert "more than 1e-09" in message


# ---- what changed afterwards


def stderr_of(*command: str | Path) -> str:
    """Run a command, which must succeed, and return its stderr."""
    done = CliRunner().invoke(app, [*map(str, command), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    return done.stderr


def test_a_merged_model_of_another_adapter_is_reported(gentle: Path, tmp_path: Path) -> None:
    run = copy_run(gentle, tmp_path / "copy")
    merged(run, "--base", "original", "--no-verify")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "What is a list?", "completion": "A sequence."}] * 2)
    commands: tuple[tuple[str | Path, ...], ...] = (
        ("generate", run, "--prompt", "What is a list?", "--compare", "--max-new-tokens", "4"),
        ("evaluate", run, "--dataset", rows),
    )
    for command in commands:
        assert "merge it again" not in stderr_of(*command)
    record = run / "merged" / "merge.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    content["adapters"][0]["sha256"] = "0" * 64
    record.write_text(json.dumps(content), encoding="utf-8")
    for command in commands:
        assert f"{run / 'merged'} was merged from another adapter" in stderr_of(*command)


def test_the_base_of_every_run_is_checked(gentle: Path, tmp_path: Path) -> None:
    run = copy_run(gentle, tmp_path / "copy")
    other = run.with_name("other")
    other.mkdir()
    for path in run.rglob("*"):
        if path.is_file() and "checkpoints" not in path.parts:
            place = other / path.relative_to(run)
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(path.read_bytes())
    record = json.loads((other / "run.json").read_text(encoding="utf-8"))

    def record_otherwise(**changes: Any) -> None:
        (other / "run.json").write_text(json.dumps({**record, **changes}), encoding="utf-8")

    def record_quantization(**values: Any) -> None:
        record_otherwise(settings={**record["settings"], "quantization": values})

    record_otherwise(base_model_digest="0" * 64)
    assert "is not the base that" in refused(run, other, "--output", tmp_path / "out")
    quantization = record["settings"]["quantization"]
    assert quantization["method"] == "nf4"
    for key, value in {"method": "none", "double_quant": False, "quant_storage": "bf16"}.items():
        record_quantization(**{**quantization, key: value})
        assert f"on bases that differ in quantization.{key} |" in refused(run, other, "--output", tmp_path / "out")
    record_quantization(**{**quantization, "method": "no_such"})
    assert f"the settings in {other / 'run.json'} can't be read: method" in refused(
        run, other, "--output", tmp_path / "out"
    )
    # Settings of other methods, those unknown to an older version, and those of a newer one change nothing.
    older = {key: value for key, value in quantization.items() if not key.startswith(("int8", "skip"))}
    record_quantization(**older, int8_threshold=3.5, int8_has_fp16_weight=True, of_a_newer_version=5)
    done = qlora_merge(run, other, "--output", tmp_path / "out", "--dry-run", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output


def test_shards_in_a_folder_are_written_to_one(gentle: Path, tmp_path: Path) -> None:
    run = copy_run(gentle, tmp_path / "copy")
    base = run.parent / "base"
    (base / "weights").mkdir()
    (base / "model.safetensors").rename(base / "weights" / "one.safetensors")
    names = [tensor["name"] for tensor in _tensors(base / "weights" / "one.safetensors")]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "weights/one.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    report = merged(run, "--base", "original", "--base-model", base)
    assert report["verification"]["passed"]
    assert (run / "merged" / "weights" / "one.safetensors").is_file()


def _tensors(file: Path) -> list[dict[str, Any]]:
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return [{"name": name} for name in header if name != "__metadata__"]
