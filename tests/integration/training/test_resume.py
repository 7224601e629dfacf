"""A run that is killed and started again by the same command ends as if nothing had happened."""

import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import ModelError, OutputDirectoryError, QloraError, SettingsError
from qlora_cli.events import CheckpointSaved, Noted, StepDone, TrainingResumed
from qlora_cli.runs.checkpoints import CHECKSUMS_FILE, list_checkpoints, seal
from qlora_cli.runs.directory import RunDirectory, RunLock
from qlora_cli.runs.find_runs import read_run
from qlora_cli.runs.history import read_history
from qlora_cli.runs.report.run_page import write_report
from qlora_cli.runs.run_result import TrainResult
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.run_plan import settle_run
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, train_settings
from tests.integration.training.conftest import KillAt
from tests.support.processes.forks import cpu_seconds_of
from tests.support.processes.killed_runs import (
    EXACT,
    Copier,
    adapter_of,
    assert_same,
    metrics_of,
    place_killed,
    stopped_at,
)
from tests.support.processes.training_process import SignalAt, start_training

NUM_KILLS = 10


def kill_and_resume(
    settings: Resolved[TrainSettings], chance: random.Random, log: Path, most_kills: int
) -> tuple[int, int]:
    """Start a run again and again, killing it at random points until it is done or was killed `most_kills` times.

    Return the kills, and those inside a write. Each start gets some seconds of the CPU, so that it comes as far on a
    busy machine, or is killed at a random one of its writes to the files of a checkpoint.
    """
    checkpoints = settings.settings.output.directory / "checkpoints"
    kills = inside = 0
    while True:
        most_seconds, deadly_write = math.inf, None
        if kills < most_kills:
            if chance.random() < 0.5:
                deadly_write = chance.randint(1, 150)
            else:
                most_seconds = chance.uniform(0.3, 1.5)
        process = start_training(settings, log, deadly_write)
        while process.is_alive() and cpu_seconds_of(process) < most_seconds:
            time.sleep(0.01)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0, log.read_text()
            return kills, inside
        kills += 1
        inside += any(checkpoints.glob(".step-*.saving"))


def test_a_run_killed_at_any_time_ends_as_if_nothing_had_happened(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path
) -> None:
    chance = random.Random(0)  # noqa: S311 - no secret
    kills = inside = round_ = 0
    while kills < NUM_KILLS or inside < 1:
        run = tmp_path / f"killed-{round_}"
        more, more_inside = kill_and_resume(
            train_settings(base_model, rows, run, **EXACT),
            chance,
            tmp_path / f"log-{round_}",
            most_kills=max(NUM_KILLS - kills, 1),
        )
        kills, inside, round_ = kills + more, inside + more_inside, round_ + 1
        assert_same(run, whole)
        # No temporary files are left.
        names = {path.name for path in run.iterdir()}
        assert names - {"run.lock"} == {"adapter", "checkpoints", "metrics.jsonl", "report.html", "run.json"}
        assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-12", "step-13"]
    print(f"{kills} kills, {inside} of them inside of a checkpoint's write, in {round_} runs")


def notes_of(recorder: Recorder) -> list[str]:
    return [event.message for event in recorder.events if isinstance(event, Noted)]


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "lion_8bit"])
def test_8_bit_states_are_restored(base_model: Path, rows: Path, tmp_path: Path, optimizer: str) -> None:
    changed = {**EXACT, "training__optimizer": optimizer, "training__max_steps": 6, "training__save_steps": 3}
    train(train_settings(base_model, rows, tmp_path / "whole", **changed), Copier(tmp_path / "whole", 3))
    place_killed(tmp_path / "whole", 3, tmp_path / "run")
    train(train_settings(base_model, rows, tmp_path / "run", **changed), Recorder())
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "changed",
    [
        {"data__packing": True, "data__max_length": 96},
        {"training__sampling": "group_by_length"},
        {"data__streaming": True, "data__eval_split": None, "training__eval_steps": None},
        {"quantization__method": "none", "lora__init_lora_weights": "pissa"},
        {"lora__use_dora": True, "training__loraplus_lr_ratio": 4},
        {"model__new_tokens": "<a>,<b>"},
    ],
    ids=["packed", "grouped", "streamed", "pissa", "dora-loraplus", "new-tokens"],
)
def test_every_way_to_feed_and_to_adapt_resumes_exactly(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object]
) -> None:
    monkeypatch.setattr("qlora_cli.data.feeding.stream.WINDOW_ROWS", 4)  # the run is resumed in the second one
    settings = {**EXACT, "training__max_steps": 5, "training__save_steps": 3, **changed}
    train(train_settings(base_model, rows, tmp_path / "whole", **settings), Copier(tmp_path / "whole", 3))
    place_killed(tmp_path / "whole", 3, tmp_path / "run")
    train(train_settings(base_model, rows, tmp_path / "run", **settings), Recorder())
    assert_same(tmp_path / "run", tmp_path / "whole")


