"""Choose what each of several GPUs holds of the base: all of it, or a shard if that does not fit; and how many GPUs.

Imports no torch.
"""

from collections.abc import Iterator

from qlora_cli.memory.fitting.plan import PlanOn
from qlora_cli.memory.fitting.suggestions import NO
from qlora_cli.memory.gpus import Gpu
from qlora_cli.settings.choices import Strategy
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.rules.conflicts_training import STRATEGY, sharding_problems
from qlora_cli.settings.settle import with_settings

NUM_GPUS = "training.num_gpus"
NUMBERS = (2, 4, 8)  # of GPUs, as they are sold and rented in one machine


def with_strategy(settings: EstimateSettings, gpu: Gpu, plan: PlanOn) -> EstimateSettings:
    """Return the settings with a sharded base if that is open, and all of it does not fit on one `gpu`.

    `plan` predicts a run as it would be planned.
    """
    is_open = settings.training.num_gpus > 1 and _may_shard(settings)
    if is_open and plan(settings, gpu).fits == NO:
        return with_settings(settings, {STRATEGY: Strategy.FSDP})
    return settings


def _may_shard(settings: EstimateSettings) -> bool:
    """Return whether the base may be sharded among several GPUs."""
    training = settings.training
    is_open = training.strategy == Strategy.AUTO and not training.shards_base
    return is_open and not any(True for _ in sharding_problems(dict(settings)))


def on_more_gpus(
    settings: EstimateSettings, *, strategy: Strategy, is_number_open: bool
) -> Iterator[EstimateSettings]:
    """Yield a run as it is, then with its base sharded among its GPUs; or among more of them if their number is open.

    `strategy` is the one that was asked for, which may have been chosen for another GPU since. Where the settings do
    not allow a sharded base, it is only the run as it is.
    """
    asked = with_settings(settings, {STRATEGY: strategy})
    yield asked
    numbers = NUMBERS if is_number_open else (asked.training.num_gpus,)
    for number in numbers if _may_shard(asked) else ():
        if 1 < number <= asked.training.rows_per_step:
            yield with_settings(asked, {NUM_GPUS: number, STRATEGY: Strategy.FSDP})
