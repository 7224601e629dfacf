"""Pushing the adapter: a push that is known to fail is an error before any work, and a failed one loses nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import PushError, UsageError
from qlora_cli.events import Noted
from qlora_cli.hub.push import check_push, push_adapter, push_command, push_problem
from qlora_cli.settings.models import OutputSettings
from tests.conftest import Recorder, RunQlora, train_settings
from tests.support.processes.hub_server import COMMIT, Hub, Repo

# A warning of the client itself, about the library that it uses.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

TOKEN = "hf_" + "aBcDeFgHiJkL" * 2


def account(role: str = "write", **more: Any) -> dict[str, Any]:
    token = {"displayName": "test", "role": role, **more}
    orgs = [{"name": "team", "roleInOrg": "write"}]
    return {"type": "user", "name": "me", "orgs": orgs, "auth": {"accessToken": token}}


@pytest.fixture
def writable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, which the client of this process asks with a token that may write."""
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    hub.accounts[TOKEN] = account()
    endpoint = f"http://127.0.0.1:{hub.port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "adapter"
    path.mkdir(parents=True)
    save_file({"lora_A": torch.ones(4)}, path / "adapter_model.safetensors")
    for name, content in (("adapter_config.json", "{}"), ("chat_template.jinja", "{{ x }}"), ("merges.txt", "a b")):
        (path / name).write_text(content)
    (path / "README.md").write_text("# The card")
    for name in ("notes.md", "training_args.bin", ".env"):
        (path / name).write_text("mine")
    return path


def output(name: str | None = "me/tiny-lora", **more: Any) -> OutputSettings:
    return OutputSettings(directory=Path("run"), push_to_hub=name, **more)


def test_the_adapter_is_pushed_to_a_repository_created_for_it(writable: Hub, adapter: Path) -> None:
    recorder = Recorder()
    address = push_adapter(output(), adapter, recorder)
    repo = writable.repos["me/tiny-lora"]
    assert address == f"http://127.0.0.1:{writable.port}/me/tiny-lora"
    assert repo.is_private
    files = repo.commits[COMMIT]
    weights = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "merges.txt"]
    assert sorted(files) == ["README.md", *weights]
    assert all(content == (adapter / name).read_bytes() for name, content in files.items())
    assert any(isinstance(event, Noted) and address in event.message for event in recorder.events)


def test_an_existing_repository_is_pushed_to_and_a_new_one_may_be_public(writable: Hub, adapter: Path) -> None:
    writable.repos["team/existing"] = Repo({COMMIT: {"other.txt": b"stays"}})
    push_adapter(output("team/existing"), adapter, Recorder())
    assert {"other.txt", "adapter_model.safetensors"} <= set(writable.repos["team/existing"].commits[COMMIT])
    push_adapter(output("me/public", hub_private=False), adapter, Recorder())
    assert not writable.repos["me/public"].is_private


@pytest.mark.parametrize("part", ["/api/repos/create", "/preupload/", "/lfs/", "/commit/"])
def test_a_push_that_fails_says_how_to_push_later_and_shows_no_token(writable: Hub, adapter: Path, part: str) -> None:
    writable.statuses[part] = [403] * 20
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(PushError, match="the run is done, but its adapter was not pushed to me/tiny-lora") as caught:
        push_adapter(output(), adapter, Recorder())
    assert caught.value.exit_code == 1
    assert caught.value.hint == f"Push it later: hf upload me/tiny-lora {adapter} --private"
    assert TOKEN not in f"{caught.value} {caught.value.hint} {caught.value.__cause__}"
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


@pytest.mark.usefixtures("writable")
def test_a_hub_that_is_gone_at_the_end_is_a_failed_push(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match="was not pushed"):
        push_adapter(output(), adapter, Recorder())


def test_the_command_quotes_a_path_with_spaces() -> None:
    command = push_command(output("me/a", hub_private=False), Path("my run/adapter"))
    assert command == "hf upload me/a 'my run/adapter'"


def check(tmp_path: Path, name: str = "me/tiny-lora") -> Recorder:
    recorder = Recorder()
    settings = train_settings(tmp_path, tmp_path, tmp_path / "run", output__push_to_hub=name)
    check_push(settings.settings.output, "output.push_to_hub", recorder)
    return recorder


def fine(permission: str) -> dict[str, Any]:
    return {"scoped": [{"entity": {"type": "user", "name": "me"}, "permissions": [permission]}], "global": []}


FINE, FINE_READ = fine("repo.write"), fine("repo.content.read")


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (account(), "me/x"),
        (account(), "team/x"),
        (account("fineGrained", fineGrained=FINE), "me/x"),
        (account("fineGrained"), "me/x"),  # it does not list its permissions
        ({"name": "me"}, "me/x"),
    ],
)
def test_a_token_that_may_write_is_accepted(writable: Hub, tmp_path: Path, answer: dict[str, Any], name: str) -> None:
    writable.accounts[TOKEN] = answer
    assert check(tmp_path, name).events == []


