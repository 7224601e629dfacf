"""A process of the GPU suite that takes too long is ended, with all that it started, and what it said is kept."""

import sys
import time
from pathlib import Path

import psutil

from benchmarks.gpu_processes import Deadline, run_until

STUCK = """
import faulthandler, signal, subprocess, sys, time
from pathlib import Path
faulthandler.register(signal.SIGUSR1)
print("so far", file=sys.stderr, flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[1]).write_text(str(child.pid))
def where_it_is():
    time.sleep(600)
where_it_is()
"""


def test_a_process_that_is_stuck_says_where_and_leaves_nothing_running(tmp_path: Path) -> None:
    ended = run_until([sys.executable, "-c", STUCK, str(tmp_path / "child")], seconds=3, grace_seconds=2)
    assert ended.timed_out
    assert ended.exit_code != 0
    assert "so far" in ended.errors
    assert "in where_it_is" in ended.errors
    child = int((tmp_path / "child").read_text(encoding="utf-8"))
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    raise AssertionError("what it started is still running")


def test_one_that_ends_by_itself_gives_its_exit_code() -> None:
    ended = run_until([sys.executable, "-c", "import sys; sys.exit('no such case')"], seconds=60)
    assert (ended.exit_code, ended.timed_out, ended.errors.strip()) == (1, False, "no such case")


def test_a_deadline_has_no_time_left_once_it_passed() -> None:
    assert Deadline(0).seconds_left == 0
    assert 59 < Deadline(60).seconds_left <= 60
