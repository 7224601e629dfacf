"""`qlora doctor` as a script sees it, also on machines where the libraries are broken."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qlora_cli.cli.app import app
from qlora_cli.cli.rendering.doctor_text import RATES, rate_lines
from qlora_cli.doctor import checks_hub
from qlora_cli.doctor.checks_hardware import DetectedGpu
from qlora_cli.doctor.findings import Check, Outcome, Report, Status
from qlora_cli.doctor.isolation import Isolation
from qlora_cli.timing.rates_file import known_rates
from tests.conftest import Finished, RunQlora
from tests.support.processes.forks import FORKS, is_forkable

ROOT = Path(__file__).parent.parent.parent
TOKEN = "hf_" + "a1B2" * 6
AWAY = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
# Read by Python as it starts, in the command and in its children: what happens when `{name}` is imported.
SITECUSTOMIZE = """
import os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            {action}

sys.meta_path.insert(0, Blocker())
"""
BEFORE_DEVICES = ["python", "packages", "torch", "platform", "bitsandbytes", "libraries", "driver", "cuda", "gpu"]
AFTER_DEVICES = ["attention", "kernels", "hub", "token", "disk"]


def break_import(directory: Path, name: str, action: str) -> dict[str, str]:
    """Return the environment of a process in which importing a library does `action`."""
    (directory / "sitecustomize.py").write_text(SITECUSTOMIZE.format(name=name, action=action))
    return {"PYTHONPATH": os.pathsep.join([str(directory), str(ROOT)])}


def checks_of(done: Finished) -> dict[str, dict[str, Any]]:
    """Return the checks by name."""
    assert "Traceback" not in done.stdout + done.stderr
    return {check["name"]: check for check in done.json["checks"]}


def keys_of(value: Any) -> Iterator[str]:
    """Yield every key of a JSON value."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from keys_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from keys_of(part)


@pytest.fixture(scope="module")
def done(run_qlora: RunQlora) -> Finished:
    """The command on this machine, with a hub that cannot be reached, and its speed."""
    return run_qlora("doctor", "--measure", "--json", env=AWAY)


def test_a_machine_that_can_train_is_one_object_and_exit_code_0(done: Finished) -> None:
    assert done.code == 0, done.stdout + done.stderr
    json.loads(done.stdout, parse_constant=pytest.fail)  # NaN is not JSON
    assert list(done.json) == [field.name for field in fields(Report)]
    assert done.json["can_train"] is True
    checks = checks_of(done)
    names = list(checks)
    assert names.pop(names.index("kernels") + 1) == "speed"
    devices = names[len(BEFORE_DEVICES) : -len(AFTER_DEVICES)]
    assert names == [*BEFORE_DEVICES, *devices, *AFTER_DEVICES]
    assert devices[0] == "bitsandbytes_cpu"
    assert all(re.fullmatch(r"bitsandbytes_cuda_\d", name) for name in devices[1:])
    for check in checks.values():
        assert list(check) == [field.name for field in fields(Check)]
        assert check["status"] in set(Status)
        assert check["finding"]
        assert "\n" not in check["finding"] + (check["advice"] or "")
        assert (check["advice"] is None) == (check["status"] == "ok")
    assert [key for key in keys_of(done.json) if not re.fullmatch(r"[a-z0-9_]+", key)] == []
    assert checks["hub"]["status"] == "warning"
    assert isinstance(checks["disk"]["details"]["cache_free_bytes"], int)


def test_the_speed_that_was_measured_is_that_of_later_predictions(done: Finished) -> None:
    speed = checks_of(done)["speed"]
    assert speed["status"] == "ok", speed
    details = speed["details"]
    assert set(details["measured"]) == {*RATES, "dispatch_seconds"}
    known = known_rates(details["name"])
    assert known is not None
    assert known.dtype == details["compute_dtype"]
    assert {name: getattr(known.rates, name) for name in details["measured"]} == details["measured"]
    lines = rate_lines(details["measured"], details["measured"])
    assert len(lines) == len(details["measured"])
    assert all("/s by the data sheet" in line for line in lines[:-1])


def test_every_key_is_documented(done: Finished) -> None:
    page = (ROOT / "docs" / "reference" / "json.md").read_text(encoding="utf-8")
    section = page.partition("## qlora doctor\n")[2].partition("\n## ")[0]
    checks = checks_of(done)
    trials = set(checks["bitsandbytes_cpu"]["details"]["relative_errors"])
    gpu = {field.name for field in fields(DetectedGpu)}
    printed = {"can_train", "checks", *keys_of(list(checks.values())), *gpu} - trials
    assert [key for key in sorted(printed) if f"`{key}`" not in section] == []
    rows = {name if "cuda_" not in name else "bitsandbytes_cuda_0" for name in checks}
    assert [name for name in sorted(rows) if f"`{name}`" not in section] == []


