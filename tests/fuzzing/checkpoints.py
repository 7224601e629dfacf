"""Run directories with checkpoints whose files are odd, or are not files: resumed from, and named as a model."""

import io
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from qlora_cli.adapters.reader import open_adapter
from qlora_cli.errors import QloraError
from qlora_cli.model_files.source import find_model
from qlora_cli.runs.checkpoints import CheckpointStore, seal
from qlora_cli.runs.directory import RunDirectory, clear_startup_files
from qlora_cli.settings.models import ModelSettings, OutputSettings
from qlora_cli.training.resuming.loop_state import LoopState, Progress, check_state, generator_states
from qlora_cli.training.resuming.resume import find_resume, output_problem
from qlora_cli.units import GIB
from tests.fuzzing.frame import Generator, Target, damage
from tests.fuzzing.json_values import as_bytes
from tests.support.models.tiny_models import tiny_model
from tests.support.runs.run_directories import a_record, lines_of, step_done

STEPS = (2, 4)
# The files of a checkpoint that are JSON.
JSON = ("checksums.json", "loop_state.json", "trainer_state.json", "adapter_config.json")
# What a killed process leaves, and where there may be more than a run ever writes.
MORE = ("checkpoints/.saving", "checkpoints/.deleting", ".adapter.dropped", "adapter")
PRECIOUS = "precious"


class _Huge:
    """An object that takes memory when it is unpickled."""

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return bytearray, (2**31 - 1,)


PICKLED: tuple[Any, ...] = (
    [],
    1,
    {"state": _Huge()},
    {"last_epoch": _Huge()},
    {"state": {}},
    torch.ones(2),
    os.system,
)


def _write_checkpoint(folder: Path, step: int) -> None:
    get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    progress = Progress(eval_losses={step: 1.5})
    LoopState(
        step=step,
        summed_loss=0.5,
        total_loss=3.0,
        reported_step=step,
        num_tokens=9,
        means={"entropy": [1.0]},
        never_used=[],
        progress=progress,
    ).write(folder)
    trainer = {"global_step": step, "max_steps": 5, "num_train_epochs": 1, "log_history": [{"loss": 1.5}]}
    (folder / "trainer_state.json").write_text(json.dumps(trainer))
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    torch.save(generator_states(), folder / "rng_state.pth")
    seal(folder)


def _write_run(run: RunDirectory, base: Path) -> None:
    run.create()
    record = a_record("interrupted", base_model={"base_model": str(base)}, base_model_path=str(base))
    run.run_file.write_text(json.dumps(record))
    run.metrics_file.write_text("".join(f"{line}\n" for line in lines_of(map(step_done, range(1, 5)))))
    for step in STEPS:
        _write_checkpoint(run.checkpoints / f"step-{step}", step)


