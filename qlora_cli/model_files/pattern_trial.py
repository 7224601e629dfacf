"""Try untrusted regular expressions in a process that can be killed. Imports no torch.

`re` backtracks: a pattern of twenty characters can match forever on a single name, and a few character sets take
seconds to compile. Neither can be interrupted from within the process.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

MOST_SECONDS = 3.0  # of CPU time, for all patterns on all names; an ordinary one takes milliseconds
WAITING_SECONDS = 30.0  # of wall time, where the CPU is busy or CPU time can't be limited
# Names, alternatives of names, or a suffix, as most patterns are: they compile, also inside the expressions that PEFT
# builds around them, and hardly backtrack.
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
    """A pattern under a key of a config: as it is written, the expression built from it, and the function of `re`."""

    key: str
    written: str
    matched: str
    function: Literal["match", "fullmatch"] = "match"


class Fault(NamedTuple):
    """A pattern that can't be used. `reason` is None if it takes too long."""

    pattern: TriedPattern
    reason: str | None


def find_fault(patterns: Iterable[TriedPattern], names: Iterable[str] = ()) -> Fault | None:
    """Return the first of `patterns` that does not compile, or can't be matched with all `names` within seconds."""
    risky = [one for one in patterns if not _is_plain(one.written)]
    if not risky:
        return None
    failure = _try(tuple((one.matched, one.function) for one in risky), tuple(dict.fromkeys(names)), MOST_SECONDS)
    return None if failure is None else Fault(pattern=risky[failure[0]], reason=failure[1])


def _is_plain(pattern: str) -> bool:
    return len(pattern) <= MOST_PLAIN_CHARACTERS and PLAIN.fullmatch(pattern) is not None


@lru_cache(maxsize=16)
def _try(patterns: Sequence[tuple[str, str]], names: Sequence[str], seconds: float) -> tuple[int, str | None] | None:
    """Return the index of the first pattern that fails and the reason, None if it is too slow; None if none fails."""
    request = json.dumps({"patterns": patterns, "names": names, "seconds": seconds}).encode()
    command = [sys.executable, "-I", "-S", "-c", TRIAL]
    try:
        # This Python, with patterns and names as data.
        done = subprocess.run(command, input=request, capture_output=True, timeout=WAITING_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        return _last_begun(error.stdout), None
    if hasattr(signal, "SIGPROF") and done.returncode == -signal.SIGPROF:
        return _last_begun(done.stdout), None
    if done.returncode:
        return _last_begun(done.stdout), "it crashes the process that tries it"
    number, reason = done.stdout.decode().splitlines()[-2:]
    return None if number == reason == "done" else (int(number), reason)


def _last_begun(output: bytes | None) -> int:
    begun = (output or b"").split()
    return int(begun[-1]) if begun else 0
