"""The learning rate of every step, as transformers computes it from the arguments made of the settings."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from qlora_cli.hardware.device import ComputeDtype
from qlora_cli.settings.choices import Dtype, Schedule
from qlora_cli.training.arguments import training_arguments
from qlora_cli.training.lora_plus import scale_b_learning_rate
from tests.conftest import train_settings

PEAK = 0.5


class Adapter(nn.Module):
    """An A and a B matrix, with the names that PEFT gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict(
            {name: nn.ModuleDict({"default": nn.Linear(2, 2, bias=False)}) for name in ("lora_A", "lora_B")}
        )


def rates(tmp_path: Path, schedule: str, num_steps: int = 20, ratio: float | None = None, **flags: Any) -> list[float]:
    """Return the learning rate of each step; with `ratio`, of the B matrices."""
    values = {f"training__{name}": value for name, value in {"learning_rate": PEAK, **flags}.items()}
    settings = train_settings(tmp_path, tmp_path, tmp_path / "run", training__schedule=schedule, **values).settings
    arguments = training_arguments(
        settings,
        output=tmp_path,
        device=torch.device("cpu"),
        dtype=ComputeDtype(name=Dtype.FP32, reason="test"),
        num_steps=num_steps,
        has_eval=False,
    )
    model = Adapter()
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.learning_rate)
    if ratio is not None:
        scale_b_learning_rate(optimizer, model, ratio)
    # As `Trainer.create_scheduler` calls it.
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    learning_rates = []
    for _ in range(num_steps):
        learning_rates.append(optimizer.param_groups[-1]["lr"])
        optimizer.step()
        scheduler.step()
    return learning_rates


def half_cosine(progress: float, floor: float = 0.0) -> float:
    return PEAK * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


WARMUP = [0.0, PEAK / 4, PEAK / 2, PEAK * 3 / 4]  # 20 % of 20 steps
REST = [step / 16 for step in range(16)]  # the completed share of the steps after warm-up


@pytest.mark.parametrize(
    ("schedule", "flags", "expected"),
    [
        ("constant", {}, [PEAK] * 20),
        ("constant_with_warmup", {"warmup_ratio": 0.2}, [*WARMUP, *[PEAK] * 16]),
        ("linear", {"warmup_ratio": 0.2}, [*WARMUP, *(PEAK * (1 - share) for share in REST)]),
        ("cosine", {"warmup_ratio": 0.2}, [*WARMUP, *map(half_cosine, REST)]),
        (
            "cosine_with_min_lr",
            {"warmup_ratio": 0.2, "min_lr_ratio": 0.25},
            [*WARMUP, *(half_cosine(share, 0.25) for share in REST)],
        ),
        (
            "cosine_with_restarts",
            {"warmup_ratio": 0.2, "cosine_cycles": 4},
            [*WARMUP, *(half_cosine(4 * share % 1) for share in REST)],
        ),
        (
            "polynomial",
            {"warmup_ratio": 0.2, "min_lr_ratio": 0.25, "polynomial_power": 2},
            [*WARMUP, *(PEAK * (0.25 + 0.75 * (1 - share) ** 2) for share in REST)],
        ),
        (
            "inverse_sqrt",
            {"warmup_ratio": 0.2},
            [*WARMUP, *(PEAK * math.sqrt(4 / step) for step in range(4, 20))],
        ),
        (
            "warmup_stable_decay",
            {"warmup_ratio": 0.2, "decay_ratio": 0.4, "min_lr_ratio": 0.25},
            # Warm-up, too, starts at the minimum rate.
            [
                *(PEAK * (0.25 + 0.75 * step / 4) for step in range(4)),
                *[PEAK] * 8,
                *(half_cosine(step / 8, 0.25) for step in range(8)),
            ],
        ),
    ],
)
def test_the_learning_rate_of_every_step_follows_the_schedule(
    tmp_path: Path, schedule: str, flags: dict[str, Any], expected: list[float]
) -> None:
    plain = rates(tmp_path, schedule, **flags)
    assert plain == pytest.approx(expected, abs=1e-12)
    assert rates(tmp_path, schedule, ratio=8.0, **flags) == pytest.approx([8 * rate for rate in plain], abs=1e-12)


def test_every_schedule_is_tested() -> None:
    (mark,) = test_the_learning_rate_of_every_step_follows_the_schedule.pytestmark
    assert {schedule for schedule, _, _ in mark.args[1]} == set(Schedule)


@pytest.mark.parametrize(
    ("schedule", "setting", "other"),
    [
        ("cosine_with_min_lr", "min_lr_ratio", 0.3),
        ("polynomial", "min_lr_ratio", 0.3),
        ("polynomial", "polynomial_power", 3),
        ("warmup_stable_decay", "min_lr_ratio", 0.3),
        ("warmup_stable_decay", "decay_ratio", 0.5),
        ("cosine_with_restarts", "cosine_cycles", 3),
        *((schedule.value, "warmup_ratio", 0.4) for schedule in Schedule if schedule != Schedule.CONSTANT),
    ],
)
def test_every_setting_of_a_schedule_changes_it(tmp_path: Path, schedule: str, setting: str, other: Any) -> None:
    assert rates(tmp_path, schedule) != rates(tmp_path, schedule, **{setting: other})


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.9])
def test_the_shortest_runs_have_a_learning_rate_up_to_the_peak_in_every_step(
    tmp_path: Path, schedule: Schedule, num_steps: int, warmup: float
) -> None:
    flags: dict[str, Any] = {} if schedule == Schedule.CONSTANT else {"warmup_ratio": warmup}
    if schedule == Schedule.WARMUP_STABLE_DECAY:
        flags["decay_ratio"] = 0.1
    learning_rates = rates(tmp_path, schedule.value, num_steps=num_steps, **flags)
    assert max(learning_rates) == PEAK  # warm-up never covers all steps
    assert all(0 <= rate <= PEAK for rate in learning_rates)


def test_a_learning_rate_below_the_end_of_a_polynomial_schedule_is_accepted(tmp_path: Path) -> None:
    learning_rates = rates(tmp_path, "polynomial", learning_rate=1e-8)
    assert learning_rates[-1] < learning_rates[1] <= 1e-8
