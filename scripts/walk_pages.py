#!/usr/bin/env python3
"""Run the commands of README, tutorial and how-tos as a reader does: page by page, in order, in an empty folder.

The reader has no GPU, no network and no large model. So models of the hub are replaced by the bundled one, data by its
data, runs end after a few steps, and what can't be run that way is skipped, for a reason that is printed.

    scripts/walk_pages.py                          # all pages
    scripts/walk_pages.py docs/how-to/merge.md     # some of them
    scripts/walk_pages.py --keep FOLDER            # keeps what the pages wrote
"""

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.source.documented_code import Block, blocks_of, statements  # noqa: E402

ASSETS = ROOT / "qlora_cli" / "demo" / "assets"
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("tutorial/*.md")),
    *sorted((ROOT / "docs").glob("how-to/*.md")),
]
LONGEST_SECONDS = 600
NUM_POSITIONS = 32768  # of models, which the bundled one has 512 of
NUM_ROWS = 200  # of each data set
NUM_STEPS = 4  # of each run that a page trains
ALWAYS = ("base", "train.jsonl")  # what settings files name, and variables
VARIABLES = {"MODEL": "base", "DATA": "train.jsonl", "RUN": "17"}  # which docs/how-to/ci.md expects

# What is not run, by a pattern of its text, and why.
SKIPPED: Mapping[str, str] = {
    r"^(source|pip install|make) ": "sets up an environment, which .ci/run does",
    r"^(cat \S+ \| )?(docker|rsync|git|hf|vllm|llama-server|ollama|tensorboard|python -m sglang)\b": "another program",
    r"--llama-cpp|--gguf-type [iq]": "another program",
    r"--format gguf": "a download from PyPI",
    r"qlora compare \./run \./other-run|qlora compare runs/answers runs/dpo": "a second run on the same pairs",
    r"--memory-budget \d+GiB": "a model that is larger than the bundled one",
    r"\b(torchrun|srun)\b|qlora train .*--num-gpus|^export TORCH_ELASTIC|^HEAD=": "several GPUs",
    r"--push-to-hub|HF_TOKEN": "an account on the hub",
    r"HF_HOME=": "folders of another machine",
    r"--tasks": "lm-eval and its data sets",
    r"--report-to tensorboard": "an optional package",
    r"use_liger_kernel": "kernels for GPUs",
    r"--optimizer paged_|--config llama-7b\.yaml": "a GPU",
}
# What stands for a model or data set of the hub, and what keeps a run short.
REPLACED: Mapping[str, str] = {
    r"Qwen/Qwen3-30B-A3B": "experts",
    r"\b(meta-llama|Qwen)/[\w.-]+": "base",
    r"HuggingFaceH4/no_robots": "./my-set",
    r"owner/name@v1\.0:config:": "./my-set::",
    r"owner/name": "./my-set",
    r"step-400": "step-20",
    r"\.jsonl#500": f".jsonl#{NUM_ROWS}",
    r"(qlora (?:train|inspect-data) --preset \S+)": r"\1 --model base",
    r"(qlora train )(?!.*(--max-steps|--dry-run))": rf"\1--max-steps {NUM_STEPS} ",
    r"(qlora tune )(?!.*--dry-run)": rf"\1--trial-steps {NUM_STEPS} ",
}
# The exit code that a page announces, where it is not 0.
EXIT_CODES: Mapping[str, int] = {
    r"--quant nf5": 2,
    r"# to refuse what is tight": 1,
}


