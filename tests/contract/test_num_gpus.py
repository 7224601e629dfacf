"""`qlora train --num-gpus N` and torchrun start processes that report, end and exit as one. Python starts for real."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
import yaml

from qlora_cli.cli.app import app
from tests.conftest import RunQlora
from tests.contract.test_docs import flags_of
from tests.integration.training.test_ranks import distance
from tests.integration.training.test_signals import steps_of

SECONDS = 120.0
# Without it, torch tells a machine that joins later nowhere where the others meet.
REJOINING = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
SBATCH = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--signal"}  # as its manual has them
HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "more-gpus.md"


def arguments(model: Path, rows: Path, run: Path, *more: str) -> list[str]:
    small = ["--micro-batch-size", "1", "--gradient-accumulation-steps", "4", "--save-steps", "1000"]
    where = ["--model", str(model), "--dataset", str(rows), "--output", str(run), "--device", "cpu", "--dtype", "fp32"]
    return ["train", *where, *small, "--set", "lora.dropout=0", *more]


def start(command: Sequence[str], **variables: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_of(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Wait for a process and return what it wrote to stdout and stderr; after a while, end it."""
    try:
        return process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        print(process.communicate())
        raise


def start_qlora(*command: str) -> "subprocess.Popen[str]":
    return start([sys.executable, "-m", "qlora_cli", *command])


def ranks_below(launcher: int) -> dict[int, int]:
    """Return the processes of a run below its launcher, by rank."""
    found: dict[int, int] = {}
    for process in psutil.Process(launcher).children(recursive=True):
        if "RANK" in (environment := process.environ()):
            found[int(environment["RANK"])] = process.pid
    return found


def wait_for_step(process: "subprocess.Popen[str]", run: Path, step: int) -> None:
    until = time.monotonic() + SECONDS
    while len(steps_of(run)) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def record_of(run: Path) -> dict[str, Any]:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert isinstance(record, dict)
    return record


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "qlora_cli"]


