"""Hub ids through the real client, against a hub on loopback: what is fetched, every refusal, and offline use."""

import json
from pathlib import Path

import pytest

from tests.conftest import RunQlora
from tests.integration.conftest import Find
from tests.support.processes.hub_server import COMMIT, OLD_COMMIT, Hub, Repo

WEIGHTS = "model.safetensors"


def test_a_hub_id_is_downloaded_and_its_commit_recorded(
    run_qlora: RunQlora, hub: Hub, hub_env: dict[str, str], rows: Path, tmp_path: Path
) -> None:
    done = run_qlora("load", "owner/tiny", "--revision", "main", "--device", "cpu", "--json", env=hub_env)
    assert done.code == 0, done.stderr
    assert (done.json["model"], done.json["revision"], done.json["commit"]) == ("owner/tiny", "main", COMMIT)
    assert "MiB downloaded" in done.stderr
    arguments = ["train", "--model", "owner/tiny", "--dataset", rows, "--output", tmp_path / "run"]
    trained = run_qlora(
        *arguments, "--max-length", "512", "--max-steps", "1", "--device", "cpu", "--json", env=hub_env
    )
    assert trained.code == 0, trained.stderr
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "owner/tiny"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["base_model"]["commit"] == COMMIT
    # The base of the run stays at that commit even after the branch has moved.
    hub.repos["owner/tiny"].refs["main"] = OLD_COMMIT
    loaded = run_qlora("load", tmp_path / "run", "--device", "cpu", "--json", env=hub_env)
    assert loaded.code == 0, loaded.stderr
    assert loaded.json["commit"] == COMMIT


GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("changes", "flags", "code", "message"),
    [
        ({"quantization_config": GPTQ}, (), 2, "is quantized with gptq"),
        ({"model_type": "bert"}, (), 2, "'bert' is an encoder"),
        ({"model_type": "wav2vec2"}, (), 2, "no causal language model for 'wav2vec2'"),
        ({"hidden_size": 2**16, "intermediate_size": 2**18, "num_hidden_layers": 80}, (), 3, "are free"),
        ({}, ("--quant", "none", "--save", "saved"), 2, "nothing is quantized"),
        ({}, ("--quant", "int8", "--error"), 2, "no 4-bit error to measure"),
        ({}, ("--rope-scaling", "yarn:2", "--chat-template", "nope"), 2, "no chat template 'nope'"),
    ],
)
def test_a_refusal_that_needs_no_weights_comes_before_they_are_downloaded(
    run_qlora: RunQlora,
    hub: Hub,
    hub_env: dict[str, str],
    tmp_path: Path,
    changes: dict[str, object],
    flags: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    files = hub.repos["owner/tiny"].commits[COMMIT]
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **changes}).encode()
    done = run_qlora("load", "owner/tiny", "--device", "cpu", *flags, env=hub_env, cwd=tmp_path)
    assert (done.code, message in done.stderr) == (code, True), done.stderr
    assert not hub.sent_from(WEIGHTS)
    assert not (tmp_path / "saved").exists()


def test_only_what_is_loaded_is_downloaded(find: Find) -> None:
    download = find("owner/tiny", is_forked=False)  # finding a model never imports torch
    names = {path.name for path in Path(download.result["path"]).iterdir()}
    assert WEIGHTS in names
    assert "tokenizer.json" in names
    assert not names & {"consolidated.safetensors", "original", "modeling.py"}
    trusting = find("owner/tiny", trust_remote_code=True)
    assert (Path(trusting.result["path"]) / "modeling.py").read_bytes() == b"bad()"


@pytest.mark.parametrize(("revision", "commit"), [("main", COMMIT), ("v1", OLD_COMMIT), (OLD_COMMIT, OLD_COMMIT)])
def test_a_branch_a_tag_and_a_commit_are_honoured(find: Find, revision: str, commit: str) -> None:
    model = find("owner/tiny", revision=revision).result
    assert (model["revision"], model["commit"], Path(model["path"]).name) == (revision, commit, commit)
    is_old = "max_new_tokens" in (Path(model["path"]) / "generation_config.json").read_text()
    assert is_old == (commit == OLD_COMMIT)


def test_a_missing_repository_or_revision_is_named(find: Find) -> None:
    error = find("owner/nothing").result
    assert error["error"] == "ModelNotFoundError"
    assert "no model at 'owner/nothing'" in error["message"]
    assert "has no revision 'gone'" in find("owner/tiny", revision="gone").result["message"]
    assert "no such repository" in find("owner/a..b").result["message"]  # the client itself refuses this one


def test_the_error_of_a_gated_repository_says_where_to_request_access(find: Find, hub: Hub) -> None:
    hub.repos["owner/tiny"].is_gated = True
    error = find("owner/tiny").result
    assert error["error"] == "ModelNotFoundError"
    assert "owner/tiny is gated" in error["message"]
    assert "https://huggingface.co/owner/tiny" in error["hint"]


