"""What several processes run with is planned for the card of the first: whether they share the base, and how.

The card is given by its figures; what is planned for it trains on the CPU.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import OutOfMemoryError
from qlora_cli.events import Noted
from qlora_cli.memory.fitting.division import MICRO_BATCH_TOKENS
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.ranks.group import ProcessGroup
from qlora_cli.settings.choices import Strategy
from qlora_cli.training.checks import memory_plan
from qlora_cli.training.run_plan import SettledRun
from qlora_cli.training.settling.settle_strategy import settle_by_strategy
from qlora_cli.training.train_run import train
from qlora_cli.units import GIB, MIB
from tests.conftest import Recorder, short_settings
from tests.integration.training.test_planned_run import in_steps_of_six
from tests.integration.training.test_ranks import all_done, distance
from tests.integration.training.test_sharding import FailingWithin, runs_out
from tests.support.models.loading import save_model
from tests.support.processes.rank_processes import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

ON: dict[str, object] = {"training__gradient_checkpointing": "on", "training__gradient_accumulation_steps": 4}
LARGE: dict[str, object] = {"quantization__method": "none", "training__micro_batch_size": 1}


def card(total_bytes: int) -> Gpu:
    """Return a card with the kernels of an RTX 4090, and no CUDA context."""
    return replace(find_gpu("RTX 4090"), total_bytes=total_bytes, context_bytes=0, context_high_bytes=0)


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers take more than what a process holds of them for a moment."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    return save_model(folder, num_hidden_layers=32, hidden_size=256, intermediate_size=2048)


def settled(
    model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu, *, force: bool = False, **changed: object
) -> tuple[SettledRun, list[str]]:
    """Settle a run of two processes on a card, and return it with what was noted."""
    monkeypatch.setattr(memory_plan, "current_gpu", lambda _: gpu)
    recorder = Recorder()
    values = {"training__num_gpus": 2, **ON, **LARGE, **changed}
    run = settle_by_strategy(short_settings(model, rows, rows.parent / "run", **values), recorder, force=force)
    return run, [event.message for event in recorder.events if isinstance(event, Noted)]


def between(model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Return a card that holds a run whose base is sharded, and not one that holds all of it."""
    figures = {}
    for strategy in (Strategy.DDP, Strategy.FSDP):
        run, _ = settled(model, rows, monkeypatch, card(GIB), training__strategy=strategy.value)
        assert run.outlook is not None
        figures[strategy] = run.outlook.estimate.predicted
    sharded, whole = figures[Strategy.FSDP].process_high_bytes, figures[Strategy.DDP].allocated_low_bytes
    assert sharded < whole
    return card((sharded + whole) // 2)


def test_a_base_is_sharded_where_one_card_does_not_hold_it_and_only_there(
    deep_model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = between(deep_model, rows, monkeypatch)
    whole, notes = settled(deep_model, rows, monkeypatch, card(GIB))
    assert whole.resolved.settings.training.strategy == Strategy.AUTO
    assert not [note for note in notes if "is sharded among" in note]
    # Even a run that would be tried all the same.
    sharded, notes = settled(deep_model, rows, monkeypatch, small, force=True)
    assert sharded.resolved.settings.training.shards_base
    assert [note for note in notes if "So the base is sharded among the 2 processes" in note]
    assert sharded.outlook is not None
    assert sharded.outlook.predicted.fits == "yes"


def test_a_sharded_run_that_fits_no_way_is_refused(
    base_model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        settled(base_model, rows, monkeypatch, card(MIB), training__strategy="fsdp")
    assert "larger GPUs, or more of them" in (caught.value.hint or "")


def test_shards_that_do_not_fit_are_proposed_to_be_kept_on_the_host(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1, hidden_size=256, intermediate_size=2048)
    # Of the weights, nothing is read before they are loaded.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 24}))
    figures = {}
    for offloads in (False, True):
        changed: dict[str, Any] = {"training__strategy": "fsdp", "training__offload_base": offloads}
        run, _ = settled(model, rows, monkeypatch, card(GIB), lora__rank=1, **changed)
        assert run.outlook is not None
        figures[offloads] = run.outlook.estimate.predicted
    least, sharded = figures[True].process_high_bytes, figures[False].allocated_low_bytes
    assert least < sharded
    small = card((least + sharded) // 2)
    for strategy in ("auto", "fsdp"):
        with pytest.raises(OutOfMemoryError) as caught:
            settled(model, rows, monkeypatch, small, lora__rank=1, training__strategy=strategy)
        assert "--offload-base" in (caught.value.hint or "")
    fits, _ = settled(model, rows, monkeypatch, small, lora__rank=1, training__offload_base=True)
    assert fits.outlook is not None
    assert fits.outlook.predicted.fits == "yes"


@dataclass(frozen=True)
class OnCard:
    """Lets each process see a card with as much memory for each as `sizes` say."""

    sizes: tuple[int, ...]

    def __call__(self, group: ProcessGroup) -> Recorder:
        gpu = card(self.sizes[group.rank])
        setattr(memory_plan, "current_gpu", lambda _: gpu)  # noqa: B010 - in a process of its own
        return Recorder()


def record_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return content


def test_a_sharded_run_is_planned_by_the_first_process_and_trains_the_adapter_of_one(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    one, run = tmp_path / "one", tmp_path / "run"
    train(in_steps_of_six(base_model, rows, one), Recorder())
    sharded = in_steps_of_six(base_model, rows, run, training__num_gpus=2, training__strategy="fsdp")
    # By its own memory, the second one would recompute layers.
    all_done(run_ranks(sharded, tmp_path / "ranks", OnCard((GIB, 100 * MIB))), 2)
    record = record_of(run)
    training = record["settings"]["training"]
    assert (training["strategy"], training["gradient_checkpointing"]) == ("fsdp", "off")
    assert training["micro_batch_tokens"] > 0
    for path in ("training.gradient_checkpointing", MICRO_BATCH_TOKENS):
        assert record["origins"][path] == "the plan for this GPU"
    assert record["plan"]["predicted_memory"]["allocated_bytes"] > 0
    assert distance(run, one) < 1e-5


@dataclass(frozen=True)
class RunningOut:
    """Lets the second process run out of memory within a layer of step 3, on a card that both see."""

    def __call__(self, group: ProcessGroup) -> Recorder:
        OnCard((GIB, GIB))(group)
        return FailingWithin(runs_out, backward=True)(group)


def test_a_sharded_run_of_which_one_process_ran_out_of_memory_resumes_with_less(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    run, changed = tmp_path / "run", {"training__num_gpus": 2, "training__save_steps": 1}
    settings = in_steps_of_six(base_model, rows, run, **changed, training__strategy="fsdp")
    first, _ = run_ranks(settings, tmp_path / "failing", RunningOut())
    assert first.code == OutOfMemoryError.exit_code
    assert "goes on with gradient checkpointing selective. The training until step 2 is saved" in first.told["hint"]
    assert record_of(run)["settings"]["training"]["gradient_checkpointing"] == "off"
    all_done(run_ranks(settings, tmp_path / "resumed", OnCard((GIB, GIB))), 2)
    assert record_of(run)["settings"]["training"]["gradient_checkpointing"] == "selective"
    assert record_of(run)["status"] == "done"