def assert_speed_is_shown(run: Path, result: TrainResult) -> None:
    assert read_run(run).summary.tokens_per_second == pytest.approx(result.tokens_per_second)


def test_the_speed_shown_later_is_that_of_the_result(base_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = train_settings(base_model, rows, tmp_path / "run", **{**EXACT, "training__max_steps": 5})
    assert_speed_is_shown(tmp_path / "run", train(settings, Recorder()))


def test_the_step_it_resumes_from_is_noted_and_its_speed_is_shown_later(
    base_model: Path, rows: Path, tmp_path: Path, kill_at: KillAt
) -> None:
    settings = train_settings(base_model, rows, tmp_path / "run", **EXACT)
    kill_at(5)
    recorder = Recorder()
    result = train(settings, recorder)
    (resumed,) = [event for event in recorder.events if isinstance(event, TrainingResumed)]
    assert (resumed.step, resumed.num_steps, resumed.checkpoint.name) == (5, 13, "step-5")
    assert min(event.step for event in recorder.events if isinstance(event, StepDone)) == 6
    assert result.resumed_from_step == 5
    (entry,) = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["resumed"]
    assert entry["step"] == 5
    assert_speed_is_shown(tmp_path / "run", result)


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path, kill_at: KillAt
) -> None:
    settings = train_settings(base_model, rows, tmp_path / "run", **EXACT)
    kill_at(11)
    weights = tmp_path / "run" / "checkpoints" / "step-11" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    recorder = Recorder()
    assert train(settings, recorder).resumed_from_step == 10
    assert any("step-11" in note and "adapter_model.safetensors" in note for note in notes_of(recorder))
    assert_same(tmp_path / "run", whole)


def test_no_valid_checkpoint_is_an_error_not_a_restart(
    base_model: Path, rows: Path, tmp_path: Path, kill_at: KillAt
) -> None:
    settings = train_settings(base_model, rows, tmp_path / "run", **EXACT)
    kill_at(1)
    (tmp_path / "run" / "checkpoints" / "step-1" / "optimizer.pt").unlink()
    with pytest.raises(OutputDirectoryError, match=r"optimizer\.pt is missing"):
        train(settings, Recorder())


def test_settings_that_may_change_are_listed_and_take_effect(
    base_model: Path, rows: Path, tmp_path: Path, kill_at: KillAt
) -> None:
    kill_at(4)
    recorder = Recorder()
    changed = {**EXACT, "training__save_steps": 4, "training__eval_steps": 6, "training__logging_steps": 1}
    train(train_settings(base_model, rows, tmp_path / "run", **changed), recorder)
    for name, before, now in (("save_steps", 1, 4), ("eval_steps", 4, 6), ("logging_steps", 2, 1)):
        assert f"changed since: training.{name}: {before} before, {now} now" in notes_of(recorder)
    saved = [event.step for event in recorder.events if isinstance(event, CheckpointSaved)]
    assert {8, 12, 13} <= set(saved) <= {6, 8, 12, 13}  # 6 is among them if its evaluation was the best
    assert [event.step for event in recorder.events if isinstance(event, StepDone)] == list(range(5, 14))


def test_the_micro_batch_may_change_if_the_batch_does_not(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path, kill_at: KillAt
) -> None:
    kill_at(11)
    changed = {**EXACT, "training__micro_batch_size": 2, "training__gradient_accumulation_steps": 1}
    train(train_settings(base_model, rows, tmp_path / "run", **changed), Recorder())
    steps = [row[0] for row in metrics_of(tmp_path / "run") if len(row) > 3]
    assert steps == [row[0] for row in metrics_of(whole) if len(row) > 3]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora__rank": 8}, "lora.rank: is 8, and was 16 until step 4"),
        ({"training__learning_rate": 1e-4}, "training.learning_rate: is 0.0001, and was 0.001"),
        ({"training__seed": 1}, "training.seed: is 1, and was 0"),
        ({"quantization__double_quant": False}, "quantization.double_quant: is false, and was true"),
        ({"training__gradient_accumulation_steps": 4}, "is 4 rows a step, and was 2"),
        ({"training__max_steps": 20}, "make 20 steps, and made 13"),
        ({"quantization__method": "fp4"}, "quantization.method: is fp4, and was nf4"),
        ({"training__optimizer": "adamw_8bit"}, "training.optimizer"),
    ],
)
def test_settings_that_would_falsify_the_result_are_refused(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    changed: dict[str, object],
    message: str,
    kill_at: KillAt,
) -> None:
    kill_at(4)
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(SettingsError) as caught:
        train(train_settings(base_model, rows, tmp_path / "run", **{**EXACT, **changed}), Recorder())
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert "--output" in str(caught.value.problems[0].hint)
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_other_rows_are_refused_but_not_the_same_rows_under_another_name(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path, kill_at: KillAt
) -> None:
    kill_at(11)
    moved = rows.rename(tmp_path / "moved.jsonl")
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(moved.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SettingsError, match="the rows are not those that were trained until step 11"):
        train(train_settings(base_model, shorter, tmp_path / "run", **EXACT), Recorder())
    train(train_settings(base_model, moved, tmp_path / "run", **EXACT), Recorder())
    assert_same(tmp_path / "run", whole)


