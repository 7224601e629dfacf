"""Check before a weight is read whether a model fits in memory; if not, find the smallest change that makes it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from qlora_cli.errors import OutOfMemoryError, QloraError
from qlora_cli.quantization.embedding import is_tied
from qlora_cli.quantization.storage_plan import StoragePlan, plan_layout
from qlora_cli.settings.choices import quant_flag
from qlora_cli.settings.display import flags_of
from qlora_cli.settings.models import QuantizationSettings
from qlora_cli.settings.settle import with_values
from qlora_cli.units import format_bytes

OFFLOAD, OFFLOAD_BASE = "--offload-embedding", "--offload-base"
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CgroupFiles:
    """The files of a control group: its limit, its use, and statistics with the page cache that can be dropped."""

    most: Path
    used: Path
    statistics: Path
    droppable: str


CGROUP_FILES = (  # of version 2 and of version 1
    CgroupFiles(CGROUPS / "memory.max", CGROUPS / "memory.current", CGROUPS / "memory.stat", "inactive_file"),
    CgroupFiles(
        CGROUPS / "memory" / "memory.limit_in_bytes",
        CGROUPS / "memory" / "memory.usage_in_bytes",
        CGROUPS / "memory" / "memory.stat",
        "total_inactive_file",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The number of processes that hold a part of a model each, and whether these are on the host."""

    number: int = 1
    on_host: bool = False


WHOLE = Shards()


@dataclass(frozen=True, kw_only=True)
class SettingChange:
    """A change of flags, and the bytes needed with it."""

    flags: str
    needed_bytes: int


def free_bytes(device: torch.device) -> int:
    """Return the free memory of `device`; on the host, the memory available without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_cgroup_headrooms()])


def _cgroup_headrooms() -> list[int]:
    """Return what the limits of this process's control groups leave, as in a container; none without limits."""
    headrooms = []
    for files in CGROUP_FILES:
        try:
            most = files.most.read_text(encoding="ascii").strip()
            if most.isdigit():  # `max` is no limit
                statistics = dict(line.split() for line in files.statistics.read_text(encoding="ascii").splitlines())
                used = int(files.used.read_text(encoding="ascii")) - int(statistics.get(files.droppable, 0))
                headrooms.append(max(0, int(most) - used))
        except OSError:  # another version of control groups, or none
            continue
    return headrooms


def needed_bytes(
    layout: StoragePlan,
    *,
    offload_embedding: bool = False,
    grows: bool = False,
    shards: Shards = WHOLE,
) -> int:
    """Return the peak of loading: the model, or one of its shards, and one weight before it is quantized.

    If the embedding `grows`, that is, gets new rows, it is in memory twice for a moment. Of shards on the host, only
    the constants are on the device.
    """
    embedding, inventory = _embedding_bytes(layout), layout.inventory
    constants = sum(entry.constant_bytes for entry in inventory.entries)
    held = constants if shards.on_host else inventory.total_bytes // shards.number
    return held + max(layout.transient_bytes, embedding if grows else 0) - (embedding if offload_embedding else 0)


def check_fit(
    name: str,
    model: PreTrainedModel,
    layout: StoragePlan,
    device: torch.device,
    free: int,
    *,
    offload_embedding: bool,
    grows: bool = False,
    shards: Shards = WHOLE,
) -> None:
    """Check that `model`, which is on the meta device, or one of its `shards`, fits into `free` bytes on `device`.

    `grows` says whether the embedding gets new rows.

    Raises:
        OutOfMemoryError: it does not; gives both sizes and the smallest change that fits.
    """
    needed = needed_bytes(layout, offload_embedding=offload_embedding, grows=grows, shards=shards)
    if needed <= free:
        return
    changes = list(_changes(model, layout, device, offload_embedding=offload_embedding, shards=shards))
    fitting = [change for change in changes if change.needed_bytes <= free]
    if fitting:
        hint = f"{fitting[0].flags} would fit: {format_bytes(fitting[0].needed_bytes)}."
    else:
        least = min((change.needed_bytes for change in changes), default=needed)
        hint = f"It fits in no format: the smallest takes {format_bytes(min(least, needed))}. Use a smaller model"
        hint += " or a device with more memory." if device.type == "cuda" else " or a machine with more memory."
    raise OutOfMemoryError(
        f"{name} needs {format_bytes(needed)} on {device}, and {format_bytes(free)} are free", hint=hint
    )


def check_host_fit(name: str, layout: StoragePlan, shards: Shards, num_processes: int, free: int) -> None:
    """Check that the `shards` of `num_processes`, which are on one host, fit into its `free` bytes.

    What PyTorch adds where it pins memory is not counted, nor what the processes take besides.

    Raises:
        OutOfMemoryError: they do not; gives both sizes.
    """
    weight_bytes = sum(entry.weight_bytes for entry in layout.inventory.entries)
    needed = num_processes * weight_bytes // shards.number
    if needed > free:
        raise OutOfMemoryError(
            f"{name} needs at least {format_bytes(needed)} of host memory for its shards, {num_processes} of "
            f"{shards.number}, and {format_bytes(free)} are free",
            hint=f"Leave {OFFLOAD_BASE} out, share the base among machines, or use one with more memory.",
        )


def _changes(
    model: PreTrainedModel,
    layout: StoragePlan,
    device: torch.device,
    *,
    offload_embedding: bool,
    shards: Shards,
) -> Iterator[SettingChange]:
    """Yield possible changes, those that change the model least first."""
    is_sharded, on_gpu = shards != WHOLE, device.type == "cuda"
    can_offload = on_gpu and not is_sharded and not offload_embedding and not is_tied(model)
    if is_sharded and on_gpu and not shards.on_host:
        on_host = replace(shards, on_host=True)
        yield SettingChange(flags=OFFLOAD_BASE, needed_bytes=needed_bytes(layout, shards=on_host))
    if can_offload:
        yield SettingChange(flags=OFFLOAD, needed_bytes=needed_bytes(layout, offload_embedding=True))
    if layout.prequantized is not None:
        return
    for flags, settings in _smaller(layout).items():
        try:
            variant = plan_layout(model, settings, layout.dtype, device=device)
        except QloraError:  # a format that this model can't be stored in is not proposed
            continue
        num_bytes = needed_bytes(variant, offload_embedding=offload_embedding, shards=shards)
        yield SettingChange(flags=flags, needed_bytes=num_bytes)
        if can_offload:
            yield SettingChange(flags=f"{flags} {OFFLOAD}", needed_bytes=needed_bytes(variant, offload_embedding=True))


def _smaller(layout: StoragePlan) -> dict[str, QuantizationSettings]:
    """Return settings that need less memory than those of `layout`, by the flags that set them."""
    settings = layout.settings
    same_method = {
        flags_of({f"quantization.{saving.key}": saving.value}): with_values(settings, **{saving.key: saving.value})
        for saving in layout.method.savings(settings)
    }
    fewer_bits = {
        quant_flag([method]): QuantizationSettings(method=method, skip_modules=settings.skip_modules)
        for method in settings.method.smaller()
    }
    return {**same_method, **fewer_bits}


def fits_unquantized(layout: StoragePlan, free: int) -> bool:
    """Return whether the unquantized model would take at most half of `free`: the rest is for training an adapter.

    Return False for a model that is not quantized, and for a prequantized one.
    """
    if not layout.settings.method.is_quantized or layout.prequantized is not None:
        return False
    return 2 * layout.inventory.num_parameters * layout.dtype.itemsize <= free


def _embedding_bytes(layout: StoragePlan) -> int:
    return sum(entry.weight_bytes for entry in layout.inventory.entries if entry.kind == "embedding")
