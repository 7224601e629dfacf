"""Examples of each command, without `qlora` and its name: in its help, and in the reference."""

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "inspect-data": (
        "--dataset train.jsonl --model ./my-model",
        "--preset qwen3-8b-24gb --dataset train.jsonl --html page.html",
    ),
    "inspect-memory": (
        'llama-3.1-8b --gpu "RTX 4090" --max-length 4096',
        "--preset qwen3-8b-24gb --gpu 24GB --solve max-length --solve rank",
        "./base --sweep max-length=512..32768 micro-batch-size=1..8 --plot memory.png",
    ),
    "load": ("meta-llama/Llama-3.1-8B", "./my-model --save ./my-model-nf4 --error"),
    "presets": ("", "llama-3.1-8b-24gb > llama.yaml"),
    "train": (
        "--model ./my-model --dataset train.jsonl --output runs/first",
        "--preset llama-3.1-8b-24gb --dataset train.jsonl --eval-split 2% --output runs/llama --dry-run",
    ),
    "tune": (
        "--model ./my-model --dataset train.jsonl --eval-split 5% --output runs/tune",
        "--preset qwen3-8b-24gb --dataset train.jsonl --eval-split 5% --output runs/tune --dry-run",
    ),
    "merge": (
        "runs/llama-8b",
        "runs/llama-8b --output llama-8b-merged --base original --format hf --format nf4",
        "runs/first runs/second --weight 0.7 --weight 0.3 --output both --dry-run",
    ),
    "generate": ('runs/llama-8b --prompt "What is a list?" --compare',),
    "chat": ("runs/llama-8b --temperature 0.7",),
    "evaluate": ("runs/llama-8b", "runs/llama-8b --dataset questions.jsonl --tasks hellaswag --limit 200"),
    "compare": ("runs/rank-16 runs/rank-64", "runs/good runs/new --fail-if-worse 0.02"),
    "demo": ("--output runs/demo",),
    "doctor": ("--json", "--measure"),
    "runs list": ("", "runs/sweep --json"),
    "runs show": ("runs/llama-8b --html run.html",),
    "migrate": ("axolotl.yaml > qlora.yaml",),
    "config show": ("--preset qwen3-8b-24gb --rank 8", "merge runs/demo --format nf4"),
    "config schema": ("> schema.json",),
}
