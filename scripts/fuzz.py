"""Feed damaged and random files to the code that reads foreign ones, for minutes, each target in its own process.

scripts/fuzz.py --minutes 5 arrow chat      # without names, all targets
scripts/fuzz.py --seed 1234 --rounds 1 arrow  # reproduce one finding
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.fuzzing.frame import play  # noqa: E402
from tests.fuzzing.targets import TARGETS  # noqa: E402


def main() -> int:
    """Run the requested targets; return 1 if one has a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="all of them by default")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=None, help="of the first round; by default, of the clock")
    parser.add_argument("--rounds", type=int, default=None, help="at most so many of each target")
    parser.add_argument("--here", action="store_true", help="in this process, for a debugger")
    asked = parser.parse_args()
    names = asked.targets or list(TARGETS)
    seed = int(time.time()) * 1000 if asked.seed is None else asked.seed
    seconds = 60 * asked.minutes / len(names)
    if asked.here:
        return max(fuzz(name, seed, seconds, asked.rounds) for name in names)
    return max(_in_own_process(name, seed, seconds, asked.rounds) for name in names)


def fuzz(name: str, seed: int, seconds: float, most_rounds: int | None) -> int:
    """Play rounds of a target until the time is over, and print findings; return 1 if there are any."""
    target, counts, begin = TARGETS[name], Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        play_round = target.prepare(Path(directory))
        while time.monotonic() - begin < seconds and counts["rounds"] != most_rounds:
            # Before the round: it may be the last thing that this process prints.
            print(f"\r{name} --seed {seed + counts['rounds']}", end="", flush=True)
            outcome = play(target, play_round, seed + counts["rounds"])
            if outcome.finding:
                print(f": {outcome.finding}", flush=True)
            counts.update(rounds=1, refused=outcome.is_refused, findings=outcome.finding is not None)
    counts_text = ", ".join(f"{counts[each]:,} {each}" for each in ("rounds", "refused", "findings"))
    print(f"\r{name}: {counts_text} in {time.monotonic() - begin:.0f} s", flush=True)
    return int(counts["findings"] > 0)


def _in_own_process(name: str, seed: int, seconds: float, most_rounds: int | None) -> int:
    command = [sys.executable, __file__, "--here", "--seed", str(seed), "--minutes", str(seconds / 60), name]
    command += [] if most_rounds is None else ["--rounds", str(most_rounds)]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 1):
        print(f"\n{name}: the process ended with {code}, in the round named last", flush=True)
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
