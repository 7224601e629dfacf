"""Time how `qlora` reads, tokenizes and masks a file of conversations, side by side with TRL's own preparation.

    python benchmarks/data_vs_trl.py [--rows 100000] [--repeats 3]

Both programs run in turn on the same file, each in a process of its own with empty caches; the ratio is the median of
the pairs. Rows are conversations of one to three turns made from the bundled questions. The chat template has the
marks by which TRL finds the answers. It is an error if the programs do not produce the same tokens and labels.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.records import RESULTS, ROOT, append, cpu_hardware, now, results_file, revision, versions

ASSETS = ROOT / "qlora_cli" / "demo" / "assets"
PROGRAMS = ("qlora", "trl", "trl-2-processes")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_rows(path: Path, num_rows: int) -> None:
    """Write conversations of one to three turns, in which no message occurs twice."""
    chance = random.Random(0)  # noqa: S311 - a seeded choice, no secret
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            chosen = chance.sample(turns, chance.randint(1, 3))
            messages = [{"role": "system", "content": f"Answer question {number}."}]
            messages += [
                {**message, "content": f"{number}. {message['content']}"} for turn in chosen for message in turn
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def copy_model(path: Path) -> None:
    """Copy the bundled tokenizer, with a template in which both programs can find the answers."""
    shutil.copytree(ASSETS / "base", path)
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def measure(program: str, file: Path, model: Path, max_length: int) -> dict[str, Any]:
    """Run one program in a process of its own."""
    with tempfile.TemporaryDirectory() as caches:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("data_case.py")), program, file, model, str(max_length)],
            env={
                **os.environ,
                "HF_HOME": f"{caches}/hf",
                "QLORA_CACHE": f"{caches}/qlora",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "true",
            },
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{program} ended with {done.returncode}: {done.stderr[-1000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure, print, and append to a results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = results_file(arguments.output_dir, "data_vs_trl")
    seconds: dict[str, list[float]] = {program: [] for program in arguments.programs}
    with tempfile.TemporaryDirectory() as folder:
        file, model = Path(folder) / "rows.jsonl", Path(folder) / "model"
        write_rows(file, arguments.rows)
        copy_model(model)
        for _ in range(arguments.repeats):
            digests = set()
            for program in arguments.programs:
                figures = measure(program, file, model, arguments.max_length)
                digests.add(figures["digest"])
                seconds[program].append(figures["seconds"])
                print(f"{program:16} {figures['seconds']:7.1f} s", flush=True)
                append(
                    results,
                    {
                        "benchmark": "data_vs_trl",
                        "time": now(),
                        "revision": revision(),
                        "versions": versions(),
                        "host": cpu_hardware(),
                        "load_average": os.getloadavg()[0],
                        "program": program,
                        "file_bytes": file.stat().st_size,
                        "max_length": arguments.max_length,
                        **figures,
                    },
                )
            if len(digests) > 1:
                raise RuntimeError("the programs do not produce the same tokens and labels")
    for program in arguments.programs[1:]:
        pairs = [theirs / ours for ours, theirs in zip(seconds["qlora"], seconds[program], strict=True)]
        print(f"{program} / qlora: {statistics.median(pairs):.2f} x")


if __name__ == "__main__":
    main()
