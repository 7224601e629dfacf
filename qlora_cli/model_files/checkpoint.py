"""Read what a checkpoint holds from the headers of its files: no weight is read, and torch is not imported.

A safetensors file is eight bytes with the length of its header, the header (JSON: dtype, shape and byte range
of each tensor), then the tensors without a gap. Checking that takes milliseconds, and finds what would otherwise
show up after minutes of loading, or not at all: a truncated download, a missing shard, an index of another model.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, TypeGuard

from safetensors import SafetensorError, safe_open

from qlora_cli.errors import ModelError
from qlora_cli.files import is_regular
from qlora_cli.model_files.file_limits import HEADER, limited_files, read_limited
from qlora_cli.units import format_bytes

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
MOST_DIMENSIONS, LARGEST_SIZE = 64, 2**63 - 1  # of a tensor in torch
SHOWN_CHARACTERS = 200
MOST_NAME_BYTES = 255  # of a file or a folder, on any common disk
# Names as the format writes them; F4 and F6 are packed.
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """A tensor as the header describes it: `dtype` as safetensors names it (BF16); its bytes begin at `offset`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The weight files of a model and their tensors; those of pickles are not known."""

    tensors: Mapping[str, TensorHeader]
    files: tuple[Path, ...]
    is_pickle: bool
    total_bytes: int


def read_checkpoint(directory: Path, *, allow_pickle: bool) -> Checkpoint:
    """Return the checkpoint in `directory`: its safetensors, or its pickles if there are none and pickles are allowed.

    Raises:
        ModelError: weights are missing, damaged, or disagree with their index; names file and tensor.
    """
    names = [path.name for path in directory.iterdir()]
    entry = weights_entry(names, allow_pickle=allow_pickle)
    if entry is None:
        raise no_weights(str(directory), names)
    return _read_pickles(directory / entry) if entry.startswith(PICKLE) else _read_safetensors(directory / entry)


def weights_entry(names: Collection[str], *, allow_pickle: bool) -> str | None:
    """Return the file that loading starts from, as transformers chooses it: a single file, else an index."""
    for stem in (SAFETENSORS, PICKLE) if allow_pickle else (SAFETENSORS,):
        for name in (stem, stem + INDEX_SUFFIX):
            if name in names:
                return name
    return None


def no_weights(where: str, names: Collection[str]) -> ModelError:
    """Return the error for a model among whose files, `names`, no weights can be read."""
    unlisted = sorted(name for name in names if name.endswith(".safetensors"))
    if shards := [name for name in unlisted if SHARD.fullmatch(name)]:
        index = SAFETENSORS + INDEX_SUFFIX
        return ModelError(
            f"{where} has {shards[0]}, but not {index}, which says what is in it",
            hint=how_to_restore(Path(where), index),
        )
    if unlisted:
        return ModelError(
            f"{where} has {unlisted[0]}, but neither {SAFETENSORS} nor {SAFETENSORS}{INDEX_SUFFIX}",
            hint="A model that transformers loads has one of the two; save it with save_pretrained().",
        )
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    listed = f"only {pickles[0]}, a pickle" if pickles else "none"
    hint = "Save the model with save_pretrained(), which writes safetensors."
    if pickles:
        hint += " A pickle can run any code; --allow-pickle reads it, if you trust its author."
    return ModelError(f"{where} has no *.safetensors weights (found {listed})", hint=hint)


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor by the index of a sharded checkpoint.

    Raises:
        ModelError: it is not an index, or names a file outside its directory.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map", hint=how_to_restore(index.parent, index.name))
    suffix = Path(index.name.removesuffix(INDEX_SUFFIX)).suffix
    for name, file in weight_map.items():
        claim = f"{index} says that the tensor {_shown(name)} is in {_shown(repr(file))}"
        if not isinstance(file, str) or not _is_inside(file):
            raise ModelError(
                f"{claim}, which is no file of that directory",
                hint="Don't load it: a model has no reason to point elsewhere.",
            )
        if max(len(part.encode("utf-8", "surrogatepass")) for part in file.split("/")) > MOST_NAME_BYTES:
            raise ModelError(
                f"{claim}, a longer name than a file can have (more than {MOST_NAME_BYTES} bytes)",
                hint=how_to_restore(index.parent, index.name),
            )
        if not file.endswith(suffix):
            raise ModelError(f"{claim}, which is no {suffix} file", hint=how_to_restore(index.parent, index.name))
    return weight_map


def check_for_transformers(directory: Path, *, allow_pickle: bool) -> None:
    """Check that an index has what transformers requires besides its weight_map: an object of metadata.

    Raises:
        ModelError: it has no such object.
    """
    entry = weights_entry([path.name for path in directory.iterdir()], allow_pickle=allow_pickle)
    if entry is None or not entry.endswith(INDEX_SUFFIX):
        return
    if not isinstance(read_json(directory / entry).get("metadata"), dict):
        raise ModelError(
            f"{directory / entry}: metadata is not an object, and transformers loads no index without one",
            hint=f'Write "metadata": {{}} into it, or download it again. {how_to_restore(directory, entry)}',
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model.

    Raises:
        ModelError: the file can't be read, is not JSON, or holds no object.
    """
    try:
        check_regular(path)
        value = json.loads(read_limited(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} can't be read as JSON: {error}", hint=how_to_restore(path.parent, path.name)
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object", hint=how_to_restore(path.parent, path.name))
    return value


def check_regular(path: Path) -> None:
    """Check that `path`, if it exists, is a regular file, which can be read to its end.

    Raises:
        ValueError: it is a dangling link, a directory or a pipe.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"it is a link to {path.readlink()}, which does not exist")
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")


def check_present(directory: Path, names: Collection[str]) -> None:
    """Check that the files `names` of `directory` can be read, and that its small files are within their limits.

    Raises:
        ModelError: one is a dangling link, a directory or a pipe, or exceeds the limits of its kind.
    """
    for name in names:
        try:
            check_regular(directory / name)
        except ValueError as error:
            raise ModelError(
                f"{directory / name} can't be read: {error}", hint=how_to_restore(directory, name)
            ) from error
    check_small_files(directory)


def check_small_files(directory: Path) -> None:
    """Check each file in `directory` that transformers or PEFT reads whole, before they read it.

    Raises:
        ModelError: one is larger, or holds more values, than its kind allows; names it and the limit.
    """
    for name in limited_files(directory):
        try:
            read_limited(directory / name)
        except OSError as error:
            raise ModelError(
                f"{directory / name} can't be read: {error.strerror}", hint="Check its permissions."
            ) from error
        except ValueError as error:
            raise ModelError(
                f"{directory / name} can't be read: {error}", hint=how_to_restore(directory, name)
            ) from error


def how_to_restore(directory: Path, file: str) -> str:
    """Return how to restore a file of a model; for a snapshot in the hub's cache, the exact command."""
    if directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--"):
        name = directory.parent.parent.name.removeprefix("models--").replace("--", "/")
        return f"Run: hf download {name} {file} --revision {directory.name} --force-download"
    return f"Copy {file} again from where the model came from, or save the model again with save_pretrained()."


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _is_inside(file: str) -> bool:
    windows = PureWindowsPath(file)
    return bool(file) and not (windows.is_absolute() or windows.drive or windows.root or ".." in windows.parts)


def _read_safetensors(entry: Path) -> Checkpoint:
    directory = entry.parent
    weight_map = read_weight_map(entry) if entry.suffix == ".json" else None
    shards = sorted(set(weight_map.values())) if weight_map else []
    if missing := [shard for shard in shards if not is_regular(directory / shard)]:
        raise _missing_shards(entry, missing, weight_map or {})
    tensors: dict[str, TensorHeader] = {}
    shards = shards or [entry.name]
    for shard in shards:
        for tensor in read_header(directory, shard):
            if other := tensors.get(tensor.name):
                raise ModelError(
                    f"{directory} holds the tensor {tensor.name} twice: in {other.file} and in {shard}",
                    hint=how_to_restore(directory, entry.name),
                )
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _check_index(entry, weight_map, tensors)
    return Checkpoint(
        tensors=tensors,
        files=tuple(directory / shard for shard in shards),
        is_pickle=False,
        total_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
    )


def _missing_shards(entry: Path, missing: list[str], weight_map: Mapping[str, str]) -> ModelError:
    first = missing[0]
    shown = _shown(first)
    tensor = next(name for name, file in weight_map.items() if file == first)
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return ModelError(
        f"{entry.parent} lacks {shown}{more}, which {entry.name} names (for {_shown(tensor)}, among others)",
        hint=how_to_restore(entry.parent, shown),
    )


def _check_index(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorHeader]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            where = f" (it is in {tensors[name].file})" if name in tensors else ""
            raise ModelError(
                f"{index} says that the tensor {name} is in {file}, but that file lacks it{where}",
                hint=how_to_restore(index.parent, file),
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise ModelError(
                f"{index.parent / tensor.file} holds the tensor {name}, which {index.name} omits",
                hint=how_to_restore(index.parent, index.name),
            )


def read_header(directory: Path, file: str) -> list[TensorHeader]:
    """Return the tensors of one safetensors file, in the order of their bytes.

    Raises:
        ModelError: the file is not a safetensors file, is truncated, or contradicts itself.
    """
    path = directory / file
    try:
        check_regular(path)
        with path.open("rb") as stream:
            header, start = _parse_header(stream, path.stat().st_size)
        tensors = _read_tensors(header, file)
        _check_extent(tensors, path.stat().st_size - start)
        _check_by_library(path)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}", hint="Check its permissions.") from error
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}", hint=how_to_restore(directory, file)) from error
    return [replace(tensor, offset=start + begin) for tensor, begin, _ in tensors]


