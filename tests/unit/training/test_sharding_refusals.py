"""What a sharded base can't do, whatever the model: refused before anything is loaded."""

import pytest

from qlora_cli.errors import QloraError
from qlora_cli.settings.models import TrainingSettings
from qlora_cli.training.sharding.refusals import check_dry_run, check_processes


def test_a_sharded_base_needs_several_processes() -> None:
    check_processes(TrainingSettings(strategy="ddp"))
    check_processes(TrainingSettings(strategy="fsdp", num_gpus=2))
    with pytest.raises(QloraError, match=r"training\.strategy: there is one process") as refusal:
        check_processes(TrainingSettings(strategy="fsdp"))
    assert refusal.value.exit_code == 2
    with pytest.raises(QloraError, match=r"training\.offload_base: there is one process"):
        check_processes(TrainingSettings(offload_base=True))


def test_a_sharded_run_is_not_planned_in_one_process() -> None:
    check_dry_run(TrainingSettings(strategy="auto", num_gpus=2))
    with pytest.raises(QloraError, match="can't be used with --dry-run"):
        check_dry_run(TrainingSettings(strategy="fsdp", num_gpus=2))
    with pytest.raises(QloraError, match=r"training\.offload_base: can't be used with --dry-run"):
        check_dry_run(TrainingSettings(offload_base=True, num_gpus=2))
