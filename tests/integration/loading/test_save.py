"""`qlora load --save`: a quantized checkpoint, whole or not at all; plain transformers loads it to the same logits."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.synthetic import Shape, num_parameters, write_model
from qlora_cli import __version__
from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.adapters.writer import save_adapter
from qlora_cli.cli.app import app
from qlora_cli.errors import DiskSpaceError
from qlora_cli.loading import save as saving
from qlora_cli.loading.save import save_quantized
from qlora_cli.settings.models import LoraSettings
from tests.conftest import Recorder, RunQlora
from tests.integration.training.test_training import base_digest
from tests.support.models.loading import IDS, load, logits, save_model
from tests.support.processes.hanging_save import start_hanging_save
from tests.support.processes.plain_python import PlainPython

BY_PLAIN_TRANSFORMERS = """
import sys, warnings, torch
warnings.simplefilter("error")
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids, logits = torch.load(sys.argv[1]), {}
for path in sys.argv[3:]:
    loaded, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map={"": "cpu"}, output_loading_info=True
    )
    assert not any(info.values()), info
    for module in loaded.modules():
        module.support_avx512bf16_for_cpu = False  # it would repack the weights and compute with other scales
    with torch.no_grad():
        logits[path] = loaded(input_ids=ids).logits
assert not any(name.startswith("qlora_cli") for name in sys.modules)
torch.save(logits, sys.argv[2])
"""

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_logits(plain_python: PlainPython, checkpoints: Sequence[Path], directory: Path) -> list[torch.Tensor]:
    """Return the logits, in fp32, that a process of its own computes without this package."""
    ids, output = directory / "ids.pt", directory / "logits.pt"
    torch.save(IDS, ids)
    done = plain_python(BY_PLAIN_TRANSFORMERS, ids, output, *checkpoints, directory=directory)
    assert done.returncode == 0, done.stderr
    logits_of: dict[str, torch.Tensor] = torch.load(output)
    return [logits_of[str(checkpoint)] for checkpoint in checkpoints]


def written_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


# ---- what is written


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it is stored."""

    family: str
    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    shard_size: str = saving.SHARD_SIZE


CASES = {
    "nf4, untied": Case(family="llama", method="nf4", changes={"tie_word_embeddings": False}),
    "in shards": Case(family="llama", method="nf4", changes={"tie_word_embeddings": False}, shard_size="100KB"),
    "nf4, tied": Case(family="llama", method="nf4", changes={"tie_word_embeddings": True}),
    "fp4, tied, with biases": Case(
        family="qwen2", method="fp4", changes={"tie_word_embeddings": True, "vocab_size": 3136}
    ),
    "int8, untied": Case(family="llama", method="int8", changes={"tie_word_embeddings": False}),
    "nf4, Conv1D": Case(family="gpt2", method="nf4"),
    "int8, Conv1D": Case(family="gpt2", method="int8"),
}


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A model that the command saved, its report, and the logits that plain transformers computes."""

    source: Path
    directory: Path
    report: dict[str, Any]
    logits: torch.Tensor


@pytest.fixture(scope="module")
def all_saved(plain_python: PlainPython, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Every case, saved by the command line; one process loads them all."""
    root = tmp_path_factory.mktemp("saved")
    sources, targets, reports = [], [], []
    for name, case in CASES.items():
        source, target = save_model(root / f"{name} source", case.family, **case.changes), root / name
        flags = ("--device", "cpu", "--dtype", "fp32", "--quant", case.method, "--save", str(target), "--json")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saving, "SHARD_SIZE", case.shard_size)
            done = CliRunner().invoke(app, ["load", str(source), *flags])
        assert done.exit_code == 0, done.output
        sources.append(source)
        targets.append(target)
        reports.append(json.loads(done.stdout))
    cases = zip(CASES, sources, targets, reports, plain_logits(plain_python, targets, root), strict=True)
    return {
        name: Saved(source=source, directory=target, report=report, logits=computed)
        for name, source, target, report, computed in cases
    }


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_computes_identical_logits_with_the_saved_model(
    all_saved: dict[str, Saved], name: str
) -> None:
    saved = all_saved[name]
    loaded = load(saved.source, quantization__method=CASES[name].method)
    assert torch.equal(saved.logits, logits(loaded.model))
    again = load(saved.directory)
    assert base_digest(again.model) == base_digest(loaded.model)
    assert again.inventory == loaded.inventory
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()


