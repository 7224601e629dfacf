"""Choose what each of several GPUs holds of the base: all of it, or a shard if that does not fit. Imports no torch."""

from qlora_cli.memory.fitting.plan import PlanOn
from qlora_cli.memory.fitting.suggestions import NO
from qlora_cli.memory.gpus import Gpu
from qlora_cli.settings.choices import Strategy
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.rules.conflicts_training import STRATEGY, sharding_problems
from qlora_cli.settings.settle import with_settings


def with_strategy(settings: EstimateSettings, gpu: Gpu, plan: PlanOn) -> EstimateSettings:
    """Return the settings with a sharded base if that is open, and all of it does not fit on one `gpu`.

    `plan` predicts a run as it would be planned.
    """
    training = settings.training
    if (
        training.num_gpus == 1
        or training.strategy != Strategy.AUTO
        or any(True for _ in sharding_problems(dict(settings)))
    ):
        return settings
    return with_settings(settings, {STRATEGY: Strategy.FSDP}) if plan(settings, gpu).fits == NO else settings
