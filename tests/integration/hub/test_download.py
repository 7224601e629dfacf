"""Downloads from a hub on loopback that breaks off, stalls, is busy, or has more than fits on the disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import Find, find_command
from tests.support.processes.hub_server import COMMIT, OLD_COMMIT, Hub, store_by_xet

WEIGHTS = "model.safetensors"
MIB = 1024**2
# huggingface_hub writes a file by such chunks; a chunk that has only partly arrived is lost with its connection.
CHUNK_BYTES = 10 * MIB


def test_a_download_is_reported_by_bytes_and_a_second_one_requests_nothing(find: Find, hub: Hub) -> None:
    download = find("owner/tiny")
    weight_bytes = len(hub.repos["owner/tiny"].commits[COMMIT][WEIGHTS])
    assert (0, weight_bytes) in download.downloads
    assert download.downloads[-1] == (weight_bytes, weight_bytes)
    # The small files come before the weights; each of the two is reported complete exactly once.
    assert len([done for done, total in download.downloads if done == total]) == 2
    num_files = len([request for request in hub.requests if request.path.startswith("/cdn/")])
    again = find("owner/tiny")
    assert again.downloads == []
    assert len([request for request in hub.requests if request.path.startswith("/cdn/")]) == num_files


def test_the_token_goes_to_the_hub_and_to_no_other_host(find: Find, hub: Hub, hub_env: dict[str, str]) -> None:
    find("owner/tiny", env={**hub_env, "HF_TOKEN": "hf_aaaaaaaaaaaaaaaaaaaa"})
    assert {request.has_token for request in hub.requests if "/resolve/" in request.path} == {True}
    assert {request.has_token for request in hub.requests if request.path.startswith("/cdn/")} == {False}


def test_requests_to_a_busy_hub_are_repeated_and_reported(find: Find, hub: Hub) -> None:
    hub.statuses = {"/api/models/owner/tiny": [503], f"/cdn/owner/tiny/{COMMIT}/{WEIGHTS}": [502, 429]}
    download = find("owner/tiny", 0, 0)
    assert (Path(download.result["path"]) / WEIGHTS).is_file()
    assert download.notes == [
        "owner/tiny: the hub answers 503 Service Unavailable; trying again in 0 s",
        f"{WEIGHTS}: the hub answers 502 Bad Gateway; trying again in 0 s",
        f"{WEIGHTS}: HTTP Error 429 thrown while requesting GET the hub",
        f"{WEIGHTS}: Retrying in 1s [Retry 1/5].",
    ]
    assert download.stderr == ""


def test_a_broken_hub_is_given_up_after_bounded_retries(find: Find, hub: Hub) -> None:
    hub.statuses["/api/models/owner/tiny"] = [500] * 10
    error = find("owner/tiny", 0, 0).result
    assert "the hub answers 500" in error["message"]
    assert len(hub.requests) == 3
    hub.statuses = {"/cdn/": [503] * 1000}
    error = find("owner/tiny", 0, 0).result
    assert "is incomplete: the hub answers 503" in error["message"]


@pytest.fixture
def large(hub: Hub) -> bytes:
    """The weights of `owner/tiny`, several chunks large."""
    content = hub.repos["owner/tiny"].commits[COMMIT][WEIGHTS] = bytes(range(256)) * (25 * MIB // 256)
    return content


def test_a_broken_download_resumes_after_the_last_chunk(find: Find, hub: Hub, large: bytes) -> None:
    hub.cuts[WEIGHTS] = [15 * MIB, 24 * MIB]
    download = find("owner/tiny", 0)
    assert hub.sent_from(WEIGHTS) == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert (Path(download.result["path"]) / WEIGHTS).read_bytes() == large
    assert [note.startswith(f"{WEIGHTS}: Error while downloading from the hub: ") for note in download.notes] == [
        True
    ] * 2
    assert download.stderr == ""


def test_a_file_restarts_after_a_connection_reset(find: Find, hub: Hub, large: bytes) -> None:
    hub.resets[WEIGHTS] = [20 * MIB]
    download = find("owner/tiny", 0)
    assert hub.sent_from(WEIGHTS) == [0, 0]
    assert (Path(download.result["path"]) / WEIGHTS).read_bytes() == large
    assert "ReadError" in download.notes[0]
    assert download.downloads[-1] == (download.downloads[-1][1], download.downloads[-1][1])


def test_a_server_without_ranges_sends_the_file_again(find: Find, hub: Hub, large: bytes) -> None:
    hub.cuts[WEIGHTS] = [15 * MIB]
    hub.ignores_ranges = True
    download = find("owner/tiny", 0)
    assert (Path(download.result["path"]) / WEIGHTS).read_bytes() == large
    assert all(done <= total for done, total in download.downloads)


def test_a_stalled_connection_is_replaced(find: Find, hub: Hub, hub_env: dict[str, str]) -> None:
    hub.stalls[WEIGHTS] = [1_500_000]
    download = find("owner/tiny", 0, env={**hub_env, "HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    assert "timed out" in download.notes[0]
    assert hub.sent_from(WEIGHTS) == [0, 0]
    expected = hub.repos["owner/tiny"].commits[COMMIT][WEIGHTS]
    assert (Path(download.result["path"]) / WEIGHTS).read_bytes() == expected


def test_fewer_bytes_than_announced_are_not_a_file(find: Find, hub: Hub, hub_env: dict[str, str]) -> None:
    hub.claimed_bytes[WEIGHTS] = len(hub.repos["owner/tiny"].commits[COMMIT][WEIGHTS]) + 1
    error = find("owner/tiny", 0).result
    assert (error["error"], "is incomplete" in error["message"]) == ("ModelNotFoundError", True)
    assert "Consistency check failed" in error["message"]
    assert not list(Path(hub_env["HF_HOME"]).rglob("*.incomplete"))


def test_files_in_progress_are_completed_when_another_fails(find: Find, hub: Hub, hub_env: dict[str, str]) -> None:
    hub.repos["owner/tiny"].commits[COMMIT] = {name: name.encode() for name in ("a", "b")}
    hub.statuses[f"/cdn/owner/tiny/{COMMIT}/a"] = [403]
    hub.cuts["b"] = [0]  # the client then waits for a second
    error = find("owner/tiny", 0).result
    assert "the hub refuses owner/tiny" in error["message"]
    blobs = Path(hub_env["HF_HOME"]) / "hub" / "models--owner--tiny" / "blobs"
    assert [blob.read_bytes() for blob in blobs.iterdir()] == [b"b"]


def test_a_branch_that_moves_during_a_download_changes_nothing(find: Find, hub: Hub) -> None:
    hub.moves_main_at = WEIGHTS
    model = find("owner/tiny").result
    assert (model["commit"], Path(model["path"]).name) == (COMMIT, COMMIT)
    assert (Path(model["path"]) / WEIGHTS).is_file()
    assert find("owner/tiny").result["commit"] == OLD_COMMIT


def started(code: str, env: dict[str, str]) -> "subprocess.Popen[str]":
    """Start to find `owner/tiny` in a process that runs `code` first."""
    module, *arguments = find_command("owner/tiny")
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}\nfrom {module} import main\nmain()", *arguments],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupted(process: "subprocess.Popen[str]") -> str:
    """Press Ctrl-C, wait a few seconds for the process to end, and return what it writes to stderr."""
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    return stderr


def test_a_stalled_download_is_interrupted_at_once_and_leaves_no_partial_file(
    find: Find, hub: Hub, hub_env: dict[str, str]
) -> None:
    hub.stalls[WEIGHTS] = [1_500_000]
    blobs = Path(hub_env["HF_HOME"]) / "hub" / "models--owner--tiny" / "blobs"
    blobs.mkdir(parents=True)
    of_another_process = blobs / f"{'a' * 64}.01234567.incomplete"
    of_another_process.touch()
    process = started("pass", hub_env)
    assert hub.stalled.wait(60)
    assert len(list(blobs.glob("*.incomplete"))) == 2
    assert "KeyboardInterrupt" in interrupted(process)
    assert list(blobs.glob("*.incomplete")) == [of_another_process]
    num_sent = len(hub.sent_from("config.json"))
    download = find("owner/tiny")
    assert hub.sent_from(WEIGHTS) == [0, 0]
    assert len(hub.sent_from("config.json")) == num_sent == 1
    expected = hub.repos["owner/tiny"].commits[COMMIT][WEIGHTS]
    assert (Path(download.result["path"]) / WEIGHTS).read_bytes() == expected


@pytest.fixture
def xet_env(hub: Hub, hub_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a process that asks a hub whose weights are in a xet storage on this disk."""
    files = hub.repos["owner/tiny"].commits[COMMIT]
    hub.xet_endpoint = f"local://{tmp_path / 'xet'}"
    hub.xet_hashes[WEIGHTS] = store_by_xet(files[WEIGHTS], tmp_path / "xet")
    return {**hub_env, "HF_HUB_DISABLE_XET": "0"}


