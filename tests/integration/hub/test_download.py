"""Downloads against a hub on loopback that breaks off, stalls, is busy, or has more than the disk holds."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest import Find, finding
from tests.support.hub_server import COMMIT, OLD_COMMIT, Hub

WEIGHTS = "model.safetensors"


def test_a_download_is_reported_by_bytes_and_a_second_one_asks_for_nothing(find: Find, hub: Hub) -> None:
    found = find("owner/tiny")
    weight_bytes = len(hub.repos["owner/tiny"].commits[COMMIT][WEIGHTS])
    assert (0, weight_bytes) in found.downloads
    assert found.downloads[-1] == (weight_bytes, weight_bytes)
    # First the small files, then the weights: each is complete once, and only when it is.
    assert len([done for done, total in found.downloads if done == total]) == 2
    num_files = len([request for request in hub.requests if request.path.startswith("/cdn/")])
    again = find("owner/tiny")
    assert again.downloads == []
    assert len([request for request in hub.requests if request.path.startswith("/cdn/")]) == num_files


def test_the_token_goes_to_the_hub_and_to_no_other_host(find: Find, hub: Hub, hub_env: dict[str, str]) -> None:
    find("owner/tiny", env={**hub_env, "HF_TOKEN": "hf_aaaaaaaaaaaaaaaaaaaa"})
    assert {request.has_token for request in hub.requests if "/resolve/" in request.path} == {True}
    assert {request.has_token for request in hub.requests if request.path.startswith("/cdn/")} == {False}


def test_a_busy_hub_is_asked_again_and_that_is_said(find: Find, hub: Hub) -> None:
    hub.statuses = {"/api/models/owner/tiny": [503], f"/cdn/owner/tiny/{COMMIT}/{WEIGHTS}": [502, 429]}
    found = find("owner/tiny", 0, 0)
    assert (Path(found.result["path"]) / WEIGHTS).is_file()
    assert [note.split(";")[0] for note in found.notes] == [
        "owner/tiny: the hub answers 503 Service Unavailable",
        f"{WEIGHTS}: the hub answers 502 Bad Gateway",
        f"{WEIGHTS}: the hub answers 429 Too Many Requests",
    ]


def test_a_broken_hub_is_given_up_after_bounded_retries(find: Find, hub: Hub) -> None:
    hub.statuses["/api/models/owner/tiny"] = [500] * 10
    error = find("owner/tiny", 0, 0).result
    assert "the hub answers 500" in error["message"]
    assert len(hub.requests) == 3
    hub.statuses = {"/cdn/": [503] * 1000}
    error = find("owner/tiny", 0, 0).result
    assert "not downloaded to the end: the hub answers 503" in error["message"]


def test_a_connection_that_breaks_goes_on_where_it_broke(find: Find, hub: Hub) -> None:
    hub.cuts[WEIGHTS] = [1_000_000, 2_000_000]
    found = find("owner/tiny", 0, 0)
    assert hub.sent_from(WEIGHTS) == [0, 1_000_000, 2_000_000]
    expected = hub.repos["owner/tiny"].commits[COMMIT][WEIGHTS]
    assert (Path(found.result["path"]) / WEIGHTS).read_bytes() == expected
    assert "going on from" in found.notes[0]


def test_a_stalled_connection_is_given_up_and_goes_on_where_it_stalled(
    find: Find, hub: Hub, hub_env: dict[str, str]
) -> None:
    hub.stalls[WEIGHTS] = [1_500_000]
    found = find("owner/tiny", 0, 0, env={**hub_env, "HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    assert "ReadTimeout" in found.notes[0]
    assert hub.sent_from(WEIGHTS) == [0, 1_500_000]


def test_a_branch_that_moves_on_meanwhile_changes_nothing(find: Find, hub: Hub) -> None:
    hub.moves_main_at = WEIGHTS
    found = find("owner/tiny").result
    assert (found["commit"], Path(found["path"]).name) == (COMMIT, COMMIT)
    assert (Path(found["path"]) / WEIGHTS).is_file()
    assert find("owner/tiny").result["commit"] == OLD_COMMIT


def test_a_server_without_ranges_starts_over_once(find: Find, hub: Hub) -> None:
    hub.cuts[WEIGHTS] = [1_000_000]
    hub.ignores_ranges = True
    found = find("owner/tiny", 0, 0)
    expected = hub.repos["owner/tiny"].commits[COMMIT][WEIGHTS]
    assert (Path(found.result["path"]) / WEIGHTS).read_bytes() == expected


def test_a_partial_file_of_other_bytes_is_found_out_by_its_hash(find: Find) -> None:
    path = Path(find("owner/tiny").result["path"])
    expected = (path / WEIGHTS).read_bytes()
    blob = (path / WEIGHTS).resolve()
    (path / WEIGHTS).unlink()
    blob.rename(blob.with_name(f"{blob.name}.incomplete"))
    blob.with_name(f"{blob.name}.incomplete").write_bytes(b"x" * 1_000_000)
    again = find("owner/tiny", 0, 0)
    assert "SHA-256" in again.notes[0]
    assert (path / WEIGHTS).read_bytes() == expected


@pytest.mark.parametrize("kind", ["link", "link to nothing", "hard link"])
def test_a_partial_file_that_leads_elsewhere_is_not_followed(find: Find, tmp_path: Path, kind: str) -> None:
    path = Path(find("owner/tiny").result["path"])
    expected = {name: (path / name).read_bytes() for name in (WEIGHTS, "config.json")}
    precious = tmp_path / "precious"
    for name, content in expected.items():
        blob = (path / name).resolve()
        (path / name).unlink()
        blob.unlink()
        partial = blob.with_name(f"{blob.name}.incomplete")
        if kind == "hard link":
            precious.write_bytes(b"p" * len(content))
            partial.hardlink_to(precious)
        else:
            partial.symlink_to(precious)
            if kind == "link":
                precious.write_bytes(b"p" * len(content))
        find("owner/tiny")
        assert (path / name).read_bytes() == content
        assert not (path / name).resolve().is_symlink()
        if kind == "link to nothing":
            assert not precious.exists()
        else:
            assert precious.read_bytes() == b"p" * len(content)
            precious.unlink()


def test_a_stalled_download_is_interrupted_at_once_and_a_second_run_asks_for_the_rest(
    find: Find, hub: Hub, hub_env: dict[str, str]
) -> None:
    hub.stalls[WEIGHTS] = [1_500_000]
    process = subprocess.Popen(
        finding("owner/tiny"), env={**os.environ, **hub_env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert hub.stalled.wait(30)
    for line in process.stdout:  # the bytes are counted only once they are in the file
        if json.loads(line).get("done_bytes") == 1_500_000:
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=5)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in stderr
    found = find("owner/tiny")
    assert hub.sent_from(WEIGHTS) == [0, 1_500_000]
    expected = hub.repos["owner/tiny"].commits[COMMIT][WEIGHTS]
    assert (Path(found.result["path"]) / WEIGHTS).read_bytes() == expected
    assert found.downloads[-1] == (len(expected), len(expected))
    assert (1_500_000, len(expected)) in found.downloads  # what was there counts from the start


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