@pytest.mark.parametrize(
    ("answer", "name", "expected"),
    [
        (account("read"), "me/x", "the token of the hub can only read"),
        (account("fineGrained", fineGrained=FINE_READ), "me/x", "may not write to repositories of me"),
        (account("fineGrained", fineGrained=FINE), "team/x", "may not write to repositories of team"),
        (account(), "other/x", "can't write to repositories of other"),
        ({**account(), "orgs": [{"name": "team", "roleInOrg": "read"}]}, "team/x", "me may only read in team"),
    ],
)
def test_a_token_that_may_not_write_is_refused_before_anything_is_loaded(
    writable: Hub, tmp_path: Path, answer: dict[str, Any], name: str, expected: str
) -> None:
    writable.accounts[TOKEN] = answer
    with pytest.raises(UsageError) as caught:
        check(tmp_path, name)
    assert caught.value.setting == "output.push_to_hub"
    assert expected in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2
    assert TOKEN not in str(caught.value)


def test_a_token_that_the_hub_does_not_know_is_refused(writable: Hub, tmp_path: Path) -> None:
    writable.accounts.clear()
    with pytest.raises(UsageError, match="does not accept the token") as caught:
        check(tmp_path)
    assert "hf auth login" in str(caught.value.hint)


@pytest.mark.parametrize("status", [429, 500])
def test_a_hub_that_is_unavailable_causes_only_a_warning(writable: Hub, tmp_path: Path, status: int) -> None:
    writable.statuses["whoami"] = [status] * 10
    (event,) = check(tmp_path).events
    assert isinstance(event, Noted)
    assert event.level == "warning"
    assert f"HTTP {status}" in event.message


def test_nothing_is_requested_if_nothing_is_pushed(hub: Hub) -> None:
    check_push(output(None), "output.push_to_hub", Recorder())
    assert hub.requests == []
    assert push_problem(output(None)) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny-lora", "does not say whose"),
        ("me/", "is no name of a repository"),
        ("me/a b", "is no name of a repository"),
        ("a/b/c", "is no name of a repository"),
        ("me/a--b", "is no name of a repository"),
    ],
)
def test_an_invalid_repository_name_is_refused(name: str, expected: str) -> None:
    problem = push_problem(output(name))
    assert problem is not None
    assert expected in problem.message
    assert problem.hint == "Give OWNER/NAME." or "OWNER/NAME: your name" in str(problem.hint)


def test_a_run_with_a_push_does_not_begin_offline_or_without_a_login(
    run_qlora: RunQlora, hub_env: dict[str, str], base_model: Path, rows: Path, tmp_path: Path, hub: Hub
) -> None:
    names = ("--model", base_model, "--dataset", rows, "--output", tmp_path / "run")
    command = ("train", *names, "--push-to-hub", "me/x")
    nobody = run_qlora(*command, env={**hub_env, "HF_TOKEN": ""})
    assert nobody.code == 2
    assert "can't be pushed to without a login" in nobody.stderr
    assert "hf auth login" in nobody.stderr
    offline = run_qlora(*command, env={**hub_env, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"})
    assert offline.code == 2
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    assert TOKEN not in offline.stderr + nobody.stderr
    assert hub.requests == []
    assert not (tmp_path / "run").exists()


TRAIN = (
    *("--dtype", "fp32", "--device", "cpu", "--max-length", "128"),
    *("--max-steps", "1", "--gradient-accumulation-steps", "1"),
)


def test_train_pushes_the_adapter_it_made(
    run_qlora: RunQlora, hub_env: dict[str, str], base_model: Path, rows: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.accounts[TOKEN] = account()
    command = ("train", "--model", base_model, "--dataset", rows, "--output", tmp_path / "run", *TRAIN, "--json")
    done = run_qlora(*command, "--push-to-hub", "me/trained", env={**hub_env, "HF_TOKEN": TOKEN})
    assert done.code == 0, done.stderr
    pushed = hub.repos["me/trained"].commits[COMMIT]
    made = tmp_path / "run" / "adapter"
    assert pushed["adapter_model.safetensors"] == (made / "adapter_model.safetensors").read_bytes()
    assert {"adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= set(pushed)
    assert str(base_model.parent) not in pushed["README.md"].decode()
    assert done.json["pushed_to"] == f"http://127.0.0.1:{hub.port}/me/trained"
    assert TOKEN not in done.stdout + done.stderr + (tmp_path / "run" / "run.json").read_text()


def test_a_run_whose_push_fails_is_done_and_ends_with_1(
    run_qlora: RunQlora, hub_env: dict[str, str], base_model: Path, rows: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.accounts[TOKEN] = account()
    hub.statuses["/commit/"] = [403] * 20
    command = ("train", "--model", base_model, "--dataset", rows, "--output", tmp_path / "run", *TRAIN)
    done = run_qlora(*command, "--push-to-hub", "me/trained", env={**hub_env, "HF_TOKEN": TOKEN})
    assert done.code == 1
    assert f"hf upload me/trained {tmp_path / 'run' / 'adapter'} --private" in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "done"
    assert load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
