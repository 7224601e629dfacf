"""What a run of several processes, or one whose base is sharded, can't do."""

from qlora_cli.errors import HardwareError, ModelError, UsageError
from qlora_cli.settings.models import TrainingSettings, TrainSettings
from qlora_cli.settings.rules.conflicts_calibrating import BY_ONE_PROCESS, calibrating_conflicts
from qlora_cli.settings.rules.conflicts_training import sharding_problems

NOT_SHARDED = "Leave --strategy and --offload-base out."


def check_processes(settings: TrainSettings) -> None:
    """Check the number of processes, which a launcher may have started: several to shard a base, one to measure it.

    Raises:
        HardwareError: there is one, and the base is sharded.
        UsageError: there are several, and the base is calibrated, or a memory budget spent.
    """
    training = settings.training
    if training.num_gpus > 1:
        for path, message, hint in calibrating_conflicts(dict(settings)):
            if path in BY_ONE_PROCESS:
                raise UsageError(message, hint=hint, setting=path)
    if training.shards_base and training.num_gpus == 1:
        raise HardwareError(
            "there is one process, which would hold all of the base",
            hint="Give --num-gpus, or leave --strategy and --offload-base out.",
            setting=training.sharding_setting,
        )


def check_dry_run(training: TrainingSettings) -> None:
    """Check that a run can be planned in one process, which loads the model.

    Raises:
        UsageError: its base is sharded.
    """
    if training.shards_base:
        raise UsageError(
            "can't be used with --dry-run, which loads the model in one process",
            hint="Leave one of them out. A run tries its largest micro-batches before the first step.",
            setting=training.sharding_setting,
        )


def check_shardable(settings: TrainSettings) -> None:
    """Check that the base can be sharded as the model's own files settle it.

    Raises:
        ModelError: it can't.
    """
    training = settings.training
    problems = sharding_problems(dict(settings)) if training.shards_base else ()
    for what, why, _ in problems:
        raise ModelError(f"can't be used with {what}: {why}", hint=NOT_SHARDED, setting=training.sharding_setting)
