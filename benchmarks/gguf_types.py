"""What each type of a GGUF costs: its size, and the divergence of its predictions from those of the merged model.

    python -m benchmarks.gguf_types RUN --model "…" --library "…" --output benchmarks/results/gguf-DATE.jsonl

merges the run once for each type, with a llama.cpp that quantizes and runs: the package llama-cpp-python. `--library`
says in words which build that is, since the package's version does not.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.records import append, cpu_hardware, now, revision, versions

TYPES = ("bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m")
FIGURES = ("num_tokens", "mean_kl", "max_kl", "top_token_agreement", "reference_perplexity", "perplexity")


def measure(run: Path, outtype: str) -> dict[str, Any]:
    """Return the bytes of the GGUF of `run` in a type, and its divergence from the merged model."""
    with TemporaryDirectory() as name:
        options = ("--format", "gguf", "--gguf-type", outtype, "--base", "dequantized", "--device", "cpu", "--json")
        command = [sys.executable, "-m", "qlora_cli", "merge", str(run), "--output", f"{name}/model", *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        (file,) = Path(name).glob("model/*.gguf")
        report = json.loads(done.stdout)
        divergence = report["requantized"]["gguf"]["divergence"]
        figures = {key: divergence[key] for key in FIGURES}
        rounding = report["verification"]["divergence"]["mean_kl"]
        return {"type": outtype, "file_bytes": file.stat().st_size, "kl_of_rounding_the_merge": rounding, **figures}


def main() -> None:
    """Measure each type, and append a line to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--library", required=True, help="which build of llama.cpp, in words")
    parser.add_argument("--model", required=True, help="which base the run was trained on, in words")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    context = {
        "hardware": cpu_hardware(),
        "versions": versions(),
        "revision": revision(),
        "library": given.library,
        "model": given.model,
    }
    for outtype in TYPES:
        line = {"benchmark": "gguf_types", "time": now(), **measure(given.run, outtype), **context}
        print(json.dumps({key: value for key, value in line.items() if key not in context}))
        append(given.output, line)


if __name__ == "__main__":
    main()
