"""What GPUs send each other takes its bytes over the rate of the link, and hides behind the computation if it can."""

import pytest

from qlora_cli.memory.costs.step_time import step_time
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.settings.sections.inspect_memory import Link
from qlora_cli.timing.links import RATES, exchange_seconds
from qlora_cli.timing.operation import Counted, Operation, OperationKind, Pass

GPU = find_gpu("RTX 4090")
WORK: Counted = ((1, Operation(Pass.FORWARD, OperationKind.BASE_GEMM, "mm", 10**14, 10**6, 1)),)


@pytest.mark.parametrize("link", Link)
@pytest.mark.parametrize("seconds", [0.01, 0.1, 1.0, 10.0, 100.0])
def test_the_longer_of_computing_and_receiving_counts(link: Link, seconds: float) -> None:
    def of_step(received_bytes: int) -> tuple[float, float, str]:
        time = step_time(
            WORK,
            (),
            GPU,
            num_micro_batches=3,
            num_tokens=8,
            pinned_host_bytes=0,
            received_bytes=received_bytes,
            num_processes=2,
            link=link,
        )
        assert time is not None
        return time.micro_batch_seconds, time.step_seconds, time.limited_by

    alone, _, limit = of_step(0)
    micro_batch, step, limited_by = of_step(round(seconds * RATES[link]))
    assert micro_batch == pytest.approx(max(alone, seconds))
    assert step == pytest.approx(3 * micro_batch)
    assert limited_by == ("link" if seconds > alone else limit)


def test_every_link_that_can_be_asked_for_has_a_rate() -> None:
    assert list(RATES) == [link.value for link in Link]


def test_gradients_are_passed_on_twice_but_for_the_share_of_each() -> None:
    seconds = [exchange_seconds(10**9, number, Link.PCIE) for number in (1, 2, 4, 512)]
    assert seconds[:3] == pytest.approx([0.0, 0.1, 0.15])
    assert seconds == sorted(seconds)
    assert seconds[-1] < 0.2