def test_weights_in_xet_are_downloaded_from_xet(find: Find, hub: Hub, xet_env: dict[str, str]) -> None:
    download = find("owner/tiny", env=xet_env)
    expected = hub.repos["owner/tiny"].commits[COMMIT][WEIGHTS]
    assert (Path(download.result["path"]) / WEIGHTS).read_bytes() == expected
    assert hub.sent_from(WEIGHTS) == []
    assert (0, len(expected)) in download.downloads
    assert download.downloads[-1] == (len(expected), len(expected))
    assert (download.notes, download.stderr) == ([], "")


def test_weights_missing_in_xet_are_named_with_a_way_to_do_without_it(
    find: Find, hub: Hub, xet_env: dict[str, str], tmp_path: Path
) -> None:
    hub.xet_endpoint = f"local://{tmp_path / 'empty'}"
    error = find("owner/tiny", env=xet_env).result
    assert (error["error"], "is incomplete" in error["message"]) == ("ModelNotFoundError", True)
    assert "HF_HUB_DISABLE_XET=1" in error["hint"]
    assert (Path(find("owner/tiny", env={**xet_env, "HF_HUB_DISABLE_XET": "1"}).result["path"]) / WEIGHTS).is_file()


def test_a_xet_storage_that_stalls_is_noted_and_interrupted_at_once(hub: Hub, xet_env: dict[str, str]) -> None:
    hub.xet_endpoint = f"http://127.0.0.1:{hub.port}/stall"
    process = started("from qlora_cli.hub import download; download.SILENT_SECONDS = 0.5", xet_env)
    assert process.stdout is not None
    assert any("nothing has arrived" in line and "HF_HUB_DISABLE_XET=1" in line for line in process.stdout)
    assert "KeyboardInterrupt" in interrupted(process)
    assert not list(Path(xet_env["HF_HOME"]).rglob("*.incomplete"))


