"""Merging with the hub: adapter and base are downloaded at their commits, and the merged model is pushed."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from tests.conftest import RunQlora
from tests.support.processes.hub_server import COMMIT, OLD_COMMIT, Hub, Repo
from tests.support.runs.merge_command import UNCOMPARED, adapter_alone, merged, qlora_merge, refused, trained_run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning"),  # inside the hub's client
]
TOKEN = "hf_" + "aBcDeFgHiJkL" * 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("merge"))


def test_an_adapter_and_its_base_come_from_the_hub_at_their_commits(
    run_qlora: RunQlora, hub: Hub, hub_env: dict[str, str], run: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in adapter_alone(run, tmp_path / "alone").iterdir()}
    config = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": "owner/tiny", "revision": "v1"}
    hub.repos["owner/lora"] = Repo(commits={COMMIT: {**files, "adapter_config.json": json.dumps(config).encode()}})
    done = run_qlora("merge", "owner/lora", "--device", "cpu", "--json", env=hub_env, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert (done.json["output"], done.json["base_model"]) == ("lora-merged", "owner/tiny")
    assert done.json["commit"] == OLD_COMMIT
    card = (tmp_path / "lora-merged" / "README.md").read_text()
    assert "base_model: owner/tiny" in card
    assert f"at commit `{OLD_COMMIT}`" in card
    generation = json.loads((tmp_path / "lora-merged" / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 7  # only that commit has it


def test_offline_an_adapter_that_was_never_downloaded_is_reported(tmp_path: Path) -> None:
    assert "HF_HUB_OFFLINE=1 keeps the hub from being asked" in refused("owner/lora", "--output", tmp_path / "out")


@pytest.fixture
def writable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, which the client of this process asks with a token that may write."""
    hub.accounts[TOKEN] = {"name": "me", "auth": {"accessToken": {"role": "write"}}}
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub.port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def test_nothing_is_merged_if_it_may_not_be_pushed(writable: Hub, run: Path, tmp_path: Path) -> None:
    message = refused(run, "--output", tmp_path / "out", "--push-to-hub", "others/x")
    assert "can't write to repositories of others" in message
    assert "whose repository" in refused(run, "--output", tmp_path / "out", "--push-to-hub", "x")
    assert "names no repository" in refused(run, "--output", tmp_path / "out", "--push-to-hub", "")
    two = ("--format", "ollama", "--format", "hf")
    message = refused(run, "--output", tmp_path / "out", *two, "--push-to-hub", "me/merged")
    assert "--push-to-hub: of several formats the first is pushed: ollama, whose files name those of hf" in message
    assert not (tmp_path / "out").exists()
    assert "others/x" not in writable.repos


def test_a_merged_model_is_pushed_and_names_no_path_of_this_machine(writable: Hub, run: Path, tmp_path: Path) -> None:
    report = merged(run, "--output", tmp_path / "out", "--push-to-hub", "me/merged")
    assert report["pushed_to"] == f"http://127.0.0.1:{writable.port}/me/merged"
    assert writable.repos["me/merged"].is_private
    pushed = writable.repos["me/merged"].commits[COMMIT]
    assert pushed == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert [name for name, content in pushed.items() if str(run.parent).encode() in content] == []


def test_a_push_that_fails_ends_with_1_and_keeps_the_model(writable: Hub, run: Path, tmp_path: Path) -> None:
    writable.statuses["/commit/"] = [403] * 20
    done = qlora_merge(run, "--output", tmp_path / "out", *UNCOMPARED, "--push-to-hub", "me/merged", "--public")
    assert done.exit_code == 1
    assert f"hint: Push it later: hf upload me/merged {tmp_path / 'out'}\n" in done.stderr
    assert TOKEN not in done.output
    assert (tmp_path / "out" / "config.json").is_file()
    assert not writable.repos["me/merged"].is_private