@pytest.mark.parametrize("name", CASES)
def test_the_report_says_where_and_how_many_bytes(all_saved: dict[str, Saved], name: str) -> None:
    saved = all_saved[name]
    assert saved.report["saved"] == str(saved.directory)
    assert saved.report["saved_bytes"] == written_bytes(saved.directory)


def test_it_is_written_in_shards(all_saved: dict[str, Saved]) -> None:
    num_files = {name: len(list(saved.directory.glob("*.safetensors"))) for name, saved in all_saved.items()}
    assert num_files.pop("in shards") > 2
    assert set(num_files.values()) == {1}


def test_it_is_a_quarter_of_the_16_bit_model_if_the_embedding_does_not_dominate(
    run_qlora: RunQlora, tmp_path: Path
) -> None:
    """4.127 bits a quantized parameter make 3.88 times the maximum; a thirtieth of this model is embedding."""
    shape = Shape(
        hidden_size=1024,
        num_layers=8,
        intermediate_size=4096,
        num_heads=16,
        num_kv_heads=16,
        vocab_size=4096,
        tied=True,
    )
    write_model(tmp_path / "source", shape)
    done = run_qlora("load", tmp_path / "source", "--dtype", "bf16", "--save", tmp_path / "saved", "--json")
    assert done.code == 0, done.stderr
    weights, quantized = (
        sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("source", "saved")
    )
    assert weights == pytest.approx(2 * num_parameters(shape), rel=1e-3)
    print(f"\n{weights / quantized:.2f} times smaller")
    assert 3.5 < weights / quantized < 3.88


def test_a_note_with_source_and_settings_is_written_next_to_the_model(
    run_qlora: RunQlora, base_model: Path, tmp_path: Path
) -> None:
    flags = ("--device", "cpu", "--quant", "fp4", "--no-double-quant", "--dtype", "fp32")
    done = run_qlora("load", base_model, *flags, "--save", tmp_path / "saved")
    assert done.code == 0, done.stderr
    note = json.loads((tmp_path / "saved" / "qlora.json").read_text(encoding="utf-8"))
    assert note["source"] == str(base_model)
    assert note["commit"] is None  # a directory has none
    assert note["written_by"] == f"qlora {__version__}"
    assert note["quantization"]["method"] == "fp4"
    assert note["quantization"]["double_quant"] is False
    assert note["dtype"] == "fp32"
    assert note["versions"] == {name: version(name) for name in ("bitsandbytes", "torch", "transformers")}
    assert note["kept_in_16_bit"] == sorted(load(base_model).layout.unquantized)
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }


def test_the_commit_of_a_model_from_the_hub_is_noted(base_model: Path, tmp_path: Path) -> None:
    loaded = load(base_model)
    commit = "0123456789abcdef0123456789abcdef01234567"
    from_hub = dataclasses.replace(loaded.source, commit=commit, revision="main")
    save_quantized(dataclasses.replace(loaded, source=from_hub), tmp_path / "saved", Recorder())
    note = json.loads((tmp_path / "saved" / "qlora.json").read_text(encoding="utf-8"))
    assert (note["commit"], note["revision"]) == (commit, "main")


def test_all_saved_files_have_the_same_permissions(base_model: Path, tmp_path: Path) -> None:
    save_quantized(load(base_model), tmp_path / "saved", Recorder())
    assert len({file.stat().st_mode for file in (tmp_path / "saved").iterdir()}) == 1


# ---- whole or not at all


def test_a_save_that_is_killed_leaves_nothing_that_looks_complete(
    run_qlora: RunQlora, base_model: Path, tmp_path: Path
) -> None:
    """The process is killed between two files: after the weights, before the tokenizer."""
    target = tmp_path / "saved"
    marker = tmp_path / "reached"
    process = start_hanging_save(["load", str(base_model), "--device", "cpu", "--save", str(target)], marker)
    deadline = time.monotonic() + 120
    while not marker.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marker.exists(), "it did not begin to write"
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not target.exists()
    aside = Path(marker.read_text(encoding="utf-8"))
    assert list(aside.glob("*.safetensors")), "the weights were not written yet"
    assert aside.parent.name.startswith(".")

    # The next save takes its place and removes what was left.
    done = run_qlora("load", base_model, "--device", "cpu", "--dtype", "fp32", "--save", target)
    assert done.code == 0, done.stderr
    assert not aside.parent.exists()
    assert torch.equal(logits(load(target).model), logits(load(base_model).model))