def test_a_file_too_large_for_http_is_named_with_xet_as_the_way(hub: Hub, hub_env: dict[str, str]) -> None:
    hub.claimed_bytes[WEIGHTS] = 60 * 10**9
    large_disk = "import shutil, types\nshutil.disk_usage = lambda _: types.SimpleNamespace(free=2**50)"
    process = started(large_disk, hub_env)
    stdout, _ = process.communicate(timeout=60)
    error = json.loads(stdout.splitlines()[-1])
    assert (error["error"], "owner/tiny can't be downloaded" in error["message"]) == ("ModelError", True)
    assert "HF_HUB_DISABLE_XET not set" in error["hint"]
    assert hub.sent_from(WEIGHTS) == []


def test_a_download_larger_than_the_disk_is_refused_before_it_starts(
    find: Find, hub: Hub, hub_env: dict[str, str]
) -> None:
    hub.claimed_bytes[WEIGHTS] = 40 * 1024**3
    free = shutil.disk_usage(Path(hub_env["HF_HOME"]).parent).free
    if free > 40 * 1024**3:
        hub.claimed_bytes[WEIGHTS] = free + 1024**3
    error = find("owner/tiny").result
    assert error["error"] == "DiskSpaceError"
    assert error["message"].count("GiB") == 2
    assert "HF_HOME" in error["hint"]
    assert hub.sent_from(WEIGHTS) == []
