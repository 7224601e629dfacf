"""Regular expressions of others, compiled and matched by a process that can be stopped. Imports no torch.

`re` goes through every way in which a pattern can be read: one of twenty characters can take longer on a name than
anyone waits, and a few sets of characters take seconds to compile. Nothing stops that from within.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

MOST_SECONDS = 3.0  # of processor time, for all patterns on all names; a common one takes thousandths of a second
WAITING_SECONDS = 30.0  # where processor time is short, or can't be limited
# Names, a choice between names, or what ends with one of them, as most patterns are: each compiles, whatever stands
# around it, and there is little to go through.
_LITERAL = r"(?:[\w. $-]|\\[.d-])*"
PLAIN = re.compile(rf"\^?(\.\*)?{_LITERAL}(\((?:[\w. |-]|\\[.d-])*\))?{_LITERAL}")
MOST_PLAIN_CHARACTERS = 300
TRIAL = """
import json, re, sys
asked = json.load(sys.stdin)
try:
    import resource, signal
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
except (ImportError, AttributeError, ValueError, OSError):
    pass
sys.setrecursionlimit(500)
for number, (pattern, function) in enumerate(asked["patterns"]):
    print(number, flush=True)
    try:
        match = getattr(re.compile(pattern), function)
        for name in asked["names"]:
            match(name)
    except RecursionError:
        print("nested too deeply")
        break
    except Exception as error:
        print(json.dumps(str(error) or type(error).__name__)[1:-1])
        break
else:
    print("done\\ndone")
"""


class TriedPattern(NamedTuple):
    """A pattern under a key of a config: as it is written there, what is made of it, and by which function of `re`."""

    key: str
    written: str
    matched: str
    function: Literal["match", "fullmatch"] = "match"


class Fault(NamedTuple):
    """A pattern that can't be used. `reason` is None if it takes too long."""

    pattern: TriedPattern
    reason: str | None


def find_fault(patterns: Iterable[TriedPattern], names: Iterable[str] = ()) -> Fault | None:
    """Return the first of `patterns` that does not compile, or is not matched with all `names` within seconds."""
    tried = [one for one in patterns if not _is_plain(one.written)]
    if not tried:
        return None
    found = _tried(tuple((one.matched, one.function) for one in tried), tuple(dict.fromkeys(names)), MOST_SECONDS)
    return None if found is None else Fault(pattern=tried[found[0]], reason=found[1])


def _is_plain(pattern: str) -> bool:
    return len(pattern) <= MOST_PLAIN_CHARACTERS and PLAIN.fullmatch(pattern) is not None


@lru_cache(maxsize=16)
def _tried(patterns: Sequence[tuple[str, str]], names: Sequence[str], seconds: float) -> tuple[int, str | None] | None:
    """Return the number of the first pattern that fails and why, which is None for too slow; None if all are fine."""
    asked = json.dumps({"patterns": patterns, "names": names, "seconds": seconds}).encode()
    command = [sys.executable, "-I", "-S", "-c", TRIAL]
    try:
        # This Python, with patterns and names as data.
        done = subprocess.run(command, input=asked, capture_output=True, timeout=WAITING_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        return _last_begun(error.stdout), None
    if hasattr(signal, "SIGPROF") and done.returncode == -signal.SIGPROF:
        return _last_begun(done.stdout), None
    if done.returncode:
        return _last_begun(done.stdout), "what tries it ends by it"
    number, reason = done.stdout.decode().splitlines()[-2:]
    return None if number == reason == "done" else (int(number), reason)


def _last_begun(output: bytes | None) -> int:
    begun = (output or b"").split()
    return int(begun[-1]) if begun else 0
