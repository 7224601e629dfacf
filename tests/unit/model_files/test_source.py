"""A local name is resolved to a model, an adapter or a run, each with its base, or to an error with the reason."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import ModelError, ModelNotFoundError
from qlora_cli.model_files.given_model import check_model_name
from qlora_cli.model_files.source import find_model
from qlora_cli.settings.models import ModelSettings


def settings(name: str | Path, **values: object) -> ModelSettings:
    return ModelSettings.model_validate({"name": str(name), **values})


def problem_of(name: str | Path, **values: object) -> str:
    problem = check_model_name(settings(name, **values))
    assert problem is not None
    with pytest.raises(type(problem)):
        find_model(settings(name, **values))
    return str(problem)


def write_model(path: Path, **config: object) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"")
    return path


def write_adapter(path: Path, base: object, **config: object) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": base, **config})
    )
    (path / "adapter_model.safetensors").write_bytes(b"")
    return path


def write_run(path: Path, base: Path, *, commit: str | None = None) -> Path:
    record: dict[str, Any] = {
        "settings": {"quantization": {"method": "fp4"}, "model": {"name": "x", "rope_scaling": "yarn:2"}},
        # In a run that continued another one, `model` is that run.
        "base_model": {"model": "../other-run", "base_model": "owner/tiny" if commit else str(base), "commit": commit},
        "base_model_path": str(base),
    }
    write_adapter(path / "adapter", base="elsewhere")
    (path / "run.json").write_text(json.dumps(record))
    return path


def test_names_are_checked_before_any_library_is_imported() -> None:
    code = (
        "import sys\n"
        "import qlora_cli.model_files.source, qlora_cli.model_files.checkpoint\n"
        "print(*{'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_local_model_is_its_own_base(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    source = find_model(settings(model))
    assert (source.name, source.base_name) == (str(model), str(model))
    assert source.path == source.tokenizer_path == model
    assert (source.adapter, source.run_quantization, source.commit, source.revision) == (None, None, None, None)


def test_a_path_without_a_model_is_reported_at_once(tmp_path: Path) -> None:
    assert "no such directory" in problem_of(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "is a file" in problem_of(tmp_path / "file")
    assert "has no config.json" in problem_of(tmp_path)
    assert "not a hub id" in problem_of("a/b/c")
    model = write_model(tmp_path / "model")
    assert "a revision (v1) has no meaning" in problem_of(model, revision="v1")
    (model / "adapter_config.json").write_text("{}")
    assert "both a whole model (model.safetensors) and an adapter" in problem_of(model)


def test_pickles_are_refused_unless_allowed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "only pytorch_model.bin, a pickle" in problem_of(model)
    assert find_model(settings(model, allow_pickle=True)).path == model
    adapter = write_adapter(tmp_path / "adapter", base=str(write_model(tmp_path / "base")))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "is a pickle (adapter_model.bin)" in problem_of(adapter)
    assert find_model(settings(adapter, allow_pickle=True)).adapter == adapter
    (adapter / "adapter_model.bin").unlink()
    assert "has no adapter_model.safetensors" in problem_of(adapter, allow_pickle=True)


@pytest.mark.parametrize("base", ["{absolute}", "../base", "base-in-cwd"])
def test_the_base_of_an_adapter_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    expected = write_model(tmp_path / ("base" if base != "base-in-cwd" else "cwd/base-in-cwd"))
    (tmp_path / "cwd").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "cwd")
    adapter = write_adapter(tmp_path / "adapter", base=base.format(absolute=expected))
    source = find_model(settings(adapter))
    assert (source.path, source.base_name, source.adapter) == (expected, str(expected), adapter)
    assert source.name == str(adapter)
    assert source.tokenizer_path == expected
    (adapter / "tokenizer.json").write_text("{}")
    assert find_model(settings(adapter)).tokenizer_path == adapter


def test_a_missing_base_is_reported_with_the_searched_paths(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base="../gone")
    with pytest.raises(ModelNotFoundError) as caught:
        find_model(settings(adapter))
    assert f"is ../gone, which does not exist (looked for {Path.cwd() / '../gone'} and " in str(caught.value)
    assert str(adapter / "../gone") in str(caught.value)
    assert "--base-model BASE" in str(caught.value.hint)
    moved = write_model(tmp_path / "moved")
    assert find_model(settings(adapter, base_model=str(moved))).path == moved


def test_another_base_has_no_effect_on_a_whole_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    assert "model.base_model: x has no effect" in problem_of(model, base_model="x")


@pytest.mark.parametrize(("base", "expected"), [(None, "does not name its base"), ("{adapter}", "an adapter itself")])
def test_an_adapter_without_a_base_or_on_an_adapter_is_refused(
    tmp_path: Path, base: str | None, expected: str
) -> None:
    other = write_adapter(tmp_path / "other", base="x")
    adapter = write_adapter(tmp_path / "adapter", base=base and base.format(adapter=other))
    with pytest.raises(ModelError, match=expected):
        find_model(settings(adapter))


def test_an_error_of_a_base_names_the_adapter(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    adapter = write_adapter(tmp_path / "adapter", base=str(tmp_path / "base"))
    with pytest.raises(ModelError, match=rf"base of the adapter {adapter}: .* has no config.json"):
        find_model(settings(adapter))


def test_a_run_directory_is_its_adapter_with_the_base_and_quantization_of_the_run(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    run = write_run(tmp_path / "run", base)
    source = find_model(settings(run))
    assert (source.path, source.adapter, source.name) == (base, run / "adapter", str(run))
    assert source.run_quantization == {"method": "fp4"}
    assert source.run_model == {"name": "x", "rope_scaling": "yarn:2"}
    # The parts of a run are adapters on the run's base too, quantized as in the run.
    for part in (run / "adapter", write_adapter(run / "checkpoints" / "step-2", base="elsewhere")):
        source_of_part = find_model(settings(part))
        assert (source_of_part.path, source_of_part.adapter) == (base, part)
        assert (source_of_part.run_quantization, source_of_part.run_model) == (
            source.run_quantization,
            source.run_model,
        )
    elsewhere = find_model(settings(write_adapter(tmp_path / "alone", base=str(base))))
    assert (elsewhere.run_quantization, elsewhere.run_model) == (None, None)


def test_the_base_of_a_run_from_the_hub_is_requested_at_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", tmp_path / "cache", commit="0123456789abcdef0123456789abcdef01234567")
    # A directory of that name is another model.
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "owner" / "tiny")
    with pytest.raises(ModelNotFoundError, match="no model at 'owner/tiny'"):  # the tests are offline
        find_model(settings(run))


def test_a_run_without_an_adapter_or_a_record_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    (run / "run.json").write_text("{}")
    with pytest.raises(ModelError, match="does not say what the run was based on"):
        find_model(settings(run))
    (run / "adapter").rename(run / "away")
    assert "has no weights yet: no adapter, and no undamaged checkpoint" in problem_of(run)


def test_code_from_another_repository_is_not_trusted(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", auto_map={"AutoModelForCausalLM": "other/repo--modeling.Model"})
    assert find_model(settings(model)).path == model  # no code is run
    with pytest.raises(ModelError, match=r"takes modeling\.Model from another repository, other/repo"):
        find_model(settings(model, trust_remote_code=True))
    own = write_model(tmp_path / "own", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    assert find_model(settings(own, trust_remote_code=True)).path == own
    (own / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "other/repo--fast.Fast"]}}')
    with pytest.raises(
        ModelError, match=r"tokenizer_config.json takes fast\.Fast from another repository, other/repo"
    ):
        find_model(settings(own, trust_remote_code=True))


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 5000, "./" + "a" * 5000, "./" + "a/" * 5000, "a\0b"])
def test_a_name_that_cannot_be_a_path_is_a_missing_model(tmp_path: Path, name: str) -> None:
    assert "no model at" in problem_of(name)
    adapter = write_adapter(tmp_path / "adapter", base=name)
    with pytest.raises(ModelNotFoundError, match="which does not exist"):
        find_model(settings(adapter))


@pytest.mark.parametrize("key", [None, "quantization", "model"])
@pytest.mark.parametrize("value", [[], "x", 3, None])
def test_a_run_record_with_invalid_settings_is_refused(tmp_path: Path, key: str | None, value: object) -> None:
    run = write_run(tmp_path / "run", write_model(tmp_path / "base"))
    record = json.loads((run / "run.json").read_text())
    if key is None:
        record["settings"] = value
    else:
        record["settings"][key] = value
    (run / "run.json").write_text(json.dumps(record))
    for part in (run, run / "adapter", write_adapter(run / "checkpoints" / "step-2", base="elsewhere")):
        with pytest.raises(ModelError, match=re.escape(f"{run / 'run.json'} does not say")) as caught:
            find_model(settings(part))
        assert "qlora train" in str(caught.value.hint)


def test_a_run_record_without_a_base_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", write_model(tmp_path / "base"), commit="0123")
    record = json.loads((run / "run.json").read_text())
    record["base_model"]["base_model"] = 5
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="does not say what the run was based on"):
        find_model(settings(run))


def test_code_from_another_repository_in_an_adapter_is_not_trusted(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base=str(write_model(tmp_path / "base")))
    (adapter / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "evil/repo--tok.Own"]}}')
    assert find_model(settings(adapter)).adapter == adapter  # no code is run
    with pytest.raises(ModelError, match=r"takes tok\.Own from another repository, evil/repo"):
        find_model(settings(adapter, trust_remote_code=True))


def test_an_incomplete_directory_is_an_error_that_names_present_and_missing_files(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    assert "has model-00001-of-00002.safetensors, but not model.safetensors.index.json" in problem_of(model)
    adapter = write_adapter(tmp_path / "adapter", base=str(model))
    (adapter / "adapter_config.json").unlink()
    assert "has the weights of an adapter, but no adapter_config.json" in problem_of(adapter)


# ---- names that are listed, but are not files

NO_FILES = {
    "a link to nothing": "it is a link to nowhere, which does not exist",
    "a directory": "it is not a regular file",
}


def put_in_place(file: Path, kind: str) -> None:
    file.unlink(missing_ok=True)
    if kind == "a directory":
        file.mkdir()
    else:
        file.symlink_to("nowhere")


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_a_base_whose_weights_are_not_a_regular_file_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    (base / "model.safetensors").unlink()
    put_in_place(base / name, kind)
    assert problem_of(base, allow_pickle=True) == f"{base / name} can't be read: {NO_FILES[kind]}"
    adapter = write_adapter(tmp_path / "adapter", base=str(base))
    with pytest.raises(ModelError, match=rf"^the base of the adapter .*{re.escape(NO_FILES[kind])}"):
        find_model(settings(adapter, allow_pickle=True))


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "tokenizer.json"])
def test_an_adapter_whose_files_are_not_regular_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base=str(write_model(tmp_path / "base")))
    if name.startswith("adapter_model"):
        (adapter / "adapter_model.safetensors").unlink()
    put_in_place(adapter / name, kind)
    assert problem_of(adapter, allow_pickle=True) == f"{adapter / name} can't be read: {NO_FILES[kind]}"


def test_a_dangling_link_next_to_the_weights_is_ignored(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    put_in_place(base / "pytorch_model.bin", "a link to nothing")
    assert check_model_name(settings(base, allow_pickle=True)) is None
