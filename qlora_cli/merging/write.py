"""Write the tensors of a plan as safetensors, file by file, in the order of the base; unchanged ones byte by byte."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from io import RawIOBase
from pathlib import Path

import torch

from qlora_cli.events import BytesDone, Reporter
from qlora_cli.merging.merge_result import Action
from qlora_cli.merging.planning.merge_plan import MergePlan, PlannedTensor
from qlora_cli.merging.planning.stored_tensors import bytes_of, fill, not_finite
from qlora_cli.model_files.checkpoint import INDEX_SUFFIX, SAFETENSORS
from qlora_cli.model_files.finite import is_finite
from qlora_cli.model_files.pickles import NAMES

HEADER_ALIGNMENT = 8  # of the format; padded with spaces
# Written or copied at a time. Measured on ext4: writes of 50 MB take Linux four times as long as those of 1 MiB.
PIECE_BYTES = 1024**2

Value = Callable[[PlannedTensor], torch.Tensor]


def write_weights(plan: MergePlan, base: Path, target: Path, value: Value, reporter: Reporter) -> None:
    """Write the weights of `plan` to the directory `target`, with an index if they are in several files.

    `value` computes the tensors that are not copied from `base`. While one tensor is written, the next is computed and
    the one after it is read.

    Raises:
        ModelError: a tensor would hold NaN or infinity.
    """
    progress = _WriteProgress(plan.num_bytes, reporter)
    with ThreadPoolExecutor(max_workers=1) as reader, ThreadPoolExecutor(max_workers=1) as writer:
        for file, tensors in plan.files.items():
            (target / file).parent.mkdir(parents=True, exist_ok=True)  # an index may name folders
            with (target / file).open("wb", buffering=0) as stream:
                _write_header(stream, base / tensors[0].header.file, tensors)
                _write_tensors(tensors, base, stream, value, reader, writer, progress)
    if list(plan.files) != [SAFETENSORS]:
        _write_index(plan, target)


def _write_tensors(
    tensors: Sequence[PlannedTensor],
    base: Path,
    stream: RawIOBase,
    value: Value,
    reader: Executor,
    writer: Executor,
    progress: "_WriteProgress",
) -> None:
    """Write tensors in order; two values are in memory: one being written, and the next."""
    waiting: Future[None] | None = None
    try:
        for planned, following in zip(tensors, [*tensors[1:], None], strict=True):
            if following is not None:
                reader.submit(_read_ahead, base / following.header.file, following)
            if planned.action == Action.COPY:
                job = partial(_copy, base / planned.header.file, planned, stream)
            else:
                job = partial(_write, bytes_of(value(planned).contiguous()), stream)
            if waiting is not None:
                waiting.result()
            waiting = writer.submit(job)
            progress.add(planned.num_bytes)
    finally:
        if waiting is not None:
            waiting.result()


def _read_ahead(file: Path, planned: PlannedTensor) -> None:
    """Read a tensor and discard it, so that it is in the page cache when it is needed."""
    if not file.is_file():  # the base is a pickle
        return
    buffer = bytearray(min(planned.header.num_bytes, PIECE_BYTES))
    with file.open("rb", buffering=0) as source:
        source.seek(planned.header.offset)
        for _ in range(0, planned.header.num_bytes, PIECE_BYTES):
            source.readinto(buffer)


def _write(content: memoryview, stream: RawIOBase) -> None:
    while len(content):
        content = content[stream.write(content[:PIECE_BYTES]) or 0 :]


class _WriteProgress:
    def __init__(self, total_bytes: int, reporter: Reporter) -> None:
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._reporter = reporter

    def add(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        self._reporter.report(BytesDone(kind="merge", done_bytes=self._done_bytes, total_bytes=self._total_bytes))


def _write_header(stream: RawIOBase, base_file: Path, tensors: Sequence[PlannedTensor]) -> None:
    """Write the header of a file: that of the base, byte for byte, if no tensor moves."""
    entries = dict(_entries(tensors))
    stored = _stored_header(base_file) if base_file.is_file() else b"{}"  # no such file if the base is a pickle
    content = json.loads(stored)
    metadata = content.pop("__metadata__", None) or {"format": "pt"}
    if content != entries:
        stored = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
        stored += b" " * (-len(stored) % HEADER_ALIGNMENT)
    _write(memoryview(len(stored).to_bytes(8, "little") + stored), stream)


def _entries(tensors: Sequence[PlannedTensor]) -> Iterator[tuple[str, dict[str, object]]]:
    end = 0
    for planned in tensors:
        begin, end = end, end + planned.num_bytes
        dtype = planned.header.dtype if planned.action == Action.COPY else NAMES[planned.dtype]
        yield planned.name, {"dtype": dtype, "shape": list(planned.shape), "data_offsets": [begin, end]}


def _stored_header(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))


def _copy(file: Path, planned: PlannedTensor, stream: RawIOBase) -> None:
    """Copy the bytes of a tensor; weights of the model are checked at the same time.

    Raises:
        ModelError: it holds NaN or infinity.
    """
    checks = planned.is_weight and planned.dtype.is_floating_point
    buffer = memoryview(bytearray(min(planned.num_bytes, PIECE_BYTES)))
    with file.open("rb", buffering=0) as source:
        source.seek(planned.header.offset)
        left = planned.num_bytes
        while left:
            piece = buffer[: min(left, PIECE_BYTES)]
            fill(source, piece)
            if checks and not is_finite(torch.frombuffer(piece, dtype=planned.dtype)):
                raise not_finite(planned.header)
            _write(piece, stream)
            left -= len(piece)


def _write_index(plan: MergePlan, target: Path) -> None:
    content = {
        "metadata": {"total_size": plan.num_bytes},
        "weight_map": {tensor.name: tensor.file for tensor in sorted(plan.tensors, key=lambda one: one.name)},
    }
    (target / f"{SAFETENSORS}{INDEX_SUFFIX}").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