def _put_no_file(path: Path, elsewhere: Path, chance: Generator) -> None:
    """Put something at `path` that is not a file, or somebody else's file, or an endless one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    kinds: tuple[Callable[[], None], ...] = (
        lambda: os.mkfifo(path),
        path.mkdir,
        lambda: (path / "a").mkdir(parents=True),
        lambda: path.symlink_to("nothing"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to(elsewhere),
        lambda: path.symlink_to(elsewhere / PRECIOUS),
        lambda: path.hardlink_to(elsewhere / PRECIOUS),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(".."),
        path.touch,
        lambda: _write_sparse(path),
    )
    kinds[chance.integers(len(kinds))]()


def _write_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2 * GIB)


def _spoil(run: RunDirectory, elsewhere: Path, chance: Generator) -> None:
    """Change one thing in a run directory."""
    folder = run.checkpoints / f"step-{chance.choice(STEPS)}"
    files = sorted(path for path in folder.iterdir() if path.is_file()) if _is_in(run, folder / "a file") else []
    draw = chance.random()
    if draw < 0.3 or not files:
        paths = [*files, folder, run.checkpoints, run.run_file, run.metrics_file, run.path / "run.lock"]
        paths += [run.path / name for name in MORE]
        path = paths[chance.integers(len(paths))]
        if _is_in(run, path):
            _put_no_file(path, elsewhere, chance)
    elif draw < 0.65:
        path = folder / JSON[chance.integers(len(JSON))]
        if path in files and (value := _json_in(path)):
            _replace_file(path, as_bytes(value, chance))
    elif draw < 0.8:
        content = io.BytesIO()
        torch.save(PICKLED[chance.integers(len(PICKLED))], content)
        _replace_file(folder / str(chance.choice(["optimizer.pt", "rng_state.pth"])), content.getvalue())
    else:
        path = files[chance.integers(len(files))]
        if 0 < path.stat().st_size < GIB:
            _replace_file(path, damage(path.read_bytes(), chance))


def _is_in(run: RunDirectory, path: Path) -> bool:
    """Return whether a path still leads into the run, despite links that an earlier change may have made."""
    parent = os.path.realpath(path.parent)
    return Path(parent).is_dir() and parent == str(run.path.resolve() / path.parent.relative_to(run.path))


def _replace_file(path: Path, content: bytes) -> None:
    """Write a new file, never through a link that an earlier change has put at `path`."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def _json_in(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size < GIB else None
    except ValueError:  # damaged in this round already
        return None


def _seal_again(run: RunDirectory) -> None:
    """Give the checkpoints checksums of their present content, as whoever damages one can."""
    for step in STEPS:
        folder = run.checkpoints / f"step-{step}"
        if (
            _is_in(run, folder / "a file")
            and (folder / "checksums.json").is_file()
            and not any(path.stat().st_size > GIB for path in folder.iterdir() if path.exists())
        ):
            (folder / "checksums.json").unlink()
            seal(folder)


def _use(run: RunDirectory) -> None:
    """Do the first steps of resuming, naming and merging a run. An error of ours is as good as a result."""
    output = OutputSettings(directory=run.path)
    with suppress(QloraError):
        if (problem := output_problem(output)) is not None:
            raise problem
        resume = find_resume(output)
        if resume is not None and resume.checkpoint is not None:
            check_state(resume.checkpoint)
        CheckpointStore(run.checkpoints, num_kept=1, needed_bytes=0, journal=run.metrics_file).clear_leftovers()
        run.remove_adapter(())
    for name in (run.path, *(run.checkpoints / f"step-{step}" for step in STEPS)):
        with suppress(QloraError):
            source = find_model(ModelSettings(name=str(name)))
            assert source.adapter is not None
            open_adapter(source.adapter, allow_pickle=False)
    clear_startup_files(run.path, (), ())


def _rounds(directory: Path) -> Callable[[Generator], None]:
    base, elsewhere, whole = directory / "base", directory / "elsewhere", RunDirectory(directory / "whole")
    tiny_model("llama").save_pretrained(base)
    elsewhere.mkdir()
    _write_run(whole, base)
    resume = find_resume(OutputSettings(directory=whole.path))
    assert resume is not None
    assert resume.step == max(STEPS)
    _use(whole)

    def play_round(chance: Generator) -> None:
        run = RunDirectory(directory / "run")
        shutil.rmtree(run.path, ignore_errors=True)
        shutil.copytree(whole.path, run.path)
        shutil.rmtree(elsewhere, ignore_errors=True)
        elsewhere.mkdir()
        (elsewhere / PRECIOUS).write_text(PRECIOUS)
        for _ in range(chance.integers(1, 4)):
            _spoil(run, elsewhere, chance)
        if chance.random() < 0.6:
            _seal_again(run)
        _use(run)
        assert [path.name for path in elsewhere.iterdir()] == [PRECIOUS]
        assert (elsewhere / PRECIOUS).read_text() == PRECIOUS

    return play_round


CHECKPOINT = Target(name="checkpoint", prepare=_rounds, num_rounds=400)