def test_a_constant_schedule_may_be_trained_longer(base_model: Path, rows: Path, tmp_path: Path) -> None:
    constant = {**EXACT, "training__schedule": "constant", "training__max_steps": 4, "training__save_steps": 2}
    train(train_settings(base_model, rows, tmp_path / "whole", **constant), Recorder())
    train(train_settings(base_model, rows, tmp_path / "run", **{**constant, "training__max_steps": 2}), Recorder())
    result = train(train_settings(base_model, rows, tmp_path / "run", **constant), Recorder())
    assert (result.resumed_from_step, result.steps) == (2, 4)
    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "whole")


def test_a_run_that_is_done_is_not_trained_again(base_model: Path, rows: Path, whole: Path) -> None:
    written = (whole / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    recorder = Recorder()
    result = train(train_settings(base_model, rows, whole, **EXACT), recorder)
    assert result.steps == result.num_steps == 13
    assert any("nothing is left to train" in note for note in notes_of(recorder))
    assert (whole / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("has_page", [False, True], ids=["none", "an earlier one"])
def test_a_run_that_was_killed_before_its_last_page_gets_it_when_it_is_started_again(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path, has_page: bool
) -> None:
    run = RunDirectory(shutil.copytree(whole, tmp_path / "run"))
    page = write_report(run.path).read_text(encoding="utf-8")
    run.report_file.unlink()
    if has_page:
        run.report_file.write_text("of the first steps", encoding="utf-8")
        os.utime(run.report_file, ns=(0, run.run_file.stat().st_mtime_ns - 1))
    train(train_settings(base_model, rows, run.path, **EXACT), Recorder())
    assert run.report_file.read_text(encoding="utf-8") == page


def test_a_directory_with_a_run_is_refused_if_resume_is_never(
    base_model: Path, rows: Path, tmp_path: Path, kill_at: KillAt
) -> None:
    kill_at(2)
    with pytest.raises(SettingsError, match="already holds a run"):
        train(train_settings(base_model, rows, tmp_path / "run", **EXACT, output__resume="never"), Recorder())


def test_a_run_without_a_checkpoint_restarts(base_model: Path, rows: Path, tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for path in ("adapter", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / path)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step_done", "st')  # the process was killed in the middle of a line
    recorder = Recorder()
    train(train_settings(base_model, rows, tmp_path / "run", **EXACT), recorder)
    assert any("restarts at the first step" in note for note in notes_of(recorder))
    assert_same(tmp_path / "run", whole)


def test_a_checkpoint_with_nan_is_named_before_a_weight_is_read(
    base_model: Path, rows: Path, tmp_path: Path, kill_at: KillAt
) -> None:
    settings = train_settings(base_model, rows, tmp_path / "run", **EXACT)
    kill_at(2)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    state = load_file(checkpoint / "adapter_model.safetensors")
    key = next(key for key in state if "lora_B" in key)
    state[key][0, 0] = float("nan")
    save_file(state, checkpoint / "adapter_model.safetensors", {"format": "pt"})
    (checkpoint / CHECKSUMS_FILE).unlink()
    seal(checkpoint)
    with pytest.raises(ModelError, match=f"step-2 is broken: {key} in adapter_model.safetensors holds NaN"):
        settle_run(settings, Recorder())


def test_two_processes_do_not_train_into_one_directory(
    base_model: Path, rows: Path, tmp_path: Path, kill_at: KillAt
) -> None:
    settings = train_settings(base_model, rows, tmp_path / "run", **EXACT)
    kill_at(2)
    with RunLock(RunDirectory(tmp_path / "run")), pytest.raises(QloraError, match="another process is training into"):
        train(settings, Recorder())


def test_checkpoints_hold_no_pickle_of_classes(whole: Path) -> None:
    checkpoint = whole / "checkpoints" / "step-13"
    assert not list(checkpoint.glob("*.bin"))
    for path in checkpoint.glob("*.pt*"):
        assert torch.load(path, weights_only=path.name != "rng_state.pth")
    assert all(
        tensor.dtype == torch.float32 for tensor in load_file(checkpoint / "adapter_model.safetensors").values()
    )


def test_damaged_checkpoints_are_deleted_before_valid_ones(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path, kill_at: KillAt
) -> None:
    one = {**EXACT, "output__max_checkpoints": 1}
    kill_at(6)
    (tmp_path / "run" / "checkpoints" / "step-6" / "optimizer.pt").unlink()
    settings = train_settings(base_model, rows, tmp_path / "run", **one)
    stopped_at(settings, 6)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-4", "step-6"]
    assert train(settings, Recorder()).resumed_from_step == 6
    assert_same(tmp_path / "run", whole)


EARLY: dict[str, object] = {
    **EXACT,
    "training__learning_rate": 0.05,
    "training__schedule": "constant",
    "training__eval_steps": 1,
    "training__max_steps": 30,
    "training__early_stopping_patience": 2,
}


def test_early_stopping_ends_at_the_same_step(base_model: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "whole"
    whole = train(train_settings(base_model, rows, run, **EARLY), Copier(run, *range(1, 31)))
    assert whole.stopped_early
    place_killed(run, whole.steps, tmp_path / "killed")
    train(
        train_settings(base_model, rows, tmp_path / "signalled", **EARLY),
        SignalAt(StepDone, whole.steps - whole.steps % 2),
    )
    for name in ("killed", "signalled"):
        result = train(train_settings(base_model, rows, tmp_path / name, **EARLY), Recorder())
        assert (result.steps, result.stopped_early) == (whole.steps, True)
        assert adapter_of(tmp_path / name) == adapter_of(run)


def test_another_base_and_another_dtype_are_refused(base_model: Path, rows: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_model, base)
    settings = train_settings(base, rows, tmp_path / "run", **EXACT)
    stopped_at(settings, 3)
    with pytest.raises(ModelError, match=r"model\.dtype resolves to bf16 here, and was fp32 until step 3"):
        train(train_settings(base, rows, tmp_path / "run", **EXACT, model__dtype="bf16"), Recorder())
    weights = load_file(base / "model.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="the weights of the base are not those that were trained on until step 3"):
        train(settings, Recorder())


def test_other_settings_may_be_tried_without_a_checkpoint(
    base_model: Path, rows: Path, tmp_path: Path, kill_at: KillAt
) -> None:
    kill_at(1)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-1")
    other = {**EXACT, "lora__rank": 4, "training__max_steps": 2}
    result = train(train_settings(base_model, rows, tmp_path / "run", **other), Recorder())
    assert result.steps == 2


def test_a_record_that_can_not_be_read_is_reported(
    base_model: Path, rows: Path, tmp_path: Path, kill_at: KillAt
) -> None:
    settings = train_settings(base_model, rows, tmp_path / "run", **EXACT)
    kill_at(2)
    (tmp_path / "run" / "run.json").write_text('{"status": "run')
    with pytest.raises(SettingsError, match=r"run\.json is damaged"):
        train(settings, Recorder())


def test_a_run_of_an_older_version_resumes(
    base_model: Path, rows: Path, tmp_path: Path, whole: Path, kill_at: KillAt
) -> None:
    settings = train_settings(base_model, rows, tmp_path / "run", **EXACT)
    kill_at(10)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    for key in ("plan", "resumed", "base_model_digest", "versions"):
        del record[key]
    del record["settings"]["training"]["on_nan"]
    path.write_text(json.dumps(record), encoding="utf-8")
    assert train(settings, Recorder()).resumed_from_step == 10
    assert_same(tmp_path / "run", whole)


def test_missing_samples_at_the_end_are_generated_on_resume(base_model: Path, rows: Path, tmp_path: Path) -> None:
    sampled = {
        **EXACT,
        "data__eval_split": None,
        "training__eval_steps": None,
        "training__max_steps": 3,
        "training__sample_prompts": ["What is a list?"],
        "training__sample_tokens": 4,
    }
    settings = train_settings(base_model, rows, tmp_path / "run", **sampled)
    stopped_at(settings, 3)
    train(settings, Recorder())
    assert [sample.step for sample in read_history(tmp_path / "run").samples] == [0, 3]