def test_an_unreachable_hub_is_an_error_without_a_traceback(run_qlora: RunQlora, tmp_path: Path) -> None:
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf-home")}
    done = run_qlora("load", "owner/tiny", env=away)
    assert done.code == 2
    assert "can't be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_page_that_is_not_a_hub_is_reported(find: Find, hub: Hub) -> None:
    hub.statuses["/api/models/owner/tiny"] = [200]
    error = find("owner/tiny").result
    assert "is not from a hub" in error["message"]
    assert "HF_ENDPOINT" in error["hint"]


@pytest.mark.parametrize("away", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_complete_cache_needs_no_hub(find: Find, hub_env: dict[str, str], away: dict[str, str]) -> None:
    online = find("owner/tiny")
    offline = find("owner/tiny", env={**hub_env, **away})
    assert offline.result == online.result
    assert len(offline.notes) == ("HF_ENDPOINT" in away)  # going offline unasked is noted


@pytest.mark.parametrize(
    ("away", "reason"),
    [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE=1"), ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "ConnectError")],
)
def test_a_half_filled_cache_reports_why_the_hub_was_not_asked(
    find: Find, hub_env: dict[str, str], away: dict[str, str], reason: str
) -> None:
    error = find("owner/tiny", env={**hub_env, **away}).result
    assert reason in error["message"]
    assert "not in the local cache" in error["message"]
    online = find("owner/tiny").result
    (Path(online["path"]) / WEIGHTS).unlink()
    error = find("owner/tiny", env={**hub_env, **away}).result
    assert reason in error["message"]
    assert f"only in part: {WEIGHTS} missing" in error["message"]


def test_only_the_shards_in_the_index_are_fetched(find: Find, hub: Hub) -> None:
    files = hub.repos["owner/tiny"].commits[COMMIT]
    del files[WEIGHTS]
    shards = ["model-00001-of-00002.safetensors", "odd name.safetensors"]
    files |= {shard: shard.encode() for shard in shards} | {"unused.safetensors": b"no"}
    files[f"{WEIGHTS}.index.json"] = json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    path = Path(find("owner/tiny").result["path"])
    assert {file.name for file in path.glob("*.safetensors")} == set(shards)
    del files[shards[1]]
    hub.repos["owner/tiny"].commits[OLD_COMMIT] = files
    error = find("owner/tiny", revision=OLD_COMMIT).result
    assert f"names {shards[1]}, which the repository lacks" in error["message"]


def test_pickles_are_not_downloaded_unless_allowed(find: Find, hub: Hub) -> None:
    files = hub.repos["owner/tiny"].commits[COMMIT]
    del files[WEIGHTS], files["consolidated.safetensors"]
    files["pytorch_model.bin"] = b"a pickle"
    error = find("owner/tiny").result
    assert "only pytorch_model.bin, a pickle" in error["message"]
    assert not [request for request in hub.requests if "/resolve/" in request.path]
    download = find("owner/tiny", allow_pickle=True)
    assert (Path(download.result["path"]) / "pytorch_model.bin").read_bytes() == b"a pickle"


def adapter_config(base: str, **values: str) -> bytes:
    return json.dumps({"peft_type": "LORA", "base_model_name_or_path": base, **values}).encode()


def test_the_base_of_an_adapter_is_downloaded_at_the_revision_it_names(find: Find, hub: Hub) -> None:
    adapter = {
        "adapter_config.json": json.dumps(
            {"peft_type": "LORA", "base_model_name_or_path": "owner/tiny", "revision": "v1"}
        ).encode(),
        "adapter_model.safetensors": b"adapter",
        "tokenizer.json": b"{}",
        "optimizer.pt": b"large",
    }
    hub.repos["owner/adapter"] = Repo(commits={COMMIT: adapter})
    model = find("owner/adapter", revision="main").result
    assert (model["name"], model["base_name"]) == ("owner/adapter", "owner/tiny")
    assert (model["revision"], model["commit"], Path(model["path"]).name) == ("v1", OLD_COMMIT, OLD_COMMIT)
    assert {path.name for path in Path(model["adapter"]).iterdir()} == set(adapter) - {"optimizer.pt"}
    assert model["tokenizer_path"] == model["adapter"]
    hub.repos["owner/second"] = Repo(
        commits={
            COMMIT: {
                **adapter,
                "adapter_config.json": adapter_config("owner/adapter"),
            }
        }
    )
    assert "an adapter itself" in find("owner/second").result["message"]
    hub.repos["owner/third"] = Repo(
        commits={
            COMMIT: {
                **adapter,
                "adapter_config.json": adapter_config("owner/nothing"),
            }
        }
    )
    message = find("owner/third").result["message"]
    assert "base of the adapter owner/third" in message
    assert "no model at 'owner/nothing'" in message
