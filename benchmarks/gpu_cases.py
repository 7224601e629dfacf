"""The cases of the GPU suite, as data; new ones are rows here."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the suite: a model size, the settings that differ from the defaults, and how long to run.

    Settings are by their full name. What is not named has its default, except that a step is one row of
    1024 tokens.
    """

    name: str
    size: str
    settings: dict[str, Any]
    num_steps: int = 6
    num_warmup_steps: int = 2


CASES = (
    Case(name="1b", size="1b", settings={"training.micro_batch_size": 4}),
    Case(
        name="1b-no-checkpointing",
        size="1b",
        settings={"training.micro_batch_size": 4, "training.gradient_checkpointing": "off"},
    ),
    Case(
        name="1b-16-bit",
        size="1b",
        settings={"training.micro_batch_size": 4, "quantization.method": "none"},
    ),
    Case(name="8b", size="8b", settings={"training.micro_batch_size": 2}),
    Case(name="8b-2048", size="8b", settings={"data.max_length": 2048}),
    Case(
        name="8b-paged-8-bit-adam",
        size="8b",
        settings={"training.optimizer": "paged_adamw_8bit", "lora.rank": 64},
    ),
    Case(name="tiny", size="tiny", settings={"data.max_length": 64, "training.micro_batch_size": 2}, num_steps=4),
    Case(
        name="tiny-16-bit",
        size="tiny",
        settings={"data.max_length": 64, "quantization.method": "none"},
        num_steps=4,
    ),
)