def test_without_json_there_is_a_line_for_each_check_and_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    if is_forkable(os.environ):  # from a process that has imported everything; `done` is checked in a fresh one
        monkeypatch.setattr("qlora_cli.doctor.isolation.multiprocessing.get_context", lambda _: FORKS)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0
    lines = [line for line in done.stdout.splitlines() if not line.lstrip().startswith("->")]
    assert lines[0].startswith("This machine can train (")
    words = [line.split()[:2] for line in lines[1:]]
    assert [name for _, name in words][: len(BEFORE_DEVICES)] == BEFORE_DEVICES
    assert {word for word, _ in words} <= {"ok", "warn", "skip"}
    assert ["skip", "hub"] in words  # the tests run with HF_HUB_OFFLINE=1
    assert "\x1b" not in done.stdout
    assert "Checking torch …" in done.stderr


@pytest.mark.parametrize(
    ("library", "failed", "skipped"),
    [
        (
            "torch",
            ["torch"],
            ["bitsandbytes", "platform", "libraries", "cuda", "gpu", "bitsandbytes_cpu", "attention", "kernels"],
        ),
        ("bitsandbytes", ["bitsandbytes"], ["bitsandbytes_cpu", "attention"]),
        ("transformers", ["libraries"], []),
    ],
)
def test_a_library_that_cannot_be_imported_is_a_finding_and_exit_code_1(
    run_qlora: RunQlora, tmp_path: Path, library: str, failed: list[str], skipped: list[str]
) -> None:
    broken = break_import(tmp_path, library, 'raise ImportError(f"no {name} today")')
    done = run_qlora("doctor", "--json", env=broken)
    assert done.code == 1
    assert done.json["can_train"] is False
    checks = checks_of(done)
    assert [name for name, check in checks.items() if check["status"] == "failed"] == failed
    assert f"no {library} today" in checks[failed[0]]["finding"]
    assert checks[failed[0]]["advice"]
    assert [name for name in skipped if checks[name]["status"] != "skipped"] == []
    assert list(checks)[-len(AFTER_DEVICES) :] == AFTER_DEVICES


def test_a_library_that_kills_its_process_is_a_finding_and_exit_code_1(run_qlora: RunQlora, tmp_path: Path) -> None:
    done = run_qlora("doctor", "--json", env=break_import(tmp_path, "torch", "os.abort()"))
    assert done.code == 1
    checks = checks_of(done)
    assert checks["torch"]["finding"] == "crashed its process (SIGABRT)"
    assert checks["python"]["status"] == "ok"
    assert checks["disk"]["details"]["cache_free_bytes"] > 0


