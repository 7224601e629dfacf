"""What is to be merged, and how: the settings of `qlora merge`. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from qlora_cli.model_files.source import looks_local
from qlora_cli.runs.directory import MERGED, RunDirectory
from qlora_cli.settings.choices import BaseWeights, Device, ExportFormat, GgufType, MergeDtype
from qlora_cli.settings.models import OutputSettings


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """What `qlora merge` was asked for.

    Attributes:
        adapters: Runs, adapters, or hub ids of adapters.
        weights: How much each counts.
        output: Where the result goes; None to go by the adapter's name.
        base: What is merged into.
        base_model: Another directory or hub id of the base than the adapter names.
        revision: That of the first adapter, if it is on the hub.
        dtype: What the result is written in.
        formats: What is written.
        verify: Whether the result is compared with the base and the adapter beside it.
        max_divergence: The largest mean KL divergence, in nats a token, that rounding may make; None for no bound.
        device: Where models run to be compared. Merging itself is done on the CPU.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    output: Path | None = None
    base: BaseWeights = BaseWeights.AUTO
    base_model: str | None = None
    revision: str | None = None
    dtype: MergeDtype = MergeDtype.KEEP
    formats: tuple[ExportFormat, ...] = (ExportFormat.HF,)
    verify: bool = True
    max_divergence: float | None = None
    device: Device = Device.AUTO
    allow_pickle: bool = False
    trust_remote_code: bool = False
    push_to_hub: str | None = None
    hub_private: bool = True
    llama_cpp: Path | None = None
    gguf_type: GgufType = GgufType.AUTO


def output_of(request: MergeRequest) -> Path:
    """Return where the result goes: of a run into its directory, of an adapter into the working directory."""
    if request.output is not None:
        return request.output
    name = request.adapters[0]
    if looks_local(name):
        path = Path(name).expanduser()
        return RunDirectory(path).merged if RunDirectory(path).is_run else Path(f"{path.resolve().name}-merged")
    return Path(f"{name.rpartition('/')[2]}-merged")


def name_of(output: Path) -> str:
    """Return what a result in `output` is called, in its card and as a file: of `merged` in a run, as the run is."""
    path = output.expanduser().resolve()
    return f"{path.parent.name}-{path.name}" if path.name == MERGED else path.name


def pushed_to(request: MergeRequest) -> OutputSettings:
    """Return where the result is pushed to, if it is, as the settings of a run have it."""
    return OutputSettings(
        directory=output_of(request), push_to_hub=request.push_to_hub, hub_private=request.hub_private
    )
