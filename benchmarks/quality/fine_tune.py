"""Fine-tune a model with several settings and seeds, and compare the losses on held-out rows.

    python benchmarks/quality/fine_tune.py MODEL EXPERIMENT [--only VARIANT] [--seeds 3] [--steps N] [--rows N]

Each run is `qlora train` on the demo's rows, and differs from the others in its variant and its seed alone:
all of a seed see the same rows in the same order. Results are appended to `benchmarks/results/` one by one, and a run
that is there already, for whichever experiment, is not repeated. The table has the mean difference to the first
variant over the seeds, which are paired, with its standard error; a variant wins or loses beyond two of these.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, ROOT, append, now, read, results_file, revision, versions

ASSETS = ROOT / "qlora_cli" / "demo" / "assets"
RATES = ("1e-3", "3e-3")
Flags = tuple[str, ...]

EXPERIMENTS: Mapping[str, Mapping[str, Flags]] = {
    "base": {
        "nf4": (),
        "16 bit": ("--quant", "none"),
        "calibrated nf4": ("--calibrate",),
        "calibrated nf4 and adapter": ("--calibrate", "--lora-init", "calibrated"),
    },
    "init": {
        "default": (),
        **{name: ("--lora-init", name) for name in ("gaussian", "orthogonal", "loftq", "calibrated")},
    },
    "init on 16 bit": {"default": ("--quant", "none"), "pissa": ("--quant", "none", "--lora-init", "pissa")},
    "scale": {
        f"rank {rank}, alpha {alpha}, rate {rate}": (
            *("--rank", str(rank), "--alpha", str(alpha)),
            *("--learning-rate", rate),
        )
        for rank, alpha in ((16, 32), (16, 16), (64, 16), (64, 64), (64, 128))
        for rate in RATES
    },
    "clipping": {f"norm {norm}": ("--set", f"training.max_grad_norm={norm}") for norm in ("0.3", "1.0", "10.0")},
    "optimizer": {name: ("--optimizer", name) for name in ("adamw_torch_fused", "adamw_8bit")},
}


def run(model: str, flags: Flags, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train, and return the object that the command prints."""
    held_out = f"{ASSETS / 'held_out.jsonl'}#{arguments.rows}"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "qlora_cli", "train", "--model", model, "--output", f"{folder}/run", "--json"),
            *("--dataset", str(ASSETS / "train.jsonl"), "--eval-dataset", held_out, "--max-length", "256"),
            *("--max-steps", str(arguments.steps), "--micro-batch-size", "8", "--gradient-accumulation-steps", "1"),
            *(
                "--seed",
                str(seed),
                "--dtype",
                arguments.dtype,
                "--learning-rate",
                arguments.rate,
                "--general-text",
                "on",
            ),
            *flags,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        printed: dict[str, Any] = json.loads(done.stdout)
        return printed


def measured(model: str, experiment: str, arguments: argparse.Namespace, file: Path) -> dict[str, dict[int, float]]:
    """Return the losses on held-out rows by variant and seed, after measuring those that `file` lacks."""
    variants = {
        name: flags for name, flags in EXPERIMENTS[experiment].items() if not arguments.only or name in arguments.only
    }
    key = {
        "model": Path(model).resolve().name,
        **{name: getattr(arguments, name) for name in ("steps", "rows", "rate")},
    }
    if arguments.dtype != "fp32":
        key["dtype"] = arguments.dtype
    known = list(read([file])) if file.exists() else []
    losses: dict[str, dict[int, float]] = {name: {} for name in variants}
    for seed in range(arguments.seeds):
        for variant, flags in variants.items():
            case = {**key, "flags": list(flags), "seed": seed}
            same = (one for one in known if case.items() <= one.items() and one.get("dtype") == key.get("dtype"))
            record = next(same, None)
            if record is None:
                result = run(model, flags, arguments, seed)
                record = {"experiment": experiment, "variant": variant, **case}
                record |= {name: result[name] for name in ("eval_loss", "train_loss", "forgetting")}
                record |= {"time": now(), "revision": revision(), "versions": versions()}
                append(file, record)
            losses[variant][seed] = record["eval_loss"]
            print(f"{variant}, seed {seed}: {record['eval_loss']:.4f}", flush=True)
    return losses


def table(losses: Mapping[str, Mapping[int, float]]) -> str:
    """Return the mean loss of each variant, and how far it is from the first one's."""
    first = next(iter(losses.values()))
    lines = ["| variant | held-out loss | difference to the first |  |", "|---|---|---|---|"]
    for variant, by_seed in losses.items():
        differences = [loss - first[seed] for seed, loss in by_seed.items()]
        mean, error = statistics.mean(differences), _standard_error(differences)
        verdict = "" if by_seed is first or abs(mean) <= 2 * error else "better" if mean < 0 else "worse"
        shown = "" if by_seed is first else f"{mean:+.4f} ± {error:.4f}"
        lines.append(f"| {variant} | {statistics.mean(by_seed.values()):.4f} | {shown} | {verdict} |")
    return "\n".join(lines)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.inf


def main() -> None:
    """Run one experiment, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--only", action="append", help="a variant; may be given several times")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--rows", type=int, default=200, help="held-out rows that are evaluated")
    parser.add_argument("--rate", default="2e-3", help="learning rate, unless the variant has its own")
    parser.add_argument("--dtype", default="fp32", help="in which the base computes")
    parser.add_argument("--file", type=Path, default=results_file(RESULTS, "fine_tune"))
    arguments = parser.parse_args()
    print(table(measured(arguments.model, arguments.experiment, arguments, arguments.file)))


if __name__ == "__main__":
    main()