def test_a_package_older_than_its_bound_is_a_finding_and_exit_code_1(run_qlora: RunQlora, tmp_path: Path) -> None:
    (tmp_path / "trl-0.1.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: trl\nVersion: 0.1.0\n"
    (tmp_path / "trl-0.1.0.dist-info" / "METADATA").write_text(metadata)
    # Without torch the rest is skipped: it is the packages that are looked at.
    done = run_qlora("doctor", "--json", env=break_import(tmp_path, "torch", "raise ImportError(name)"))
    assert done.code == 1
    packages = checks_of(done)["packages"]
    assert packages["status"] == "failed"
    assert packages["finding"] == "trl 0.1.0 (needs >=1.16,<1.17)"
    assert packages["advice"] == "Run: pip install --upgrade 'trl>=1.16,<1.17'"


def test_the_command_answers_for_help_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['qlora', 'doctor', '--help']\n"
        "from qlora_cli.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'huggingface_hub'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stderr == "[]\n"
    assert "--json" in done.stdout


def asked_in_child(check: Callable[..., Outcome], *arguments: object) -> Outcome:
    """Run a check in a fresh process: the client reads its environment once."""
    with Isolation() as child:
        return child.run(check, *arguments, advice="", limit_seconds=60)


class Answers(BaseHTTPRequestHandler):
    """Answers as the hub does, accepts one token, and records the requests."""

    asked: list[tuple[str, str | None]]
    html = False

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        if self.html:
            self._send(200, b"<html>please log in</html>")
        elif self.path.startswith("/api/models"):
            self._send(200, b'[{"id": "owner/tiny"}]')
        elif self.path == "/api/whoami-v2" and self.headers["Authorization"] == f"Bearer {TOKEN}":
            self._send(200, json.dumps({"name": "someone"}).encode())
        else:
            self._send(401, b'{"error": "Invalid credentials"}')

    def _send(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Answers]]:
    """A hub on loopback that children of this process ask, with an empty home for the hub's client."""
    handler: type[Answers] = type("Handler", (Answers,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in checks_hub.TOKEN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield handler
    server.shutdown()
    server.server_close()


def test_the_hub_at_hf_endpoint_is_asked_and_no_password_is_printed(
    hub: type[Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = os.environ["HF_ENDPOINT"]
    monkeypatch.setenv("HF_ENDPOINT", address.replace("//", "//user:pass@"))
    outcome = asked_in_child(checks_hub.check_hub)
    assert outcome.status == Status.OK, outcome.finding
    assert [path for path, _ in hub.asked] == ["/api/models?limit=1"]
    assert outcome.details["endpoint"] == address
    assert "pass" not in repr(outcome)


def test_a_login_page_in_the_way_is_not_the_hub(hub: type[Answers]) -> None:
    hub.html = True
    outcome = asked_in_child(checks_hub.check_hub)
    assert outcome.status == Status.WARNING
    assert "not like the hub (HTTP 200)" in outcome.finding


def test_a_hub_that_refuses_connections_is_a_warning_that_says_why(
    hub: type[Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    outcome = asked_in_child(checks_hub.check_hub)
    assert outcome.status == Status.WARNING
    assert "http://127.0.0.1:9 can't be reached: ConnectError: " in outcome.finding
    assert "refused" in outcome.finding
    assert hub.asked == []


def test_a_hub_that_never_answers_costs_seconds(hub: type[Answers], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        outcome = asked_in_child(checks_hub.check_hub)
    assert outcome.status == Status.WARNING
    assert "Timeout" in outcome.finding
    assert hub.asked == []


def test_offline_mode_asks_nobody(hub: type[Answers], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outcome = asked_in_child(checks_hub.check_hub)
    assert outcome.status == Status.SKIPPED
    assert "HF_HUB_OFFLINE=1" in outcome.finding
    assert asked_in_child(checks_hub.check_token, False).status == Status.SKIPPED
    assert hub.asked == []


@pytest.mark.parametrize("source", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "file"])
def test_a_token_is_read_from_where_the_client_reads_it_and_accepted(
    hub: type[Answers], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    if source == "file":
        (tmp_path / "token").write_text(TOKEN)
    else:
        monkeypatch.setenv(source, TOKEN)
    outcome = asked_in_child(checks_hub.check_token, True)
    assert outcome.status == Status.OK, outcome.finding
    assert outcome.details == {"source": source, "accepted": True}
    assert hub.asked == [("/api/whoami-v2", f"Bearer {TOKEN}")]
    assert TOKEN not in repr(outcome)


@pytest.mark.parametrize("token", ["hf_" + "wrong" * 6, "hf_tök" + "e" * 20, "hf_two\nlines" + "e" * 20])
def test_a_rejected_or_unsendable_token_is_not_printed(
    hub: type[Answers], monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    outcome = asked_in_child(checks_hub.check_token, True)
    assert outcome.status == Status.WARNING, outcome.finding
    assert outcome.details["source"] == "HF_TOKEN"
    assert token[3:8] not in repr(outcome)
    rejected = bool(hub.asked)
    assert outcome.details["accepted"] is (False if rejected else None)
    assert ("rejects it (HTTP 401)" in outcome.finding) is rejected


def test_no_token_is_a_warning_and_a_token_is_not_sent_where_the_hub_is_not(
    hub: type[Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked_in_child(checks_hub.check_token, True).finding.startswith("none")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    outcome = asked_in_child(checks_hub.check_token, False)
    assert (outcome.status, outcome.details) == (Status.OK, {"source": "HF_TOKEN", "accepted": None})
    assert hub.asked == []


def test_neither_the_token_nor_what_quotes_it_is_printed(
    hub: type[Answers], run_qlora: RunQlora, tmp_path: Path
) -> None:
    environment = {
        # An error that quotes the token, as a careless library might.
        **break_import(tmp_path, "torch", 'raise ImportError("bad header: " + os.environ["HF_TOKEN"])'),
        "HF_TOKEN": TOKEN,
        "HOME": str(tmp_path),
    }
    as_json = run_qlora("doctor", "--json", env=environment)
    as_text = run_qlora("doctor", env=environment)
    assert checks_of(as_json)["token"]["details"] == {"source": "HF_TOKEN", "accepted": True}
    assert "present, from HF_TOKEN; the hub accepts it" in as_text.stdout
    assert [authorization for path, authorization in hub.asked if "whoami" not in path] == [None, None]
    for done in (as_json, as_text):
        assert done.code == 1
        assert "bad header: ***" in done.stdout
        assert TOKEN not in done.stdout + done.stderr
