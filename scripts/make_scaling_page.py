"""Write docs/explanation/scaling.md: how time, memory and traffic grow with GPUs, length and model, as predicted.

python scripts/make_scaling_page.py           # a test recomputes some rows and fails when they are stale
"""

import gc
import os
from dataclasses import dataclass
from pathlib import Path

# Nothing is compiled here, and PyTorch's compiler takes a second to import.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from qlora_cli.memory.catalogue import find_in_catalogue
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import facts_of_catalogue
from qlora_cli.memory.prediction import Estimate
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.sections.inspect_memory import Link
from qlora_cli.timing.links import RATES, gather_seconds
from qlora_cli.units import GIB

PAGE = Path(__file__).resolve().parent.parent / "docs" / "explanation" / "scaling.md"
ROWS = 512  # of a step
LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run on `num_gpus` cards: each holds all of the base, or a shard."""

    model: str
    card: str
    num_gpus: int
    is_sharded: bool
    link: Link = Link.PCIE
    length: int = LENGTH

    @property
    def settings(self) -> EstimateSettings:
        """The settings of the run."""
        training = {
            "gradient_accumulation_steps": ROWS,
            "gradient_checkpointing": "on",
            "num_gpus": self.num_gpus,
            "strategy": "fsdp" if self.is_sharded else "ddp",
        }
        values = {"model": {"name": self.model}, "data": {"max_length": self.length}, "training": training}
        return EstimateSettings.model_validate(values)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """The estimate of a run, and the bytes that each GPU receives in a step."""

    estimate: Estimate
    received_bytes: int
    receiving_seconds: float


BY_GPUS = (
    *(Case(model="llama-3.1-8b", card="RTX 4090", num_gpus=number, is_sharded=False) for number in (1, 2, 4, 8)),
    *(Case(model="llama-3.1-8b", card="RTX 4090", num_gpus=number, is_sharded=True) for number in (2, 4, 8)),
    *(
        Case(model="llama-3.3-70b", card="A100 80GB", num_gpus=number, is_sharded=number > 1, link=Link.NVLINK)
        for number in (1, 2, 4, 8)
    ),
    *(
        Case(model="llama-3.1-405b", card="H100 SXM", num_gpus=number, is_sharded=True, link=Link.INFINIBAND)
        for number in (8, 32, 128, 512)
    ),
)
BY_LENGTH = tuple(
    Case(model="llama-3.1-8b", card="RTX 4090", num_gpus=1, is_sharded=False, length=length)
    for length in (512, 1024, 2048, 4096, 8192)
)
BY_MODEL = tuple(
    Case(model=model, card="H100 SXM", num_gpus=8, is_sharded=True, link=Link.NVLINK)
    for model in ("llama-3.2-1b", "llama-3.1-8b", "llama-3.3-70b", "llama-3.1-405b")
)
BY_LINK = tuple(
    Case(model="llama-3.3-70b", card="A100 80GB", num_gpus=8, is_sharded=True, link=link, length=length)
    for length in (LENGTH, 512)
    for link in Link
)
HEAD = f"""\
# How a run scales

What more GPUs, longer rows and a larger model cost, in time, memory and traffic. How to use several GPUs:
[more GPUs](../how-to/more-gpus.md).

## Measured

Nothing on this page but this: two processes on the CPUs of one machine give the adapter of one, with and without a
sharded base ([decision 44](../decisions/0044-every-process-is-a-run-of-its-own.md),
[decision 45](../decisions/0045-the-base-is-sharded-and-the-adapter-is-not.md)), and the bytes that a sharded base
gathers are those of PyTorch's `fully_shard`
([decision 46](../decisions/0046-the-buffers-of-a-sharded-base-follow-its-units.md)). No time on several GPUs was
measured.

## Computed