def test_a_failure_while_it_writes_leaves_nothing(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no more")

    monkeypatch.setattr(saving, "_note", fail)
    with pytest.raises(OSError, match="no more"):
        save_quantized(load(base_model), tmp_path / "saved", Recorder())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["run.json", "anything"])
def test_a_directory_with_files_is_refused_before_the_model_is_read(
    run_qlora: RunQlora, base_model: Path, tmp_path: Path, content: str
) -> None:
    target = tmp_path / "saved"
    target.mkdir()
    (target / content).write_text("mine", encoding="utf-8")
    done = run_qlora("load", base_model, "--save", target)
    assert done.code == 2
    assert "--save" in done.stderr
    assert "Finding" not in done.stderr
    assert [(path.name, path.read_text(encoding="utf-8")) for path in target.iterdir()] == [(content, "mine")]


def test_an_empty_directory_is_filled(run_qlora: RunQlora, base_model: Path, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    done = run_qlora("load", base_model, "--device", "cpu", "--save", tmp_path / "saved")
    assert done.code == 0, done.stderr
    assert (tmp_path / "saved" / "model.safetensors").exists()


def test_the_current_directory_is_filled(run_qlora: RunQlora, base_model: Path, tmp_path: Path) -> None:
    done = run_qlora("load", base_model, "--device", "cpu", "--save", ".", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert (tmp_path / "model.safetensors").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_link_to_an_empty_directory_stays_one(base_model: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    num_bytes = save_quantized(load(base_model), link, Recorder())
    assert link.is_symlink()
    assert num_bytes == written_bytes(target) > 0
    assert base_digest(load(link).model) == base_digest(load(base_model).model)


def test_a_full_disk_is_reported_before_anything_is_written(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(base_model)
    needed = loaded.inventory.total_bytes + saving.OTHER_FILES_BYTES
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(DiskSpaceError) as caught:
        save_quantized(loaded, tmp_path / "saved", Recorder())
    assert caught.value.exit_code == 2
    assert "--save" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    save_quantized(loaded, tmp_path / "saved", Recorder())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, if it can be mounted."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    if mount is None or unmount is None or os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield directory
    subprocess.run([unmount, str(directory)], check=True)


def test_a_small_disk_is_reported_before_the_model_is_loaded(
    run_qlora: RunQlora, base_model: Path, small_disk: Path
) -> None:
    done = run_qlora("load", base_model, "--device", "cpu", "--save", small_disk / "saved")
    assert done.code == 2, done.stderr
    assert "but only 1.00 MiB are free" in " ".join(done.stderr.split())
    assert "Loading" not in done.stderr
    assert list(small_disk.iterdir()) == []


# ---- what is refused


@pytest.mark.parametrize(
    "flags",
    [("--quant", "none"), ("--quant", "int8", "--set", "quantization.int8_has_fp16_weight=true")],
    ids=["none", "int8_has_fp16_weight"],
)
def test_an_unquantized_model_is_refused(
    run_qlora: RunQlora, base_model: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    done = run_qlora("load", base_model, "--device", "cpu", *flags, "--save", tmp_path / "saved")
    assert done.code == 2
    assert "nothing is quantized" in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_refused(run_qlora: RunQlora, base_model: Path, tmp_path: Path) -> None:
    adapted, _ = attach_adapter(load(base_model).base, LoraSettings())
    save_adapter(adapted, tmp_path / "adapter")
    done = run_qlora("load", tmp_path / "adapter", "--device", "cpu", "--save", tmp_path / "saved")
    assert done.code == 2
    assert "is an adapter" in " ".join(done.stderr.split())
    assert not (tmp_path / "saved").exists()


def test_nothing_is_saved_without_save(run_qlora: RunQlora, base_model: Path) -> None:
    done = run_qlora("load", base_model, "--device", "cpu", "--json")
    assert done.json["saved"] is None
    assert done.json["saved_bytes"] is None
