"""The how-to for CI does what it says: every command on the page, in order, with no stdin at all."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.support.processes.forked_qlora import ForkedQlora
from tests.support.processes.forks import is_forkable
from tests.support.source.documented_code import blocks_of

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "how-to" / "ci.md"
ASSETS = ROOT / "qlora_cli" / "demo" / "assets"
NUM_ROWS = 60
LONGEST_SECONDS = 120


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    return [block.text for block in blocks_of(PAGE) if block.language == language]


@dataclass
class Job:
    """A directory where the blocks of the page run as in CI; records which ones have run."""

    directory: Path
    environment: dict[str, str]
    ran: list[str] = field(default_factory=list)

    def start(self, block: str, *, is_forked: bool = True) -> subprocess.Popen[str]:
        """Start a block with a closed stdin, as a workflow starts a step; the process is the block's own shell."""
        self.ran.append(block)
        commands = [self.path("forked"), self.path("bin")] if is_forked else [self.path("bin")]
        step = self.directory / "step.sh"
        step.write_text(block, encoding="utf-8")
        return subprocess.Popen(
            ["/bin/bash", "-c", 'exec bash --noprofile --norc -eo pipefail "$0" <&-', str(step)],
            cwd=self.directory,
            env={**self.environment, "PATH": ":".join([*map(str, commands), self.environment["PATH"]])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, block: str, *, code: int = 0, is_forked: bool = True) -> str:
        """Run a block to its end and return its stderr."""
        process = self.start(block, is_forked=is_forked)
        stdout, stderr = process.communicate(timeout=LONGEST_SECONDS)
        assert process.returncode == code, f"{block}{stdout}{stderr}"
        return stderr

    def path(self, name: str) -> Path:
        return self.directory / name


@pytest.fixture
def job(base_model: Path, tmp_path: Path) -> Job:
    """A checkout with data and settings, and the variables that the page sets."""
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "ci.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, arguments in (("qlora", "-m qlora_cli"), ("python", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n', encoding="utf-8")
        (commands / name).chmod(0o755)
    (tmp_path / "forked").mkdir()
    if is_forkable(os.environ):
        ForkedQlora().write(tmp_path / "forked" / "qlora")
    environment = {
        **os.environ,
        "MODEL": str(base_model),
        "DATA": "data.jsonl",
        "RUN": "17",
    }
    return Job(tmp_path, environment)


def interrupted(job: Job, train: str, metrics: Path) -> None:
    """Run `train` until it has made a step, then stop it as a cluster stops a job."""
    process = job.start(train)
    deadline = time.monotonic() + LONGEST_SECONDS
    while not (metrics.exists() and '"step_done"' in metrics.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == 143, stderr


def fits_and_trains(job: Job, steps: Sequence[str]) -> None:
    """Run the blocks that check whether it fits and trains; a GPU that is too small ends them with exit code 3."""
    fit, tight, moved, smoke = steps
    job.run(fit)
    job.run(tight)
    assert json.loads(job.path("memory.json").read_text())["fits"][0]["fits"] == "yes"
    small = fit.replace('"RTX 4090"', "0.01GiB")
    assert small != fit
    job.run(small, code=3)
    job.run(tight, code=1)
    assert "Write it: the same command" in job.run(moved, code=2)
    job.run(moved.replace("--check", "--write-lock"))
    job.run(moved)
    assert "the predicted peak moved by +" in job.run(f"{moved.rstrip()} --rank 64 --max-change 0.001\n", code=1)
    job.run(smoke, is_forked=False)  # as a workflow starts it; what follows need not wait for the imports again
    assert json.loads(job.path("runs/17-smoke/run.json").read_text())["result"]["steps"] == 2


def resumes(job: Job, train: str) -> None:
    """Run the same command until the run is done, and once again."""
    run = job.path("runs/17")
    interrupted(job, train, run / "metrics.jsonl")
    assert json.loads(job.path("result.json").read_text())["interrupted_by"] == "SIGTERM"
    assert list(run.glob("checkpoints/step-*"))
    assert "Resuming at step" in job.run(train)
    result = json.loads(job.path("result.json").read_text())
    assert (result["interrupted_by"], result["steps"], result["num_steps"]) == (None, 20, 20)
    before = (run / "metrics.jsonl").read_text()
    assert "it is done: nothing is left to train" in job.run(train)
    assert json.loads(job.path("result.json").read_text())["steps"] == 20
    assert (run / "metrics.jsonl").read_text() == before


def merged_is_what_was_trained(job: Job) -> None:
    """Check that the merged model answers as the quantized base with the adapter, in plain transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    result = json.loads(job.path("merge.json").read_text())
    assert (result["base"], result["verification"]["passed"]) == ("dequantized", True)
    assert result["output"] == "merged"
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = job.environment["MODEL"]
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=nf4, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(job.path("merged"), dtype=torch.float32)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        alone = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, job.path("runs/17/adapter"))(tokens).logits
        together = merged(tokens).logits
    assert torch.allclose(together, adapted, atol=0.1)
    assert not torch.allclose(together, alone, atol=0.5)


def compares(job: Job, compare: str, keep: str) -> None:
    """Check that a run is as good as itself, and that the job fails once the run is worse than the last good one."""
    from safetensors.torch import load_file, save_file

    job.run(compare)
    verdicts = [run["verdict"] for run in json.loads(job.path("comparison.json").read_text())["runs"]]
    assert verdicts == ["reference", "not_worse"]
    weights = job.path("runs/17/adapter/adapter_model.safetensors")
    unlearnt = {name: -value if "lora_B" in name else value for name, value in load_file(weights).items()}
    save_file(unlearnt, weights)
    assert "runs/17: worse than runs/good by more than 0.04 nats" in job.run(compare, code=1)
    job.run(keep)
    assert not job.path("runs/17").exists()
    assert job.path("runs/good/adapter").is_dir()


def test_every_command_of_the_page_does_what_it_says(job: Job) -> None:
    steps = blocks("bash")
    assert len(steps) == 8, "run what was added"
    fit, tight, moved, smoke, train, merge, compare, keep = steps
    fits_and_trains(job, (fit, tight, moved, smoke))
    resumes(job, train)
    job.run(merge)
    merged_is_what_was_trained(job)
    compares(job, compare, keep)
    assert [block for block in dict.fromkeys(job.ran) if block in steps] == steps


def test_the_workflow_runs_exactly_the_commands_of_the_page() -> None:
    _, text = blocks("yaml")
    workflow = yaml.safe_load(text)
    steps = workflow["jobs"]["fine-tune"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == blocks("bash")
    assert {"MODEL", "DATA", "RUN"} == set(workflow["env"])


def test_the_page_has_no_other_commands() -> None:
    languages = re.findall(r"^```(.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(languages) == {"bash", "yaml"}