@pytest.mark.slow
def test_a_signal_to_the_launcher_ends_all_and_torchrun_goes_on_and_restarts_what_lost_a_process(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = arguments(base_model, rows, run, "--max-steps", "30", "--schedule", "constant")
    process = start_qlora(*command, "--num-gpus", "2")
    wait_for_step(process, run, 2)
    ranks = ranks_below(process.pid)
    assert sorted(ranks) == [0, 1]
    process.send_signal(signal.SIGTERM)
    stdout, stderr = end_of(process)
    assert process.returncode == 128 + signal.SIGTERM
    assert not any(psutil.pid_exists(pid) for pid in ranks.values())
    assert stderr.count("SIGTERM: training stops after the step in progress") == 1
    assert stdout.startswith("Trained ")
    assert "the same command resumes there" in stderr
    assert "torch" not in stderr
    assert record_of(run)["status"] == "interrupted"
    stopped_at = len(steps_of(run))
    # torchrun is another way to start the same run, and starts it again if it loses a process.
    process = start([*torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "1"), *command])
    wait_for_step(process, run, stopped_at + 3)
    os.kill(ranks_below(process.pid)[1], signal.SIGKILL)
    _, stderr = end_of(process)
    assert process.returncode == 0, stderr
    record = record_of(run)
    result = record["result"]
    assert result["steps"] == len(steps_of(run)) == 30
    assert result["resumed_from_step"] >= stopped_at + 3
    assert record["origins"]["training.num_gpus"] == "torchrun"
    assert record["settings"]["training"]["num_gpus"] == record["plan"]["num_devices"] == 2
    assert [entry["step"] for entry in record["resumed"]] == [stopped_at, result["resumed_from_step"]]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_and_is_named(base_model: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_qlora(*arguments(base_model, rows, run, "--num-gpus", "2", "--max-steps", "200"))
    wait_for_step(process, run, 2)
    ranks = ranks_below(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    _, stderr = end_of(process)
    assert process.returncode == 1
    assert not any(psutil.pid_exists(pid) for pid in ranks.values())
    assert "error: process 1 was killed by SIGKILL" in stderr
    assert "another process of this run ended without a word" in stderr
    assert record_of(run)["status"] == "failed"
    assert len(list((run / "checkpoints").glob("step-*"))) == 1


@pytest.fixture
def machines() -> Iterator[list[list[str]]]:
    """Two machines, each as the words before a command that runs there: network namespaces, joined by a cable."""
    ip = shutil.which("ip")
    if ip is None or os.geteuid() != 0:
        pytest.skip("only root makes network namespaces")
    names, links = ([f"qlora-{side}-{os.getpid()}" for side in "ab"], [f"ql{side}{os.getpid()}" for side in "ab"])

    def run(*words: str) -> None:
        subprocess.run([ip, *words], check=True, capture_output=True)

    try:
        for name in names:
            run("netns", "add", name)
        run("link", "add", links[0], "netns", names[0], "type", "veth", "peer", links[1], "netns", names[1])
        for number, (name, link) in enumerate(zip(names, links, strict=True), 1):
            run("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            for one in ("lo", link):
                run("-n", name, "link", "set", one, "up")
        yield [[ip, "netns", "exec", name] for name in names]
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_machines_train_one_run_and_go_on_when_a_lost_one_is_back(
    run_qlora: RunQlora, base_model: Path, rows: Path, tmp_path: Path, machines: list[list[str]]
) -> None:
    run = tmp_path / "run"
    command = arguments(base_model, rows, run, "--max-steps", "12", "--set", "training.save_steps=2")
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "1", "--rdzv-endpoint", "10.77.0.1:29500"]
    meeting += ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1"]
    # Both have the name of this machine, which would say who is the first, and where it is.
    own = [["--local-addr", f"10.77.0.{number}", "--rdzv-conf", f"is_host={2 - number}"] for number in (1, 2)]
    launchers = [[*machine, *torchrun(*meeting, *words)] for machine, words in zip(machines, own, strict=True)]
    first, lost = (start([*launcher, *command], **REJOINING) for launcher in launchers)
    wait_for_step(first, run, 4)
    for process in (*psutil.Process(lost.pid).children(recursive=True), psutil.Process(lost.pid)):
        process.kill()
    lost.communicate()
    back = start([*launchers[1], *command], **REJOINING)
    (stdout, stderr), (silent, _) = end_of(first), end_of(back)
    assert [first.returncode, back.returncode] == [0, 0], stderr
    assert "another process of this run ended without a word" in stderr
    assert stdout.startswith("Trained ")
    assert silent == ""
    record = record_of(run)
    assert record["plan"]["num_devices"] == 2
    assert record["result"]["steps"] == len(steps_of(run)) == 12
    assert record["result"]["resumed_from_step"] >= 4
    alone = tmp_path / "alone"
    done = run_qlora(*[str(alone) if word == str(run) else word for word in command])
    assert done.code == 0, done.stderr
    assert distance(run, alone) < 1e-5


def test_too_few_gpus_are_refused_before_anything_starts(
    run_qlora: RunQlora, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [one for one in arguments(base_model, rows, run, "--num-gpus", "3") if one not in ("--device", "cpu")]
    done = run_qlora(*command, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.code == 2
    assert "--num-gpus: 3 processes need 3 GPUs, and no GPU is visible to PyTorch" in done.stderr
    assert not run.exists()


def test_a_run_of_several_processes_is_planned_by_one(
    run_qlora: RunQlora, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    done = run_qlora(*arguments(base_model, rows, tmp_path / "run", "--num-gpus", "2", "--dry-run", "--json"))
    assert done.code == 0
    assert done.json["num_devices"] == 2
    assert done.json["examples_per_step"] == 4


def test_more_processes_than_rows_of_a_step_are_refused(
    run_qlora: RunQlora, base_model: Path, rows: Path, tmp_path: Path
) -> None:
    done = run_qlora(*arguments(base_model, rows, tmp_path / "run", "--num-gpus", "5"))
    assert done.code == 2
    assert "--num-gpus: 5 processes would share the 4 rows of a step" in done.stderr


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE"])
def test_processes_that_torchrun_did_not_start_are_refused(
    run_qlora: RunQlora, base_model: Path, rows: Path, tmp_path: Path, variable: str
) -> None:
    done = run_qlora(*arguments(base_model, rows, tmp_path / "run"), env={variable: "2"})
    assert done.code == 2
    assert f"this is one of 2 processes ({variable} is 2)" in done.stderr
    assert f"unset {variable}" in done.stderr


def commands_of(page: str) -> list[list[str]]:
    """Return the arguments of each `qlora_cli train` in the blocks of a page, also in a list of YAML."""
    joined = page.replace("\\\n", " ")
    shell = re.findall(r"-m qlora_cli (train [^\n]+)", joined)
    lists = [json.loads(found) for found in re.findall(r"^ *args: (\[.+\])$", joined, re.MULTILINE)]
    return [*map(shlex.split, shell), *(found[found.index("train") :] for found in lists)]


def test_the_files_of_the_how_to_are_valid_and_give_settings_that_exist() -> None:
    page = HOW_TO.read_text(encoding="utf-8")
    sky, kubeflow = map(yaml.safe_load, re.findall(r"```yaml\n(.+?)```", page, re.DOTALL))
    assert {"resources", "num_nodes", "run"} <= sky.keys()
    assert kubeflow["kind"] == "TrainJob"
    assert kubeflow["spec"]["trainer"]["numProcPerNode"] == 8
    (slurm,) = re.findall(r"```bash\n(.+?)```", page, re.DOTALL)
    checked = subprocess.run(["/bin/bash", "-n"], input=slurm, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert all(f"{name}={value}" in page for name, value in REJOINING.items())
    options = [word for line in re.findall(r"^#SBATCH (.+)$", slurm, re.MULTILINE) for word in shlex.split(line)]
    assert {word.partition("=")[0] for word in options} == SBATCH
    assert re.fullmatch(r"TERM@\d+", dict(word.split("=") for word in options)["--signal"])
    commands = commands_of(page)
    assert len(commands) == 4
    known = flags_of(typer.main.get_command(app).commands["train"])  # type: ignore[attr-defined]
    assert {word for command in commands for word in command if word.startswith("--")} <= known
