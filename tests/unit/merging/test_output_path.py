"""The default output of a merge: inside its run, or the working directory, and never through a link."""

import json
from pathlib import Path

import pytest

from qlora_cli.errors import SettingsError
from qlora_cli.merging.merge_checks import check_merge
from qlora_cli.merging.output_directory import output_path, output_problem
from qlora_cli.settings.models import MergeCommandSettings


def merge_of(adapter: Path, output: Path | None = None) -> MergeCommandSettings:
    return MergeCommandSettings.model_validate({"merge": {"adapters": [str(adapter)], "output": output}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    (directory / "adapter").mkdir(parents=True)
    (directory / "run.json").write_text("{}")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path), "target_modules": ["q_proj"]}
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter" / "adapter_model.safetensors").touch()
    return directory


@pytest.mark.parametrize("is_run", [True, False])
@pytest.mark.parametrize("target", ["empty", "absent", "merged"])
def test_a_link_at_the_default_output_is_followed_only_if_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, is_run: bool, target: str
) -> None:
    monkeypatch.chdir(run.parent)
    adapter = run if is_run else run / "adapter"
    assert output_problem(merge_of(adapter)) is None
    (run.parent / "empty").mkdir()
    link = output_path(merge_of(adapter))
    link.symlink_to(run.parent / target)
    with pytest.raises(SettingsError, match="is a link, and is followed only if you name it"):
        check_merge(merge_of(adapter))
    if target == "empty":
        assert output_problem(merge_of(adapter, output=link)) is None
    assert not list((run.parent / "empty").iterdir())
