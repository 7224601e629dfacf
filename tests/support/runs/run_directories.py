"""Run directories as training writes them, built from events, for tests of what reads them."""

import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from qlora_cli.events import EvalDone, Event, MemoryUse, SampleDone, StepDone
from qlora_cli.runs.metrics import event_line
from qlora_cli.units import GIB

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SCRIPT = "<script>alert(1)</script>"
HOSTILE = (
    *(SCRIPT, "&amp;\"'`", "\u202egnp.exe", "nul \0 escape \x1b[2J bell \x07", "👩🏽‍🚀", "x" * 5000, "ما هي العاصمة؟"),
    *(
        "lone \ud800",
        "</p></main></svg>",
        "{{ 7 * 7 }}",
        "<img src=https://example.com/x.png>",
        "a\tb\r\nc\u2028d",
        "",
    ),
)


def step_done(step: int, num_steps: int = 100, **other: Any) -> StepDone:
    """Return a step of a run whose loss falls; all its figures depend on `step`."""
    figures: dict[str, Any] = {
        "loss": 1 + 2 * math.exp(-step / 20),
        "learning_rate": 2e-4 * (1 - step / num_steps),
        "grad_norm": 0.3 + step / 1000,
        "tokens_per_second": 1000.0 + step,
        "memory": MemoryUse(
            host_bytes=3 * GIB,
            device_allocated_bytes=6 * GIB,
            device_reserved_bytes=8 * GIB,
            device_total_bytes=24 * GIB,
        ),
    }
    return StepDone(
        step=step,
        num_steps=num_steps,
        epoch=step / num_steps,
        num_tokens=500 * step,
        elapsed_seconds=2.0 * step,
        **{**figures, **other},
    )


def eval_done(step: int, loss: float) -> EvalDone:
    """Return an evaluation."""
    return EvalDone(step=step, loss=loss, seconds=1.0, is_best=False)


def sample_done(step: int, prompt: str = "Why?", answer: str | None = None) -> SampleDone:
    """Return a sample whose answer contains its step."""
    return SampleDone(step=step, prompt=prompt, answer=f"answer {step}" if answer is None else answer)


def lines_of(events: Iterable[Event], start: datetime = START) -> list[str]:
    """Return the lines of `metrics.jsonl` for events that are a second apart."""
    return [event_line(event, start + timedelta(seconds=second)) for second, event in enumerate(events)]


def write_run(
    directory: Path, events: Sequence[Event] = (), record: dict[str, Any] | None = None, *, start: datetime = START
) -> Path:
    """Write a run directory; without a `record` it has no `run.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines_of(events, start)))
    if record is not None:
        (directory / "run.json").write_text(json.dumps(record))
    return directory


def a_record(status: str = "done", **other: Any) -> dict[str, Any]:
    """Return a `run.json` of a run on a GPU."""
    return {
        "status": status,
        "started": START.isoformat(timespec="seconds"),
        "settings": {
            "model": {"name": "Qwen/Qwen3-0.6B", "dtype": "bf16"},
            "data": {"dataset": ["train.jsonl", "more.jsonl"], "packing": False},
            "training": {"max_grad_norm": 0.3, "sample_prompts": None},
            "output": {"resume": "auto"},
        },
        "origins": {"model.name": "--model", "training.max_grad_norm": "run.yaml:12"},
        "versions": {"torch": "2.11.0"},
        "hardware": {"gpu": "NVIDIA RTX 4090", "memory_bytes": 64 * GIB, "num_cpus": 16},
        "data": {
            "train": {"rows": 1500, "tokens": 70_000, "fingerprint": "0a1b"},
            "eval": {"rows": 20, "tokens": 900},
        },
        "plan": {
            "num_steps": 100,
            "padding_share": 0.25,
            "predicted_memory": {
                "gpu": "RTX 4090",
                "allocated_bytes": 9 * GIB,
                "reserved_bytes": 10 * GIB,
                "process_bytes": 11 * GIB,
                "fits": "yes",
            },
        },
        **other,
    }
