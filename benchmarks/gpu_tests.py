"""Run `qlora doctor` and the tests marked `gpu` in under six minutes, several at a time, unattended.

A test that takes too long ends with a traceback of where it was, and only its process with it; a file that can't be
imported stops no other; warnings are no errors. A record is on the disk when its test ends. A second run with the
same output directory continues: it leaves out what has passed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_processes import ENVIRONMENT, Deadline, run_until
from benchmarks.records import RESULTS, ROOT, append, now, read, results_file, revision, versions

DOCTOR_SECONDS = 60.0
SECONDS_TO_SUM_UP = 15.0
NOT_ALL_PASSED = 1


def check_machine(records: Path, at_revision: str | None, deadline: Deadline) -> None:
    """Run `qlora doctor` and record what it finds; a machine that fails a check is tested all the same."""
    record = {"benchmark": "doctor", "revision": at_revision, "time": now(), "versions": versions()}
    command = [sys.executable, "-m", "qlora_cli", "doctor", "--json"]
    environment, seconds = {**os.environ, **ENVIRONMENT}, min(DOCTOR_SECONDS, deadline.seconds_left)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        append(records, {**record, "status": "timed out"})
        return
    try:
        found = json.loads(done.stdout)
    except json.JSONDecodeError:
        append(records, {**record, "status": "failed", "text": (done.stdout + done.stderr)[-4000:]})
        return
    append(records, {**record, "status": "done", "exit_code": done.returncode, "found": found})
    for check in found["checks"]:
        print(f"{check['status']:8} {check['name']:20} {check['finding']}", flush=True)


def passed_tests(records: Path, at_revision: str | None) -> list[str]:
    """Return the tests that earlier records of this revision say have passed."""
    files = sorted(records.parent.glob(f"{records.stem[: -len('-YYYY-MM-DD')]}-*.jsonl"))
    return [
        record["test"]
        for record in read(files)
        if record.get("benchmark") == "gpu_tests"
        and record["outcome"] == "passed"
        and record["revision"] == at_revision
    ]


def pytest_command(arguments: argparse.Namespace, records: Path, at_revision: str | None) -> list[str]:
    """Return the command that runs the tests which have not passed yet."""
    return [
        *(sys.executable, "-m", "pytest", "-m", "gpu", *map(str, arguments.tests)),
        *("-p", "no:cacheprovider", "-p", "benchmarks.gpu_test_records", "--records", str(records)),
        *("--records-revision", at_revision or ""),
        *("-W", "default", "--continue-on-collection-errors", "--tb", "short", "-q", "-n", str(arguments.workers)),
        *("-o", f"faulthandler_timeout={arguments.test_timeout:g}", "-o", "faulthandler_exit_on_timeout=true"),
        *(f"--deselect={test}" for test in passed_tests(records, at_revision)),
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, nargs="*", default=[ROOT / "tests" / "gpu"], help="default: tests/gpu")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="where the results file goes")
    parser.add_argument("--time-limit", type=float, default=330, help="seconds for all of it (default: 330)")
    parser.add_argument("--test-timeout", type=float, default=75, help="seconds for one test (default: 75)")
    parser.add_argument("--workers", type=int, default=4, help="tests at a time (default: 4)")
    parser.add_argument("--without-doctor", action="store_true", help="only the tests")
    return parser.parse_args(arguments)


def main() -> int:
    """Return the exit code of pytest, or 1 if the time was up."""
    arguments = parse_arguments()
    deadline, at_revision = Deadline(arguments.time_limit), revision()
    records = results_file(arguments.output_dir, "gpu-tests")
    if not arguments.without_doctor:
        check_machine(records, at_revision, deadline)
    ended = run_until(
        pytest_command(arguments, records, at_revision),
        seconds=max(0.0, deadline.seconds_left - SECONDS_TO_SUM_UP),
        stop_signal=signal.SIGINT,
        grace_seconds=SECONDS_TO_SUM_UP,
    )
    print(ended.errors[-4000:], file=sys.stderr)
    print(f"Written to {records}")
    return NOT_ALL_PASSED if ended.timed_out else ended.exit_code


if __name__ == "__main__":
    sys.exit(main())
