"""What a sharded base, or several processes, can't do, whatever the model: refused before anything is loaded."""

import pytest

from qlora_cli.errors import QloraError, UsageError
from qlora_cli.settings.models import TrainingSettings, TrainSettings
from qlora_cli.training.sharding.refusals import check_dry_run, check_processes


def run(**training: object) -> TrainSettings:
    content = {"model": {"name": "m"}, "data": {"dataset": "d"}, "output": {"directory": "o"}, "training": training}
    return TrainSettings.model_validate(content)


def test_a_sharded_base_needs_several_processes() -> None:
    check_processes(run(strategy="ddp"))
    check_processes(run(strategy="fsdp", num_gpus=2))
    with pytest.raises(QloraError, match=r"training\.strategy: there is one process") as refusal:
        check_processes(run(strategy="fsdp"))
    assert refusal.value.exit_code == 2
    with pytest.raises(QloraError, match=r"training\.offload_base: there is one process"):
        check_processes(run(offload_base=True))


def test_a_sharded_run_is_not_planned_in_one_process() -> None:
    check_dry_run(TrainingSettings(strategy="auto", num_gpus=2))
    with pytest.raises(QloraError, match="can't be used with --dry-run"):
        check_dry_run(TrainingSettings(strategy="fsdp", num_gpus=2))
    with pytest.raises(QloraError, match=r"training\.offload_base: can't be used with --dry-run"):
        check_dry_run(TrainingSettings(offload_base=True, num_gpus=2))


@pytest.mark.parametrize(("key", "value"), [("memory_budget", "9GiB"), ("calibrate", True)])
def test_what_one_process_measures_is_refused_where_a_launcher_started_several(key: str, value: object) -> None:
    check_processes(run(**{key: value}))
    with pytest.raises(UsageError, match="by one process") as caught:
        check_processes(run(num_gpus=2, **{key: value}))
    assert caught.value.setting == f"training.{key}"
