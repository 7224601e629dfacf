"""A plugin of pytest that appends a record of each test when it ends, and of each file that can't be collected."""

from pathlib import Path

import pytest

from benchmarks.records import append, now

SHOWN_CHARACTERS = 4000


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the file."""
    parser.addoption("--records", type=Path, required=True, help="the file to append records to")
    parser.addoption("--records-revision", default="", help="the commit that each record names")


def pytest_configure(config: pytest.Config) -> None:
    """Record in the process that reports; those that xdist starts send it their reports."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(
            Records(config.getoption("--records"), config.getoption("--records-revision") or None), "records"
        )


class Records:
    """Appends to one file."""

    def __init__(self, path: Path, revision: str | None) -> None:
        self._path = path
        self._revision = revision

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the outcome of a test; what passes before and after it is not one."""
        if report.when == "call" or report.outcome != "passed":
            self._append(report.nodeid, report.outcome, report.duration, report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record a file that can't be imported."""
        if report.outcome == "failed":
            self._append(report.nodeid, "not collected", 0.0, report.longreprtext)

    def _append(self, test: str, outcome: str, seconds: float, text: str) -> None:
        record = {
            "benchmark": "gpu_tests",
            "revision": self._revision,
            "time": now(),
            "test": test,
            "outcome": outcome,
            "seconds": round(seconds, 3),
            "text": text[-SHOWN_CHARACTERS:],
        }
        append(self._path, record)
