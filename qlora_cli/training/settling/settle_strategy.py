"""Settle a run whose strategy is left open: the base is sharded if it does not fit on one device."""

from qlora_cli.errors import OutOfMemoryError
from qlora_cli.events import Noted, Reporter
from qlora_cli.settings.choices import Strategy
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.rules.conflicts_training import STRATEGY, sharding_problems
from qlora_cli.settings.settle import inferred_origin
from qlora_cli.training.checks.memory_plan import decided
from qlora_cli.training.run_plan import SettledRun, settle_run

DOES_NOT_FIT = inferred_origin("--strategy auto: it does not fit on one device")


def settle_by_strategy(resolved: Resolved[TrainSettings], reporter: Reporter, *, force: bool) -> SettledRun:
    """Settle a run as `settle_run` does; with several processes, with a sharded base if it would not fit otherwise.

    With `force`, too, a base that may be sharded is, before a run is tried that is predicted not to fit.

    Raises:
        QloraError: of the type of the problem.
    """
    settings = resolved.settings
    training = settings.training
    is_open = training.strategy == Strategy.AUTO and not training.shards_base and training.num_gpus > 1
    may_shard = is_open and not any(True for _ in sharding_problems(dict(settings)))
    try:
        return settle_run(resolved, reporter, force=force and not may_shard)
    except OutOfMemoryError as error:
        if not may_shard:
            raise
        message = f"{error}. So the base is sharded among the {training.num_gpus} processes"
        reporter.report(Noted(level="warning", message=message))
    return settle_run(decided(resolved, {STRATEGY: Strategy.FSDP}, DOES_NOT_FIT), reporter, force=force)
