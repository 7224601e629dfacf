"""The GPU tests are run in a way that loses nothing: shown on tests that need no GPU but fail in every way."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.records import ROOT, read

TESTS = """
import time, warnings, pytest

pytestmark = pytest.mark.gpu

def test_passes():
    warnings.warn("nothing to worry about")

def test_fails():
    assert 1 == 2

def test_is_stuck():
    time.sleep(600)

def test_passes_too():
    pass

@pytest.mark.skip(reason="not here")
def test_is_skipped():
    pass
"""


def outcomes_of(folder: Path) -> Mapping[str, list[str]]:
    outcomes: dict[str, list[str]] = {}
    for record in read(sorted(folder.glob("gpu-tests-*.jsonl"))):
        outcomes.setdefault(record["test"].rpartition("/")[2].rpartition("::")[2], []).append(record["outcome"])
    return outcomes


def test_a_test_that_is_stuck_and_a_file_that_fails_stop_no_other_and_a_second_run_continues(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_some.py").write_text(TESTS, encoding="utf-8")
    (tests / "test_not_imported.py").write_text("import no_such_module\n", encoding="utf-8")
    (tests / "pytest.ini").write_text("[pytest]\nmarkers = gpu\nfilterwarnings = error\n", encoding="utf-8")
    script = str(ROOT / "benchmarks" / "gpu_tests.py")
    command = [sys.executable, script, str(tests), "--output-dir", str(tmp_path), "--without-doctor"]
    command += ["--workers", "2", "--test-timeout", "5", "--time-limit", "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    expected = {
        "test_passes": ["passed"],
        "test_fails": ["failed"],
        "test_is_stuck": ["failed"],
        "test_passes_too": ["passed"],
        "test_is_skipped": ["skipped"],
        "test_not_imported.py": ["not collected"],
    }
    assert outcomes_of(tmp_path) == expected, done.stdout + done.stderr
    assert done.returncode == 1
    assert "in test_is_stuck" in done.stdout + done.stderr  # the traceback of where it was
    subprocess.run(command, capture_output=True, check=False, cwd=ROOT, timeout=300)
    assert outcomes_of(tmp_path) == {
        name: found if found == ["passed"] else found * 2 for name, found in expected.items()
    }
