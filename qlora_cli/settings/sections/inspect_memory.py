"""Settings of `qlora inspect-memory` about the prediction, besides those of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from qlora_cli.settings.choices import CardOrder, SdpaBackend
from qlora_cli.settings.enumerated import Choice
from qlora_cli.settings.section import Section
from qlora_cli.settings.setting_metadata import Command, Metadata, Named
from qlora_cli.settings.values import Solvables, Words

MIN_TOKENS = 8  # of a row, as for data.max_length
INSPECT = (Command.INSPECT_MEMORY,)
NUMBER = "Name the card with --gpu, once for each card to compare, and how many share a run with --num-gpus."


class Link(Choice):
    """What GPUs send each other weights and gradients over."""

    PCIE = "pcie"
    NVLINK = "nvlink"
    INFINIBAND = "infiniband"
    ETHERNET = "ethernet"


class PredictionSettings(Section):
    """Settings of `qlora inspect-memory` about the prediction, besides those of the run."""

    removed: ClassVar[Mapping[str, str]] = {
        "recipe": "Leave it out: the run of qlora train is predicted. benchmarks/ in the source has a plain PEFT loop."
    } | {"gpus": NUMBER, "num_gpus": "It is training.num_gpus."}

    gpus: Annotated[
        Words,
        Metadata(flag="--gpu", commands=INSPECT, metavar="NAME|SIZE|auto|cpu", is_repeatable=True, names=Named.CARD),
    ] = Field(
        default=(),
        description="GPU to fit on: 'RTX 4090', 24GB (any card of that size), 24GiB, auto for this machine's; may be "
        "repeated. cpu: this machine's CPU, as auto is without a GPU.",
    )
    sdpa_backend: Annotated[SdpaBackend, Metadata(flag="--sdpa-backend", commands=INSPECT)] = Field(
        default=SdpaBackend.AUTO,
        description="Backend of scaled_dot_product_attention; auto: the one that PyTorch chooses on the GPU.",
    )
    link: Annotated[Link, Metadata(flag="--link", commands=INSPECT)] = Field(
        default=Link.PCIE,
        description="What several GPUs send each other weights and gradients over, by which their time is predicted.",
    )
    evaluate: Annotated[bool | None, Metadata(flag="--eval", off_flag="--no-eval", commands=INSPECT)] = Field(
        default=None, description="Include an evaluation batch; by default if the settings ask for evaluation."
    )
    solve: Annotated[Solvables, Metadata(flag="--solve", commands=INSPECT, is_repeatable=True)] = Field(
        default=(),
        description="Find the largest that fits on each --gpu; gpu: the best cards for the run, of those that --gpu "
        "names, that have a price, or of all. May be repeated.",
    )
    by: Annotated[CardOrder | None, Metadata(flag="--by", commands=INSPECT)] = Field(
        default=None,
        description="What makes a card the best for --solve gpu; by default cost if prices are given.",
    )
    prices: Annotated[Path | None, Metadata(flag="--prices", commands=INSPECT, metavar="FILE")] = Field(
        default=None, description="YAML file of cards and their prices for an hour, such as RTX 4090: 0.40."
    )
    sweep: Annotated[Words, Metadata(flag="--sweep", commands=INSPECT, metavar="NAME=VALUES", is_repeatable=True)] = (
        Field(default=(), description="Vary one or several settings: max-length=512..32768 (doubling), rank=8,16.")
    )
    plot: Annotated[Path | None, Metadata(flag="--plot", commands=INSPECT, metavar="FILE")] = Field(
        default=None, description="Draw memory against --max-length into this file (.png, .svg, .pdf)."
    )
    write_lock: Annotated[Path | None, Metadata(flag="--write-lock", commands=INSPECT, metavar="FILE")] = Field(
        default=None, description="Write the predicted peak to this file, for --check."
    )
    check: Annotated[Path | None, Metadata(flag="--check", commands=INSPECT, metavar="FILE")] = Field(
        default=None,
        description="Compare the predicted peak with that in a file of --write-lock; exit with 1 if it moved.",
    )
    max_change: Annotated[float, Metadata(flag="--max-change", commands=INSPECT)] = Field(
        default=0.01, ge=0, description="Share of the peak by which it may move for --check, up or down."
    )
    rows: Annotated[int | None, Metadata(flag="--rows", commands=INSPECT)] = Field(
        default=None, ge=1, description="Rows of the training data: predicts the time and energy of the whole run."
    )
    mean_tokens: Annotated[int | None, Metadata(flag="--mean-tokens", commands=INSPECT)] = Field(
        default=None, ge=MIN_TOKENS, description="Mean length of these --rows; by default, --max-length."
    )
    price: Annotated[float | None, Metadata(flag="--price", commands=INSPECT)] = Field(
        default=None, gt=0, description="Price of the GPU for an hour, in any currency: predicts the cost of the run."
    )
