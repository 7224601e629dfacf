"""Parse the flags of `qlora inspect-memory` into a request. All problems are reported at once."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from qlora_cli.cli import options
from qlora_cli.cli.parsing.sweep_values import read_sweeps
from qlora_cli.errors import (
    HardwareError,
    OutputDirectoryError,
    Problem,
    QloraError,
    SettingsError,
    UsageError,
)
from qlora_cli.memory.costs.step_time import rates_on
from qlora_cli.memory.fitting.solver import SETTINGS
from qlora_cli.memory.gpus import Gpu, find_gpu, one_of_several, within_budget
from qlora_cli.memory.request import MemoryRequest
from qlora_cli.settings.choices import Attention, CardOrder, Checkpointing, Quantization, SdpaBackend, Solvable
from qlora_cli.settings.display import flag_of
from qlora_cli.settings.models import InspectMemoryOfDataSettings, InspectMemorySettings, metadata_of
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.sections.inspect_memory import Link
from qlora_cli.settings.setting_metadata import Command
from qlora_cli.settings.settle import InferredSettings, settle
from qlora_cli.units import counted

PLOT_FORMATS = (".png", ".svg", ".pdf")
DATASET = "data.dataset"
PRICE = "inspect_memory.price"
GPUS, NUM_GPUS = "inspect_memory.gpus", "training.num_gpus"
OF_RUN = ("training.epochs", PRICE)
ON_COMMAND_LINE = ("flag", "set")
HAS_SDPA = (Attention.AUTO, Attention.SDPA)


def read_request(context: typer.Context, words: Sequence[str]) -> tuple[MemoryRequest, Path | None]:
    """Return the request, and the path of the plot; `words` are the arguments after MODEL.

    Raises:
        SettingsError: with every problem found, including those of the settings.
        QloraError: the plot can't be drawn, or not be written to its path.
    """
    try:
        resolved = options.resolve_settings(context, InspectMemorySettings)
        if reads_data(resolved):
            resolved = options.resolve_settings(context, InspectMemoryOfDataSettings)
    except SettingsError as error:  # the flags about the prediction are parsed all the same
        given = {key: context.params.get(options.parameter_of(f"inspect_memory.{key}")) for key in ("gpus", "sweep")}
        read = _ReadFlags.of(given["gpus"] or (), given["sweep"] or (), words, flag_of)
        raise SettingsError([*_misplaced(context, words, given["sweep"]), *error.problems, *read.problems]) from None
    resolved, several = with_number_of_gpus(resolved)
    asked, budget_bytes = resolved.settings.inspect_memory, resolved.settings.training.memory_budget
    read = _ReadFlags.of(asked.gpus, asked.sweep, words, resolved.where_of)
    problems = [*_misplaced(context, words, asked.sweep), *several, *read.problems, *_without_effect(resolved)]
    if any(gpu.is_host for gpu in read.gpus):
        problems += _not_on_host(resolved)
    if problems := [*problems, *_about_run(resolved)]:
        raise SettingsError(problems)
    if asked.plot is not None and (wrong := check_plot(asked.plot)):
        raise wrong.for_setting("inspect_memory.plot")
    if asked.write_lock is not None and (wrong := check_writable(asked.write_lock)):
        raise wrong.for_setting("inspect_memory.write_lock")
    prices, wrong_prices = _read_prices(resolved)
    if wrong_prices:
        raise SettingsError(wrong_prices)
    sweep = read.sweep if asked.plot is None else {"max-length": (), **read.sweep}
    gpus = tuple(within_budget(gpu, budget_bytes) for gpu in read.gpus)
    request = MemoryRequest(asked=resolved, gpus=gpus, sweep=sweep, prices=prices)
    if problems := list(_unranked(request)):
        raise SettingsError(problems)
    return request, asked.plot


@dataclass(frozen=True, kw_only=True)
class _ReadFlags:
    """The parsed GPUs and values to sweep, and the problems with them."""

    gpus: tuple[Gpu, ...]
    sweep: dict[str, tuple[int, ...]]
    problems: list[Problem]

    @classmethod
    def of(
        cls, gpus: Sequence[str], sweep: Sequence[str], words: Sequence[str], where_of: Callable[[str], str]
    ) -> "_ReadFlags":
        """Parse the flags; `where_of` says where a setting was given."""
        problems: list[Problem] = []
        named_gpus = _find_gpus(gpus, where_of("inspect_memory.gpus"), problems)
        values, more = read_sweeps([*sweep, *words] if sweep else (), where_of("inspect_memory.sweep"))
        return cls(gpus=named_gpus, sweep=values, problems=problems + more)


def with_number_of_gpus(
    resolved: Resolved[InspectMemorySettings],
) -> tuple[Resolved[InspectMemorySettings], list[Problem]]:
    """Return the settings with the number of a `--gpu` such as `2x24GB` as that of the GPUs of the run.

    The problems are those of a number that contradicts another one.
    """
    named = [(text, one_of_several(text)) for text in resolved.settings.inspect_memory.gpus]
    if all(several is None for _, several in named):
        return resolved, []
    numbers = {1 if several is None else several[0] for _, several in named}
    given = {resolved.settings.training.num_gpus} if resolved.is_given(NUM_GPUS) else set()
    if len(numbers | given) > 1:
        hint = "Ask for each number of GPUs by itself."
        message = "a run is on one number of GPUs, and several are named"
        return resolved, [Problem(where=resolved.where_of(GPUS), message=message, hint=hint)]
    (number,) = numbers
    cards = tuple(text if several is None else several[1] for text, several in named)
    values: dict[str, object] = {NUM_GPUS: number, GPUS: cards}
    origin = resolved.origin_of(GPUS)
    settled = settle(resolved, [InferredSettings(values=values, origin=origin, is_fixed=True)])
    rows = settled.settings.training.rows_per_step
    if number > rows:
        hint = "Use fewer, or more rows a step."
        message = f"{number} GPUs would share the {counted(rows, 'row')} of a step, so that some have none"
        return settled, [Problem(where=resolved.where_of(GPUS), message=message, hint=hint)]
    return settled, []


def check_plot(path: Path) -> QloraError | None:
    """Return why no plot can be written to `path`."""
    if path.suffix.lower() not in PLOT_FORMATS:
        hint = f"Let its name end in {', '.join(PLOT_FORMATS[:-1])} or {PLOT_FORMATS[-1]}."
        return UsageError(f"{path}: unknown kind of picture {path.suffix or path.name!r}", hint=hint)
    return check_writable(path)


def check_writable(path: Path) -> QloraError | None:
    """Return why no file can be written to `path`."""
    if path.is_dir():
        return OutputDirectoryError(f"{path} is a directory", hint="Name a file.")
    folder = path.absolute().parent
    if not folder.is_dir():
        return OutputDirectoryError(f"{path}: there is no directory {folder}", hint="Make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        return OutputDirectoryError(f"{path}: {folder} can't be written to", hint="Choose another directory.")
    return None


def _misplaced(context: typer.Context, words: Sequence[str], sweep: Sequence[str] | None) -> list[Problem]:
    """Return the problems of arguments without a sweep, and of a sweep in the position of MODEL."""
    problems = []
    model = str(context.params.get(options.parameter_of("model.name")) or "")
    if model.partition("=")[0] in SETTINGS:
        hint = "Put MODEL before --sweep, or quote all that is swept: --sweep 'rank=8,16 max-length=512..4096'."
        problems.append(Problem(where="MODEL", message=f"{model!r} is no model, but values to sweep", hint=hint))
    if words and not sweep:
        hint = "One MODEL is inspected at a time; values to vary follow --sweep."
        problems.append(Problem(where=words[0], message="is an argument too many", hint=hint))
    return problems


def _find_gpus(texts: Sequence[str], where: str, problems: list[Problem]) -> tuple[Gpu, ...]:
    by_name: dict[str, Gpu] = {}
    for text in texts:
        try:
            gpu = _find_device(text)
        except (UsageError, HardwareError) as error:
            problems.append(Problem(where=where, message=error.message, hint=error.hint))
        else:
            by_name[gpu.name] = gpu
    if len(by_name) > 1 and any(gpu.is_host for gpu in by_name.values()):
        hint = "Ask for the CPU alone: --gpu cpu."
        problems.append(Problem(where=where, message="a CPU is not compared with GPUs", hint=hint))
    return tuple(by_name.values())


def _find_device(text: str) -> Gpu:
    """Return the GPU that `text` names; for `auto` on a machine without one, its CPU, on which `train` would run."""
    try:
        return find_gpu(text)
    except HardwareError:
        return find_gpu("cpu")


def _without_effect(resolved: Resolved[InspectMemorySettings]) -> Iterator[Problem]:
    attention, asked = resolved.settings.model.attention, resolved.settings.inspect_memory
    if resolved.settings.quantization.method == Quantization.AUTO and not asked.gpus:
        hint = "Name one: --gpu 'RTX 4090', --gpu 24GB, or --gpu auto for this machine's."
        message = "auto chooses by the memory of a GPU, and none is named"
        yield Problem(where=resolved.where_of("quantization.method"), message=message, hint=hint)
    training = resolved.settings.training
    if training.memory_budget is not None and not asked.gpus:
        hint = "Name one: --gpu 'RTX 4090', --gpu 24GB, or --gpu auto for this machine's."
        message = "is what a run may take of a GPU, and none is named"
        yield Problem(where=resolved.where_of("training.memory_budget"), message=message, hint=hint)
    if training.shards_base and training.num_gpus == 1:
        hint = "Name several, as in --gpu 2x24GB, or give --num-gpus."
        where = resolved.where_of(training.sharding_setting)
        yield Problem(where=where, message="one GPU holds all of the base", hint=hint)
    if asked.link != Link.PCIE and training.num_gpus == 1 and Solvable.GPU not in asked.solve:
        hint = "Name several GPUs, as in --gpu 2x24GB, or leave it out."
        yield Problem(where=resolved.where_of("inspect_memory.link"), message="one GPU sends nothing", hint=hint)
    if set(asked.solve) - {Solvable.GPU} and not asked.gpus:
        hint = "Name one: --gpu 'RTX 4090', --gpu 24GB, or --gpu auto for this machine's."
        yield Problem(where=resolved.where_of("inspect_memory.solve"), message="needs a GPU to fit on", hint=hint)
    if asked.sdpa_backend is not SdpaBackend.AUTO and attention not in HAS_SDPA:
        where, message = (
            resolved.where_of("inspect_memory.sdpa_backend"),
            f"has no effect with --attention {attention}",
        )
        yield Problem(where=where, message=message, hint="Leave it out, or use --attention sdpa.")


def _not_on_host(resolved: Resolved[InspectMemorySettings]) -> Iterator[Problem]:
    """Yield the problems with settings that need a GPU, and with questions about GPUs, for a run on the CPU."""
    training, where_of = resolved.settings.training, resolved.where_of
    if training.optimizer.is_paged:
        message = f"{training.optimizer.value} pages its state out of GPU memory and there is no GPU"
        hint = "Use --optimizer adamw_torch or adamw_8bit."
        yield Problem(where=where_of("training.optimizer"), message=message, hint=hint)
    if training.gradient_checkpointing == Checkpointing.OFFLOAD:
        message = "offload keeps activations in host memory, where they are without a GPU"
        hint = "Use --gradient-checkpointing on."
        yield Problem(where=where_of("training.gradient_checkpointing"), message=message, hint=hint)
    if Solvable.GPU in resolved.settings.inspect_memory.solve:
        message = "gpu ranks GPUs, and a CPU is named"
        hint = "Leave --gpu out, or name cards."
        yield Problem(where=where_of("inspect_memory.solve"), message=message, hint=hint)


def _read_prices(resolved: Resolved[InspectMemorySettings]) -> tuple[dict[str, float], list[Problem]]:
    path = resolved.settings.inspect_memory.prices
    if path is None:
        return {}, []
    from qlora_cli.cli.parsing.price_list import read_prices

    return read_prices(path, resolved.where_of("inspect_memory.prices"))


def _unranked(request: MemoryRequest) -> Iterator[Problem]:
    """Yield the problems with what is asked about the best cards."""
    asked, where_of = request.prediction, request.asked.where_of
    if Solvable.GPU not in asked.solve:
        for key in ("by", "prices"):
            if getattr(asked, key) is not None:
                where, hint = where_of(f"inspect_memory.{key}"), "Add --solve gpu, or leave it out."
                yield Problem(where=where, message="has no effect without --solve gpu", hint=hint)
        return
    if asked.rows is None and not reads_data(request.asked):
        where, hint = where_of("inspect_memory.solve"), "Name the training data with --dataset, or give --rows N."
        yield Problem(where=where, message="gpu compares whole runs, and needs --rows or --dataset", hint=hint)
    unknown = [gpu.name for gpu in request.gpus if rates_on(gpu) is None]
    if unknown:
        where, hint = where_of("inspect_memory.gpus"), "Name cards of the catalogue."
        message = f"the speed of {', '.join(unknown)} is not known, by which --solve gpu ranks"
        yield Problem(where=where, message=message, hint=hint)
    lacking = [gpu.name for gpu in request.gpus if gpu.name not in {*request.prices, *unknown}]
    if request.card_order == CardOrder.COST and not request.prices:
        where, hint = where_of("inspect_memory.by"), "Give --prices FILE, with a line for each card: RTX 4090: 0.40"
        yield Problem(where=where, message="cost needs the prices of cards", hint=hint)
    elif request.card_order == CardOrder.COST and lacking:
        where, hint = where_of("inspect_memory.prices"), "Add them, or leave these cards out of --gpu."
        yield Problem(where=where, message=f"has no price for {', '.join(lacking)}", hint=hint)


def reads_data(resolved: Resolved[InspectMemorySettings]) -> bool:
    """Return whether data is to be read: it was named on the command line, not only in a settings file of `train`."""
    return resolved.origin_of(DATASET).kind in ON_COMMAND_LINE


def _about_run(resolved: Resolved[InspectMemorySettings]) -> Iterator[Problem]:
    """Yield the problems with what is asked about a whole run: its data, or the number of its rows."""
    if reads_data(resolved):
        from qlora_cli.cli.commands.predicted_data import dataset_problems  # not needed for the memory alone

        if resolved.settings.inspect_memory.rows is not None:
            message = "has no effect with --dataset, whose rows are counted"
            yield Problem(
                where=resolved.where_of("inspect_memory.rows"), message=message, hint="Leave one of them out."
            )
        yield from dataset_problems(resolved)
        return
    needing = dict.fromkeys(_flags_about_data(), "--dataset")
    if resolved.settings.inspect_memory.rows is None:
        needing |= dict.fromkeys(OF_RUN, "--rows or --dataset")
    for path, needed in needing.items():
        is_asked = path == PRICE or resolved.origin_of(path).kind in ON_COMMAND_LINE
        if is_asked and resolved.is_given(path):
            hint = "Name the training data with --dataset" + (", or give --rows N." if "rows" in needed else ".")
            yield Problem(where=resolved.where_of(path), message=f"has no effect without {needed}", hint=hint)


def _flags_about_data() -> list[str]:
    """Return the settings of the running command that decide which rows are fed, and not the memory of one."""
    paths = [path for path, _ in options.settings_of(Command.INSPECT_MEMORY)]
    return [
        path
        for path in paths
        if path.partition(".")[0] != "inspect_memory"
        and path != "training.epochs"
        and not metadata_of(path).affects_memory
    ]