By `python scripts/make_scaling_page.py`, with the code of `qlora inspect-memory`: NF4, rank 16 on all linear layers,
each layer recomputed, micro-batches of one row, steps of {ROWS:,} rows of {LENGTH:,} tokens. *GiB* are those of the
process on each GPU. *Received* is what each GPU receives of the base in a step, and *sending* how long that takes over
the link, by rates that are guesses: {{rates}}.
The GPUs compute meanwhile, so that the longer of both counts. *Efficiency* is tokens a second for each GPU, as a share
of those of the first line of its model.

- **A whole base on each GPU** scales as long as there are rows: gradients of the adapter are exchanged once a step.
- **A sharded base** takes less memory the more GPUs share it, down to what is not divided: the adapter with its
  optimizer, activations, and what is gathered. The head is gathered whole, with a buffer of its size: 2 GiB for an 8B
  with 128,256 tokens, so that two GPUs gain nothing there.
- What a GPU receives for a micro-batch is nearly all of the base twice, however many GPUs there are. As long as a
  micro-batch computes for longer than that travels, sharding takes no time. Otherwise the link sets the pace, and
  longer rows or fuller micro-batches help, where more GPUs do not.\
"""
COLUMNS = (
    "model",
    "GPUs",
    "link",
    "GiB each",
    "received",
    "sending",
    "a step",
    "tokens/s",
    "efficiency",
    "limited by",
)


def predict(case: Case) -> Predicted:
    """Return the prediction for a run."""
    model = find_in_catalogue(case.model)
    assert model is not None, case.model
    estimator, gpu = Estimator(facts_of_catalogue(model), link=case.link), find_gpu(case.card)
    sharded = estimator.traced(case.settings, gpu).sharded
    received = 0 if sharded is None else estimator.num_micro_batches(case.settings) * sharded.received_bytes
    return Predicted(
        estimate=estimator.estimate(case.settings, gpu),
        received_bytes=received,
        receiving_seconds=gather_seconds(received, case.link),
    )


def row(case: Case, predicted: Predicted, efficiency: float | None) -> str:
    """Return the row of a table, without its efficiency if there is none."""
    time = predicted.estimate.time
    assert time is not None, case.card
    what = "" if case.num_gpus == 1 else ", sharded" if case.is_sharded else ", whole"
    has_traffic = predicted.received_bytes > 0
    cells = (
        f"`{case.model}`" + ("" if case.length == LENGTH else f", {case.length:,} tokens"),
        f"{case.num_gpus} {case.card}{what}",
        "" if case.num_gpus == 1 else case.link.value,
        f"{predicted.estimate.predicted.process_bytes / GIB:.1f}",
        f"{predicted.received_bytes / GIB:,.0f} GiB" if has_traffic else "",
        f"{predicted.receiving_seconds:,.1f} s" if has_traffic else "",
        f"{time.step_seconds:,.1f} s",
        f"{time.tokens_per_second:,.0f}",
        "" if efficiency is None else f"{efficiency:.0%}",
        time.limited_by,
    )
    return f"| {' | '.join(cells)} |"


def table(cases: tuple[Case, ...], *, compares: bool) -> list[str]:
    """Return a table; `compares`: each GPU's speed with that of the first case of its model."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    first: dict[str, float] = {}
    for case in cases:
        predicted = predict(case)
        assert predicted.estimate.time is not None, case.card
        of_one = predicted.estimate.time.tokens_per_second / case.num_gpus
        share = of_one / first.setdefault(case.model, of_one)
        lines.append(row(case, predicted, share if compares else None))
    return lines


def page() -> str:
    """Return the page."""
    rates = ", ".join(f"{link} {rate / 1e9:g} GB/s" for link, rate in RATES.items())
    return "\n".join(
        [
            HEAD.format(rates=rates),
            *("", "### More GPUs", "", *table(BY_GPUS, compares=True)),
            *("", "### Slower links", "", *table(BY_LINK, compares=False)),
            *("", "### Longer rows", "", *table(BY_LENGTH, compares=False)),
            *("", "### Larger models", "", *table(BY_MODEL, compares=False)),
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    gc.freeze()  # the collection of all imported objects at exit would take a second
