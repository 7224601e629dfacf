"""The parts of an adapter's config that only some variants of LoRA have, with the types and sizes that PEFT accepts.

Keys of later versions are left to PEFT, which refuses what it does not know.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

MOST_ITERATIONS = 64  # of PiSSA's fast singular value decomposition; its authors use up to 16
MOST_TOKENS = 1_000
PISSA_ITERATIONS = "pissa_niter_"
INITIALIZATIONS = (
    *("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "lora_ga", "mica"),
    *(f"{PISSA_ITERATIONS}{number}" for number in range(MOST_ITERATIONS + 1)),
)


def _check_initialization(value: str) -> str:
    if value.lower() not in INITIALIZATIONS:
        names = ", ".join(name for name in INITIALIZATIONS if not name.startswith(PISSA_ITERATIONS))
        most = f"{PISSA_ITERATIONS}[number of at most {MOST_ITERATIONS}]"
        raise PydanticCustomError("initialization", f"one of {names}, {most}")
    return value


Initialization = Annotated[str, AfterValidator(_check_initialization)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MOST_TOKENS)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
GroupSize = Annotated[int, Field(ge=1, le=2**20)]
Blocks = Annotated[int, Field(ge=1, le=2**16)]


class _Variant(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class BlockDiagonal(_Variant):
    """BD-LoRA: A or B is block-diagonal."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: Blocks = 1
    match_strict: bool = True


class Kasa(_Variant):
    """KaSA: knowledge-aware singular values."""

    beta: Finite = 0.0
    gamma: Finite = 0.0


class Velora(_Variant):
    """VeLoRA: the activations saved for the backward pass are compressed."""

    num_groups: Blocks = 1
    scale: AboveZero = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average_once"


class Monteclora(_Variant):
    """MonteCLoRA: weights are sampled from a mixture."""

    num_samples: Annotated[int, Field(ge=1, le=100)] = 1
    use_entropy: bool = False
    dirichlet_prior: AboveZero = 1.0
    sample_scaler: Finite = 0.0
    kl_loss_weight: Finite = 0.0
    buffer_size: Annotated[int, Field(ge=1, le=1_000)] = 1
