"""What a run takes besides the GPU: host memory, disk, and a download."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.memory.costs.host_memory import PROCESS_LOW_BYTES, PROCESSES_OF_HOST, host_memory, with_host
from qlora_cli.memory.costs.run_files import FileSizes, has_weights, weights_bytes
from qlora_cli.memory.model_facts import find_model_facts
from qlora_cli.memory.prediction import HostMemory
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.settle import resolved_in_code
from qlora_cli.units import GIB
from tests.conftest import Recorder
from tests.support.models.predictions import FIGURES

SIZES = st.integers(0, 64 * GIB)


def band(host: HostMemory) -> tuple[int, int, int]:
    figures = with_host(FIGURES, host)
    assert figures.host_bytes is not None
    assert figures.host_bytes_low is not None
    assert figures.host_bytes_high is not None
    return figures.host_bytes_low, figures.host_bytes, figures.host_bytes_high


@given(
    host=st.builds(
        host_memory,
        largest_weight_bytes=SIZES,
        embedding_bytes=SIZES,
        shard_bytes=SIZES,
        pinned_bytes=SIZES,
        paged_bytes=SIZES,
        files=st.builds(FileSizes, adapter_bytes=SIZES, optimizer_bytes=SIZES),
        num_rows=st.integers(0, 10**8),
        num_processes=st.integers(1, 64),
    ),
    name=st.sampled_from(
        [
            *("embedding_bytes", "shard_bytes", "rows_bytes", "reading_bytes"),
            *("pinned_bytes", "saving_bytes", "paged_bytes"),
        ]
    ),
)
def test_the_hosts_memory_lies_in_its_band_and_no_part_makes_it_less(host: HostMemory, name: str) -> None:
    low, middle, high = band(host)
    assert PROCESS_LOW_BYTES <= low <= middle <= high
    more = band(replace(host, **{name: getattr(host, name) + GIB}))
    assert all(after >= before for before, after in zip((low, middle, high), more, strict=True))
    parts = sum(size for part, size in vars(host).items() if part not in ("paged_bytes", "num_processes"))
    alone = band(replace(host, num_processes=1))[1]
    assert alone <= middle <= host.num_processes * alone
    assert alone <= parts
    assert 1 <= host.num_processes <= PROCESSES_OF_HOST


def test_loading_and_training_do_not_add_up() -> None:
    files = FileSizes(adapter_bytes=GIB, optimizer_bytes=2 * GIB)
    loads = host_memory(
        largest_weight_bytes=8 * GIB, embedding_bytes=0, pinned_bytes=GIB, paged_bytes=0, files=files, num_rows=0
    )
    assert band(loads)[1] == loads.process_bytes + 8 * GIB
    assert band(replace(loads, reading_bytes=GIB))[1] == loads.process_bytes + 4 * GIB


@given(most=st.integers(1, 20), best=st.booleans(), adapter=SIZES, optimizer=SIZES)
def test_the_disk_holds_one_checkpoint_more_than_are_kept(most: int, best: bool, adapter: int, optimizer: int) -> None:
    files = FileSizes(adapter_bytes=adapter, optimizer_bytes=optimizer)
    size = files.disk_bytes(max_checkpoints=most, keeps_best=best)
    assert size - files.disk_bytes(max_checkpoints=most - 1, keeps_best=best) == files.checkpoint_bytes
    assert size >= (most + 1 + best) * (adapter + optimizer) + adapter


@pytest.mark.parametrize(
    ("config", "quantized", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, None, 2000),
        ({"dtype": "float32"}, None, 4000),
        ({"torch_dtype": "torch.float32"}, None, 4000),
        ({}, None, 2000),
        ({"dtype": "bfloat16"}, 567, 567),
    ],
)
def test_weight_files_have_the_dtype_of_the_config(
    config: dict[str, str], quantized: int | None, expected: int
) -> None:
    assert weights_bytes(config, 1000, quantized) == expected


def test_weights_are_here_if_all_their_files_are(tmp_path: Path) -> None:
    assert not has_weights(None)
    assert not has_weights(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    assert not has_weights(tmp_path)
    (tmp_path / "model-2.safetensors").touch()
    assert has_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert not has_weights(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert has_weights(tmp_path)


def is_here(name: str) -> bool:
    """Return whether the weights of a model lie on this disk, as `inspect-memory` finds it by its name."""
    asked = resolved_in_code(EstimateSettings.model_validate({"model": {"name": name}}))
    return any(map(has_weights, find_model_facts(asked, Recorder()).weight_directories))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"])
def test_a_model_of_the_catalogue_is_here_if_the_cache_of_the_hub_has_its_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert not is_here(name)
    repository = name if "/" in name else "meta-llama/Llama-3.1-8B"
    folder, commit = tmp_path / repo_folder_name(repo_id=repository, repo_type="model"), 40 * "a"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    assert not is_here(name)
    (folder / "refs" / "main").write_text(commit)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1.safetensors").touch()
    assert not is_here(name)
    (snapshot / "model-2.safetensors").touch()
    assert is_here(name)
    assert not is_here("mistralai/Mistral-7B-v0.1")
    for damaged in ("../../../..", "b" * 40, ""):
        (folder / "refs" / "main").write_text(damaged)
        assert not is_here(name)
