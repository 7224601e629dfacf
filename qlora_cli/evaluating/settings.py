"""What `qlora evaluate` takes. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from qlora_cli.settings.models import DataSettings, LoadSettings, TrainingSettings
from qlora_cli.settings.values import Datasets


class EvaluateDataSettings(DataSettings):
    """The rows, which a run that is named brings along."""

    dataset: Datasets | None = Field(  # type: ignore[assignment]
        default=None,
        description="Rows to evaluate on, named as training data is; may be repeated. Of a run: by default those that "
        "it held out.",
    )


class EvaluateSettings(LoadSettings):
    """What of `train` decides which tokens are evaluated, and how the model computes them."""

    data: EvaluateDataSettings = Field(default_factory=EvaluateDataSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What is to be evaluated, and how.

    Attributes:
        split: Of a hub data set that is named; test if not given.
        with_base: Whether the model is evaluated without its adapter too; None: if it has one.
        merged: The merged model to compare with; None: the one in the run directory, if there is one.
        batch_size: Rows in one forward pass.
        tasks: Names of lm-eval's tasks, patterns of them, or paths of YAML files.
        task_path: A directory with more tasks.
        limit: Documents of each task; all of them if None.
    """

    split: str | None = None
    with_base: bool | None = None
    merged: Path | None = None
    batch_size: int = 8
    tasks: tuple[str, ...] = ()
    task_path: Path | None = None
    limit: int | None = None
