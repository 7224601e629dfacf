"""Faults of a merge are reported and cost nothing: no base, no existing output, no half-written model."""

import gc
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qlora_cli.cli.progress.reporters
from qlora_cli.events import Event, PhaseStarted, Reporter
from qlora_cli.loading.save import save_quantized
from qlora_cli.runs.checkpoints import list_checkpoints, step_of
from tests.conftest import Recorder
from tests.support.models.loading import load, save_model
from tests.support.processes.merge_process import start_merge
from tests.support.runs.merge_command import (
    UNCOMPARED,
    adapter_alone,
    copy_run,
    merged,
    qlora_merge,
    refused,
    trained_run,
)

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS, ADAPTER, INDEX = "model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"
SOON_SECONDS = 60


@pytest.fixture(scope="module")
def run(shallow_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tests merge but never change."""
    return trained_run(tmp_path_factory.mktemp("merge"), shallow_base)


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, with its base, that may be damaged."""
    return copy_run(run, tmp_path / "own")


@pytest.fixture
def other(own: Path) -> Path:
    """The adapter of the copy alone, as other tools write one: without a run around it."""
    return adapter_alone(own)


def state_of(directory: Path) -> dict[str, bytes]:
    """Return all files below a directory."""
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def change(file: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors of a file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    how(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shard(base: Path) -> list[Path]:
    """Write a base as several files, and return them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    (base / WEIGHTS).unlink()
    model.save_pretrained(base, max_shard_size="2MB")
    return sorted(base.glob("model-*.safetensors"))


# ---- the base


def test_a_damaged_or_missing_shard_is_named(other: Path) -> None:
    _, second, *_ = shard(other.parent / "base")
    content = second.read_bytes()
    second.unlink()
    assert f"lacks {second.name}" in refused(other, "--output", other.parent / "out")
    second.write_bytes(content[:-10])
    message = refused(other, "--output", other.parent / "out")
    assert f"{second.name} is damaged: it is truncated" in message
    assert not (other.parent / "out").exists()


@pytest.mark.parametrize("place", ["../model.safetensors", "/model.safetensors", "C:\\model.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(other: Path, place: str) -> None:
    shard(other.parent / "base")
    index = other.parent / "base" / INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = place
    index.write_text(json.dumps(content))
    assert "which is no file of that directory" in refused(other, "--output", other.parent / "out")


def test_a_base_that_has_a_tensor_twice_is_refused(other: Path) -> None:
    first, second, *_ = shard(other.parent / "base")
    name, tensor = next(iter(load_file(first).items()))
    change(second, lambda tensors: tensors.update({name: tensor}))
    assert f"holds the tensor {name} twice" in refused(other, "--output", other.parent / "out")


def test_a_tensor_that_no_rule_covers_is_an_error(other: Path) -> None:
    change(other.parent / "base" / WEIGHTS, lambda tensors: tensors.update({"model.extra.weight": torch.ones(4)}))
    message = refused(other, "--output", other.parent / "out")
    assert "holds model.extra.weight (in model.safetensors), which its config.json does not describe" in message


def test_the_base_of_a_run_must_be_the_one_that_it_was_trained_on(own: Path) -> None:
    change(own.parent / "base" / WEIGHTS, lambda tensors: tensors["model.norm.weight"].add_(1))
    before = state_of(own)
    assert "is not the base that" in refused(own)
    assert state_of(own) == before


def test_another_base_may_be_named_at_the_users_own_risk(own: Path) -> None:
    base = own.parent / "base"
    moved = base.rename(base.with_name("moved"))
    message = refused(own)
    assert f"is {base}, which does not exist" in message
    assert merged(own, "--base-model", moved, *UNCOMPARED)["base_model"] == str(moved)
    shutil.rmtree(own / "merged")
    change(moved / WEIGHTS, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert "is not the base that" in "\n".join(merged(own, "--base-model", moved, *UNCOMPARED)["notes"])


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", "weights that don't fit the base"), ("gpt_neox", "can't be attached to its base")],
)
def test_a_base_of_other_shapes_or_names_is_refused(other: Path, tmp_path: Path, family: str, expected: str) -> None:
    base = save_model(tmp_path / family, family, num_hidden_layers=1)
    assert expected in refused(other, "--base-model", base, "--output", tmp_path / "out")


def test_a_base_of_other_widths_is_refused_by_its_shapes(other: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path / "wide", intermediate_size=256)
    message = refused(other, "--base-model", base, "--output", tmp_path / "out")
    assert "and the base needs" in message


def test_a_base_available_only_quantized_has_no_original(other: Path, tmp_path: Path) -> None:
    save_quantized(load(other.parent / "base"), tmp_path / "packed", Recorder())
    output = ("--output", tmp_path / "out")
    message = refused(other, "--base-model", tmp_path / "packed", "--base", "original", *output)
    assert "is only available quantized" in message
    report = merged(other, "--base-model", tmp_path / "packed", *output)
    assert report["base"] == "dequantized"


def test_a_base_is_never_written_to(run: Path, tmp_path: Path) -> None:
    base = run.parent / "base"
    before = state_of(base), base.stat().st_mtime_ns
    for path in [*base.iterdir(), base]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        merged(run, "--output", tmp_path / "out")
    finally:
        for path in [base, *base.iterdir()]:
            path.chmod(path.stat().st_mode | 0o200)
    assert (state_of(base), base.stat().st_mtime_ns) == before


# ---- the adapter


def test_an_adapter_that_is_damaged_or_holds_nan_is_refused(own: Path) -> None:
    file = own / "adapter" / ADAPTER
    content = file.read_bytes()
    change(file, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    assert "holds NaN or infinite values" in refused(own)
    file.write_bytes(content[:-100])
    assert "it is truncated" in refused(own)
    assert not (own / "merged").exists()


def test_a_run_that_has_not_ended_is_merged_from_its_checkpoint(own: Path) -> None:
    shutil.rmtree(own / "adapter")
    record = json.loads((own / "run.json").read_text())
    (own / "run.json").write_text(json.dumps({**record, "status": "failed"}))
    checkpoint = list_checkpoints(own / "checkpoints")[-1]
    for name in (own, checkpoint):
        report = merged(name, "--output", own.parent / "out", "--base", "original")
        assert report["num_merged_tensors"] == 14
        assert report["verification"]["num_rows"] > 0  # of the run's data
        (adapter,) = report["adapters"]
        assert (adapter["path"], adapter["step"], adapter["run_is_done"]) == (
            str(checkpoint),
            step_of(checkpoint),
            False,
        )
        assert "of a run that has not ended" in (own.parent / "out" / "README.md").read_text()
        shutil.rmtree(own.parent / "out")
    shutil.rmtree(own / "checkpoints")
    assert "has no weights yet" in refused(own)


def test_a_model_is_not_an_adapter(own: Path) -> None:
    message = refused(own.parent / "base", "--output", own.parent / "out")
    assert "is a model, not an adapter" in message


def test_adapters_of_different_bases_are_refused(run: Path, own: Path) -> None:
    assert f"{own} belongs to the base" in refused(run, own, "--output", own.parent / "out")


def test_an_overflow_of_fp16_is_an_error_and_leaves_nothing(other: Path) -> None:
    change(other / ADAPTER, lambda tensors: [tensor.mul_(1e5) for tensor in tensors.values()])
    message = refused(other, "--output", other.parent / "out", "--dtype", "fp16", "--no-verify")
    assert "overflows fp16" in message
    assert "--dtype bf16" in message
    assert not list(other.parent.glob("*out*"))


# ---- the output


def test_an_output_that_holds_something_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    before = state_of(tmp_path)
    for name, expected in (
        ("out", "contains other files (thesis.txt)"),
        ("file", "is a file"),
        ("link", "a broken link"),
    ):
        assert expected in refused(run, "--output", tmp_path / name)
    assert "file is a file" in refused(run, "--output", tmp_path / "file" / "below")
    assert state_of(tmp_path) == before


def test_an_empty_output_is_filled_also_through_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    inode = (tmp_path / "out").stat().st_ino
    merged(run, "--output", tmp_path / "link", *UNCOMPARED)
    assert (tmp_path / "out" / "config.json").is_file()
    assert (tmp_path / "out").stat().st_ino == inode
    assert not list((tmp_path / "out").glob(".*"))


def test_a_model_that_fails_verification_is_kept_under_a_name_that_says_so(own: Path) -> None:
    done = qlora_merge(own, "--max-divergence", "0", "--json")
    assert done.exit_code == 1
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "MergeError"
    assert "more than 0" in error["message"]
    failed = own / "merged-failed-verification"
    assert str(failed) in error["hint"]
    assert not (own / "merged").exists()
    assert json.loads((failed / "merge.json").read_text())["verification"]["passed"] is False
    assert "**failed**" in (failed / "README.md").read_text()
    again = qlora_merge(own, "--max-divergence", "0", "--base", "original")
    assert again.exit_code == 1
    assert (own / "merged-failed-verification-2" / WEIGHTS).is_file()
    (own.parent / "empty").mkdir()
    third = qlora_merge(own, "--max-divergence", "0", "--base", "original", "--output", own.parent / "empty")
    assert third.exit_code == 1
    assert list((own.parent / "empty").iterdir()) == []  # so that the same command can be given again
    assert (own.parent / "empty-failed-verification" / WEIGHTS).is_file()


def test_nan_is_not_a_small_divergence(other: Path) -> None:
    change(other / ADAPTER, lambda tensors: [one.fill_(1e30) for key, one in tensors.items() if "lora_B" in key])
    done = qlora_merge(other, "--output", other.parent / "out", "--base", "original")
    assert done.exit_code == 1
    assert "computes NaN" in done.stderr
    assert not (other.parent / "out").exists()


FAULTY: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "a row of the embedding": ("model.embed_tokens.weight", lambda tensor: tensor[-1]),
    "a norm": ("model.norm.weight", lambda tensor: tensor[3:4]),
    "a layer that is merged": ("model.layers.0.mlp.up_proj.weight", lambda tensor: tensor[0]),
}


@pytest.mark.parametrize("kind", FAULTY)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("flags", ["", "--no-verify", "--dtype fp32 --no-verify", "--base dequantized"])
def test_nan_or_infinity_in_a_base_is_reported_with_its_tensor_and_file(
    other: Path, kind: str, value: float, flags: str
) -> None:
    name, part = FAULTY[kind]
    change(other.parent / "base" / WEIGHTS, lambda tensors: part(tensors[name]).fill_(value))
    message = refused(other, *flags.split(), "--output", other.parent / "out")
    assert f"the base holds NaN or infinite values in {name} (in {WEIGHTS})" in message
    assert not list(other.parent.glob("out*"))


# ---- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if os.geteuid() != 0 or mount is None or umount is None:
        pytest.skip("only root may mount a small disk")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(disk)], check=False).returncode != 0:
        pytest.skip("no small disk can be mounted here")
    try:
        yield disk
    finally:
        gc.collect()  # files that are mapped into memory hold a disk
        subprocess.run([umount, str(disk)], check=True)


class Filler(Recorder):
    """Fills a disk but for `leave_bytes` when the merge begins to write, after it has checked the free space."""

    def __init__(self, disk: Path, leave_bytes: int) -> None:
        super().__init__()
        self._disk, self._leave_bytes = disk, leave_bytes

    def report(self, event: Event) -> None:
        super().report(event)
        if isinstance(event, PhaseStarted) and event.title.startswith("Merging into"):
            with (self._disk / "filler").open("wb") as file:
                file.write(bytes(shutil.disk_usage(self._disk).free - self._leave_bytes))


def report_to(patch: pytest.MonkeyPatch, reporter: Reporter) -> None:
    """Let the command report to `reporter`."""

    @contextmanager
    def reporting(*_: object) -> Iterator[Reporter]:
        yield reporter

    patch.setattr(qlora_cli.cli.progress.reporters, "reporting", reporting)


# While weights are written, by us, and the tokenizer, by a library that raises an error of its own.
@pytest.mark.parametrize("is_left_for_weights", [False, True])
def test_a_disk_that_fills_up_is_reported_and_nothing_is_left(
    run: Path, small_disk: Path, is_left_for_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (run.parent / "base" / WEIGHTS).stat().st_size
    with monkeypatch.context() as patch:
        report_to(patch, Filler(small_disk, size + 43_000 if is_left_for_weights else 1 << 20))
        done = qlora_merge(run, "--output", small_disk / "out", *UNCOMPARED)
    assert done.exit_code == 1
    assert f"the disk of {small_disk / 'out'} is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    (small_disk / "filler").unlink()
    merged(run, "--output", small_disk / "out", *UNCOMPARED)


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(run: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(100 << 20))
    message = refused(run, "--output", small_disk / "out")
    assert "would be written to" in message
    assert "--output" in message
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_run_on_a_read_only_disk_is_merged_to_another_place(run: Path, small_disk: Path, tmp_path: Path) -> None:
    read_only_run = copy_run(run, small_disk / "own")
    subprocess.run([str(shutil.which("mount")), "-o", "remount,ro", str(small_disk)], check=True)
    assert f"{read_only_run} can't be written to" in refused(read_only_run)
    assert merged(read_only_run, "--output", tmp_path / "out")["verification"]["passed"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "can't be written to" in refused(run, "--output", tmp_path / "closed" / "out")


def test_a_file_put_into_the_output_meanwhile_is_not_replaced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Recorder):
        def report(self, event: Event) -> None:
            if isinstance(event, PhaseStarted) and event.title.startswith("Merging into"):
                (tmp_path / "out").mkdir()
                (tmp_path / "out" / "thesis.txt").write_text("years")

    report_to(monkeypatch, Other())
    assert "contains other files (thesis.txt)" in refused(run, "--output", tmp_path / "out", *UNCOMPARED)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/thesis.txt"]


# ---- killed, terminated, interrupted


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of plain PEFT whose base takes a while to be merged: 280 MB in three files."""
    directory = tmp_path_factory.mktemp("large")
    base = save_model(
        directory / "base",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    (base / WEIGHTS).unlink()
    model.save_pretrained(base, max_shard_size="100MB")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(directory / "adapter")
    return directory / "adapter"


def wait_until_writing(process: BaseProcess, output: Path, log: Path) -> None:
    """Wait until a part of the merged model is on the disk."""
    deadline = time.monotonic() + SOON_SECONDS
    while not [*output.parent.glob(f".{output.name}.*.saving/whole/*"), *output.glob(".saving/whole/*")]:
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(("output_exists", "num_rounds"), [(False, 6), (True, 3)])
def test_a_merge_killed_at_any_time_leaves_nothing_that_looks_complete(
    large: Path, tmp_path: Path, output_exists: bool, num_rounds: int
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    if output_exists:
        output.mkdir()
    command = (large, "--output", output, "--no-verify")
    num_killed = 0
    for round_number in range(num_rounds):
        process = start_merge(*command, log=log)
        wait_until_writing(process, output, log)
        time.sleep(0.03 * round_number**2)
        process.kill()
        process.join()
        if (output / "config.json").exists():  # too late by little: it is whole, whether or not the process has ended
            assert len(list(output.glob("*.safetensors"))) == 3
            assert not list(tmp_path.rglob("*.saving*"))
            shutil.rmtree(output)
            continue
        assert process.exitcode != 0
        num_killed += 1
        assert all(".saving" in str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    assert num_killed > num_rounds / 2
    process = start_merge(*command, log=log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]
    assert not list(output.glob(".*"))
    merged(large, "--output", tmp_path / "whole", "--no-verify")
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(names) == 3
    for name in names:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
@pytest.mark.parametrize("output_exists", [False, True])
def test_a_signal_ends_a_merge_with_its_code_and_leaves_nothing(
    large: Path, tmp_path: Path, number: signal.Signals, code: int, output_exists: bool
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    if output_exists:
        output.mkdir()
    process = start_merge(large, "--output", output, "--no-verify", "--json", log=log)
    wait_until_writing(process, output, log)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    text = log.read_text()
    assert process.exitcode == code, text
    assert json.loads(text[text.index("{") :])["error"]["exit_code"] == code
    assert "Traceback" not in text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["log"] + (["out"] if output_exists else [])
