"""The flags of `qlora inspect-memory` that are no settings, as a request. Every problem is told at once."""

import importlib.util
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from qlora_cli.cli import options
from qlora_cli.cli.sweeps import read_sweeps
from qlora_cli.errors import (
    HardwareError,
    MissingDependencyError,
    OutputDirectoryError,
    Problem,
    QloraError,
    SettingsError,
    UsageError,
)
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.memory.request import MemoryRequest, Recipe
from qlora_cli.memory.solve import SETTINGS
from qlora_cli.settings.choices import Attention
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.sources import did_you_mean

SDPA_BACKENDS = ("auto", "flash", "efficient", "math")
PLOT_FORMATS = (".png", ".svg", ".pdf")
HAS_SDPA = (Attention.AUTO, Attention.SDPA)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What was typed for the flags that are no settings; `words` are the arguments after MODEL."""

    words: Sequence[str]
    gpus: Sequence[str]
    recipe: str
    sdpa_backend: str
    evaluate: bool | None
    solve: Sequence[str]
    sweep: Sequence[str]
    plot: Path | None


def read_request(context: typer.Context, given: Given) -> MemoryRequest:
    """Return what the command line asks.

    Raises:
        SettingsError: with every problem found, those of the settings among them.
        QloraError: no picture can be drawn, or written where it is to be.
    """
    problems = _misplaced(context, given)
    try:
        settings = options.resolve_settings(context, EstimateSettings).settings
    except SettingsError as error:
        problems += error.problems
        settings = None
    gpus = _find_gpus(given.gpus, problems)
    for flag, value, known in (
        ("--recipe", given.recipe, list(Recipe)),
        ("--sdpa-backend", given.sdpa_backend, SDPA_BACKENDS),
        *(("--solve", setting, SETTINGS) for setting in given.solve),
    ):
        problems += _not_one_of(flag, value, known)
    sweep, more = read_sweeps([*given.sweep, *given.words] if given.sweep else ())
    problems += more
    if given.solve and not given.gpus:
        hint = "Name one: --gpu 'RTX 4090', --gpu 24GiB, or --gpu auto for this machine's."
        problems.append(Problem(where="--solve", message="needs a GPU to fit on", hint=hint))
    if settings is not None:
        problems += _without_effect(settings, given)
    if problems:
        raise SettingsError(problems)
    assert settings is not None, "settings that can't be resolved are a problem"
    if given.plot is not None:
        if wrong := check_plot(given.plot):
            raise wrong
        sweep = {"max-length": (), **sweep}
    return MemoryRequest(
        settings=settings,
        gpus=gpus,
        recipe=Recipe(given.recipe),
        sdpa_backend=given.sdpa_backend,
        evaluates=_evaluates(settings) if given.evaluate is None else given.evaluate,
        solve=tuple(dict.fromkeys(given.solve)),
        sweep=sweep,
    )


def check_plot(path: Path) -> QloraError | None:
    """Return why no picture can be written to `path`."""
    if path.suffix.lower() not in PLOT_FORMATS:
        hint = f"Let its name end in {', '.join(PLOT_FORMATS[:-1])} or {PLOT_FORMATS[-1]}."
        return UsageError(f"--plot {path}: unknown kind of picture {path.suffix or path.name!r}", hint=hint)
    if path.is_dir():
        return OutputDirectoryError(f"--plot {path} is a directory", hint="Name a file.")
    folder = path.absolute().parent
    if not folder.is_dir():
        return OutputDirectoryError(f"--plot {path}: there is no directory {folder}", hint="Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        return OutputDirectoryError(f"--plot {path}: {folder} can't be written to", hint="Choose another directory.")
    if importlib.util.find_spec("matplotlib") is None:
        return MissingDependencyError(
            "--plot draws with matplotlib, which is not installed", hint="Run: pip install 'qlora-cli[plot]'"
        )
    return None


def _misplaced(context: typer.Context, given: Given) -> list[Problem]:
    """Return words where none belong, and a sweep in the place of MODEL."""
    problems = []
    model = str(context.params.get(options.parameter_of("model.name")) or "")
    if model.partition("=")[0] in SETTINGS:
        hint = "Put MODEL before --sweep, or quote all that is swept: --sweep 'rank=8,16 max-length=512..4096'."
        problems.append(Problem(where="MODEL", message=f"{model!r} is no model, but values to sweep", hint=hint))
    if given.words and not given.sweep:
        hint = "One MODEL is inspected at a time; values to vary follow --sweep."
        problems.append(Problem(where=given.words[0], message="is an argument too many", hint=hint))
    return problems


def _find_gpus(texts: Sequence[str], problems: list[Problem]) -> tuple[Gpu, ...]:
    found: dict[str, Gpu] = {}
    for text in texts:
        try:
            gpu = find_gpu(text)
        except (UsageError, HardwareError) as error:
            problems.append(Problem(where="--gpu", message=error.message, hint=error.hint))
        else:
            found[gpu.name] = gpu
    return tuple(found.values())


def _not_one_of(flag: str, value: str, known: Collection[str]) -> list[Problem]:
    if value in known:
        return []
    message = f"{value!r} is not one of {', '.join(known)}"
    return [Problem(where=flag, message=message, hint=did_you_mean(value, list(known)))]


def _without_effect(settings: EstimateSettings, given: Given) -> list[Problem]:
    attention = settings.model.attention
    if given.sdpa_backend == "auto" or attention in HAS_SDPA:
        return []
    message = f"has no effect with --attention {attention.value}"
    return [Problem(where="--sdpa-backend", message=message, hint="Leave it out, or use --attention sdpa.")]


def _evaluates(settings: EstimateSettings) -> bool:
    """Whether `train` would evaluate with these settings."""
    data = settings.data
    held_out = data.eval_dataset is not None or data.eval_split is not None
    return held_out or settings.training.eval_steps is not None