def _check_by_library(path: Path) -> None:
    """Check by safetensors what is not checked here: JSON that only Python accepts, and later rules of the format."""
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(_shown(str(error).splitlines()[0])) from error


def _parse_header(stream: BinaryIO, file_bytes: int) -> tuple[dict[str, Any], int]:
    prefix = stream.read(8)
    if prefix.startswith(b"version "):
        raise ValueError("it is a git-lfs pointer, not the weights (git lfs pull fetches them)")
    if len(prefix) < 8:
        raise ValueError(f"it holds {file_bytes} bytes, too few for a header")
    num_bytes = int.from_bytes(prefix, "little")
    if num_bytes > HEADER.max_bytes or num_bytes < 2:
        raise ValueError("it does not begin with a safetensors header")
    if num_bytes > file_bytes - 8:
        raise ValueError(f"it is truncated in its header, at {format_bytes(file_bytes)}")
    content = stream.read(num_bytes)
    try:
        HEADER.check(content)
    except ValueError as error:
        raise ValueError(f"its header can't be read: {error}") from None
    try:
        header = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, 8 + num_bytes


def _read_tensors(header: Mapping[str, Any], file: str) -> list[tuple[TensorHeader, int, int]]:
    """Return each tensor with its byte range, in the order of the ranges."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not an object of strings")
    tensors = [_read_tensor(name, entry, file) for name, entry in header.items() if name != "__metadata__"]
    return sorted(tensors, key=lambda tensor: tensor[1:])


def _read_tensor(name: str, entry: object, file: str) -> tuple[TensorHeader, int, int]:
    shown = _shown(name)
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"the tensor {shown} has the unknown dtype {repr(dtype)[:SHOWN_CHARACTERS]}")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise ValueError(f"the tensor {shown} has no proper shape and byte range in the header")
    num_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if offsets[1] - offsets[0] != num_bytes:
        raise ValueError(
            f"the tensor {shown} is {dtype} of shape {tuple(shape)}, {num_bytes} bytes, but the header gives it "
            f"{offsets[1] - offsets[0]}"
        )
    tensor = TensorHeader(name=name, file=file, dtype=dtype, shape=tuple(shape), num_bytes=num_bytes)
    return tensor, offsets[0], offsets[1]


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """Return whether `value` is a list of whole numbers, few and small enough to be multiplied."""
    return (
        isinstance(value, list)
        and len(value) <= MOST_DIMENSIONS
        and all(type(part) is int and 0 <= part <= LARGEST_SIZE for part in value)
    )


def _check_extent(tensors: list[tuple[TensorHeader, int, int]], data_bytes: int) -> None:
    """Check that the tensors follow each other without gap or overlap, and that the file ends with the last."""
    end = 0
    for tensor, begin, stop in tensors:
        if begin != end:
            raise ValueError(f"the tensor {tensor.name} does not begin where the one before it ends")
        end = stop
    if data_bytes < end:
        incomplete = next(tensor.name for tensor, _, stop in tensors if stop > data_bytes)
        raise ValueError(
            f"it is truncated: it holds {format_bytes(data_bytes)} of {format_bytes(end)} of weights, and "
            f"{incomplete} is the first incomplete tensor"
        )
    if data_bytes > end:
        raise ValueError(f"{format_bytes(data_bytes - end)} follow its last tensor")


def _read_pickles(entry: Path) -> Checkpoint:
    shards = [entry.name]
    if entry.suffix == ".json":
        weight_map = read_weight_map(entry)
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if not is_regular(entry.parent / shard)]:
            raise _missing_shards(entry, missing, weight_map)
    files = tuple(entry.parent / shard for shard in shards)
    total_bytes = sum(path.stat().st_size for path in files)
    return Checkpoint(tensors={}, files=files, is_pickle=True, total_bytes=total_bytes)
