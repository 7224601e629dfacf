"""A target of fuzzing, and one round of it.

A round makes an input from its seed and reads it. Reading may succeed, or fail with an error of ours (`QloraError`);
any other exception, more than `MOST_SECONDS` or `MOST_BYTES` is a finding, which target and seed reproduce.
"""

import faulthandler
import resource
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_cli.errors import QloraError
from qlora_cli.units import GIB, format_bytes

MOST_SECONDS = 5.0
HANGS_AFTER = 6 * MOST_SECONDS  # a round that takes this long ends the process, with its traceback
MOST_BYTES = GIB  # more than the process had before
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
EDGES = (0, 1, 127, 128, 254, 255)
MOST_CHANGES = 4

Generator = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that reads foreign input.

    Attributes:
        name: The name that the script takes.
        prepare: Makes what all rounds share, in an empty directory, and returns the function that plays one round.
        num_rounds: The number of rounds in the tests: those in which rounds still reached lines of the package that
            none before had reached, or those of five seconds where they did so to the end.
    """

    name: str
    prepare: Callable[[Path], Callable[[Generator], None]]
    num_rounds: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a round: whether the input was refused, and the finding, if there is one."""

    is_refused: bool
    finding: str | None


def play(target: Target, play_round: Callable[[Generator], None], seed: int) -> Outcome:
    """Return the outcome of round `seed` of `target`."""
    before, begin, is_refused = _peak_bytes(), time.monotonic(), False
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    try:
        play_round(np.random.default_rng([zlib.crc32(target.name.encode()), seed]))
    except QloraError:
        is_refused = True
    except Exception:  # noqa: BLE001 - any other exception is a finding
        return Outcome(is_refused=False, finding=traceback.format_exc(limit=-12))
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds, grown = time.monotonic() - begin, _peak_bytes() - before
    if seconds > MOST_SECONDS:
        return Outcome(is_refused=is_refused, finding=f"it took {seconds:.1f} s")
    if grown > MOST_BYTES:
        return Outcome(is_refused=is_refused, finding=f"it took {format_bytes(grown)}")
    return Outcome(is_refused=is_refused, finding=None)


def damage(content: bytes, chance: Generator) -> bytes:
    """Return `content` with a few bytes changed, and sometimes truncated or with a part duplicated."""
    changed = bytearray(content)
    for index in chance.integers(len(changed), size=chance.integers(1, MOST_CHANGES + 1)):
        changed[index] = chance.choice(EDGES) if chance.random() < 0.5 else chance.integers(256)
    if chance.random() < 0.1:
        del changed[chance.integers(len(changed)) :]
    elif chance.random() < 0.1:
        begin, end = sorted(chance.integers(len(changed), size=2))
        changed[begin:begin] = changed[begin:end]
    return bytes(changed)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