@dataclass
class Given:
    """Makes what a reader of a page has: models, data, runs and files that the page names but does not write."""

    folder: Path

    def put(self, name: str, reader: Path) -> None:
        """Make what `name` stands for in the folder of a reader."""
        make = next(make for pattern, make in MAKERS.items() if re.fullmatch(name_of(pattern), name))
        (reader / name).parent.mkdir(parents=True, exist_ok=True)
        make(self, reader / name)

    def model(self, path: Path) -> None:
        """Link to the bundled model, with as many positions as those that it stands for."""
        if not (base := self.folder / "base").exists():
            shutil.copytree(ASSETS / "base", base)
            config = json.loads((base / "config.json").read_text(encoding="utf-8"))
            config["max_position_embeddings"] = NUM_POSITIONS
            (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
        path.symlink_to(base)

    def experts(self, path: Path) -> None:
        from tests.support.models.experts import save_moe  # torch: only for the page that needs it

        save_moe(path, "qwen3_moe")

    def rows(self, path: Path) -> None:
        """Write rows of the bundled data, not those of other files in the same folder."""
        first = NUM_ROWS * len([*path.parent.glob("*.jsonl*")])
        lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()[first : first + NUM_ROWS]
        assert lines, f"no rows are left for {path}"
        rows = [json.loads(line) | {"user_id": number % 50} for number, line in enumerate(lines)]
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)

    def pairs(self, path: Path) -> None:
        """Write the questions of the bundled rows, each with its own answer as chosen and another as rejected."""
        lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
        turns = [json.loads(line)["messages"] for line in lines]
        rows = [
            {"prompt": own[:-1], "chosen": own[-1:], "rejected": other[-1:]}
            for own, other in zip(turns, [turns[-1], *turns], strict=False)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def splits(self, path: Path) -> None:
        path.mkdir()
        for split in ("train", "validation", "test"):
            self.rows(path / f"{split}.jsonl")

    def clone(self, path: Path) -> None:
        """Write a clone of a hub data set with a configuration of the name that the page uses."""
        self.splits(path)
        configs = "configs:\n- config_name: german\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        (path / "README.md").write_text(f"---\n{configs}---\n", encoding="utf-8")

    def data_folder(self, path: Path) -> None:
        path.mkdir()
        self.rows(path / "rows.jsonl.gz")

    def run(self, path: Path) -> None:
        """Copy a run of 40 steps that learned something; it is trained when the first page asks for it."""
        if not (trained := self.folder / "run").exists():
            rows = self.folder / "rows.jsonl"
            self.rows(rows)
            size = "--max-length 256 --micro-batch-size 16 --gradient-accumulation-steps 1 --learning-rate 2e-3"
            steps = "--max-steps 40 --save-steps 20 --eval-split 20"
            done = run(
                f"qlora train --model {ASSETS}/base --dataset {rows} --output {trained} {size} {steps}", self.folder
            )
            assert done.returncode == 0, done.stdout
        shutil.copytree(trained, path, dirs_exist_ok=True)

    def configs(self, path: Path) -> None:
        """Copy the settings files of the repository, with the bundled model in place of those on the hub."""
        shutil.copytree(ROOT / "configs", path)
        for file in path.rglob("*.yaml"):
            text = re.sub(r"(?m)^(  name: )(?!qlora_cli/)[\w.-]+/[\w.-]+", r"\1base", file.read_text(encoding="utf-8"))
            file.write_text(text, encoding="utf-8")

    def assets(self, path: Path) -> None:
        path.symlink_to(ASSETS)

    def question(self, path: Path) -> None:
        path.write_text("What does os.getcwd() do?\n", encoding="utf-8")

    def text(self, path: Path) -> None:
        shutil.copy(ASSETS / "LICENSE-PSF.txt", path)

    def template(self, path: Path) -> None:
        shutil.copy(ASSETS / "base" / "chat_template.jinja", path)

    def axolotl(self, path: Path) -> None:
        data = "datasets:\n- path: train.jsonl\n  type: chat_template\n"
        path.write_text(f"base_model: base\nload_in_4bit: true\nadapter: qlora\nlora_r: 8\n{data}", encoding="utf-8")

    def lock(self, path: Path) -> None:
        """Write the file as the page says in words."""
        command = 'qlora inspect-memory "$MODEL" --config ci.yaml --gpu "RTX 4090" --write-lock'
        done = run(f"{command} {path.name}", path.parent)
        assert done.returncode == 0, done.stdout


# What is given by that name; one that needs another comes after it.
MAKERS: Mapping[str, Callable[[Given, Path], None]] = {
    r"base|my-model|merged|Llama-3\.1-8B|Llama-3\.1-8B-Instruct|models/Qwen2\.5-7B-Instruct": Given.model,
    r"experts": Given.experts,
    r"pairs\.jsonl": Given.pairs,
    r"[\w-]+\.jsonl": Given.rows,
    r"data(?=/\*)": Given.data_folder,
    r"my-set": Given.splits,
    r"clone": Given.clone,
    r"runs/(llama-8b/rank-16|llama-8b/rank-64|llama-8b|llama|demo|style|facts|first-try)": Given.run,
    r"configs": Given.configs,
    r"qlora_cli/demo/assets": Given.assets,
    r"questions?\.txt": Given.question,
    r"my-text\.txt": Given.text,
    r"template\.jinja": Given.template,
    r"theirs\.yaml": Given.axolotl,
    r"memory\.lock": Given.lock,
}


@dataclass
class Step:
    """A command of a page: as written, as it is run, and what it has to end with."""

    line: int
    written: str
    command: str
    reason: str | None = None  # why it is skipped
    code: int = 0
    output: str | None = None  # where the page shows all of it


def main() -> int:
    """Walk the requested pages; return 1 if a command of one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES, help="by default README, tutorial and how-tos")
    parser.add_argument("--keep", type=Path, help="a folder for what the pages write, which is kept")
    asked = parser.parse_args()
    begin, counts = time.monotonic(), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        given = Given(Path(scratch))
        for page in asked.pages:
            reader = (asked.keep or given.folder / "pages") / page.stem
            reader.mkdir(parents=True)
            counts += walk(page, reader, given)
    ends = ", ".join(f"{counts[end]} {end}" for end in ("ran", "skipped", "failed"))
    print(f"{ends}, in {time.monotonic() - begin:.0f} s")
    return 1 if counts["failed"] else 0


def walk(page: Path, reader: Path, given: Given) -> Counter[str]:
    """Run the commands of a page in the folder of its reader, and print what became of each; return the counts."""
    blocks = blocks_of(page)
    steps = [step for block in blocks for step in steps_of(block)]
    for name, text in files_of(blocks):
        (reader / name).write_text(text, encoding="utf-8")
    for name in names_given([step.command for step in steps if step.reason is None]):
        given.put(name, reader)
    counts = Counter[str]()
    print(f"{page}", flush=True)
    for step in steps:
        end, detail = walk_step(step, reader)
        counts[end] += 1
        print(f"  {end:7} line {step.line}: {step.written.splitlines()[0]}{detail}", flush=True)
    return counts


def walk_step(step: Step, reader: Path) -> tuple[str, str]:
    """Run a command; return what became of it, and the reason or the output."""
    if step.reason is not None:
        return "skipped", f" ({step.reason})"
    begin = time.monotonic()
    done = run(step.command, reader)
    if done.returncode == step.code and step.output in (None, done.stdout):
        return "ran", f" ({time.monotonic() - begin:.0f} s)"
    return "failed", f"\n    {step.command.strip()}\n    exit code {done.returncode}, not {step.code}\n{done.stdout}"


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of bash with an empty stdin; its stdout has both streams."""
    return subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, **VARIABLES},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LONGEST_SECONDS,
        check=False,
    )


def steps_of(block: Block) -> Iterator[Step]:
    """Yield the commands of a block: those of a shell, of a shown session, and Python as one."""
    if block.language in ("console", "bash"):
        for statement in statements(block.text):
            yield step_of(block.line + block.text[: block.text.index(statement)].count("\n"), statement)
    elif block.language == "":
        for number, line in enumerate(block.text.splitlines()):
            if re.match(r"(qlora|make|pip|hf|touch|torchrun) ", line):
                yield step_of(block.line + number, line)
    elif block.language == "text" and block.text.startswith("$ "):
        command, _, output = block.text.partition("\n")
        yield step_of(block.line, command.removeprefix("$ "), output)
    elif block.language == "python":
        yield step_of(block.line, f"python - <<'END'\n{block.text}END\n")


def step_of(line: int, written: str, output: str | None = None) -> Step:
    """Return how a command is run here, or why it isn't."""
    reason = next((reason for pattern, reason in SKIPPED.items() if re.search(pattern, written)), None)
    code = next((code for pattern, code in EXIT_CODES.items() if re.search(pattern, written)), 0)
    command = written
    for pattern, replacement in REPLACED.items():
        command = re.sub(pattern, replacement, command)
    return Step(line, written, command, reason, code, output)


def files_of(blocks: list[Block]) -> Iterator[tuple[str, str]]:
    """Yield the settings files that a page shows, whose first line names them."""
    for block in blocks:
        if block.language == "yaml" and (named := re.match(r"# ([\w.-]+\.yaml)\n", block.text)):
            yield named[1], block.text


def names_given(commands: list[str]) -> list[str]:
    """Return what the commands name of the things that a reader has, less what they write themselves."""
    text = "\n".join([*commands, *ALWAYS])
    written = {re.sub(r"^\./", "", name) for name in re.findall(r"--(?:output|save) (\S+)", text)}
    names = [
        dict.fromkeys(found[0] for found in re.finditer(rf"(?<![\w-])(?<!\w/)(?:{pattern})(?![\w-])", text))
        for pattern in MAKERS
    ]
    return [name for found in names for name in found if name not in written]


def name_of(pattern: str) -> str:
    """Return what an entry of `MAKERS` says of the name itself, without what follows it on a page."""
    return pattern.partition("(?=")[0]


if __name__ == "__main__":
    sys.exit(main())
