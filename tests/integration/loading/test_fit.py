"""A model that does not fit is refused before a weight is read, with both sizes and the smallest change that fits."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.synthetic import SHAPES, config_of, num_parameters, write_model
from qlora_cli.errors import OutOfMemoryError
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.quantization.memory_check import Shards, check_fit, check_host_fit, needed_bytes
from qlora_cli.quantization.storage_plan import StoragePlan, build_on_meta, plan_layout
from qlora_cli.ranks.group import ALONE
from qlora_cli.settings.models import QuantizationSettings
from qlora_cli.training.sharding import sharded_base
from qlora_cli.units import GIB, format_bytes
from tests.conftest import Recorder, RunQlora, train_settings
from tests.support.models.loading import asked_load
from tests.support.models.tiny_models import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the latter is only a label: nothing is allocated on it
SIZES = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


@pytest.fixture(scope="module")
def enormous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama-3.1-405B, complete but for its weights: sparse files of 756 GiB that take no space on the disk."""
    directory = tmp_path_factory.mktemp("models") / "llama-405b"
    write_model(directory, SHAPES["405b"], sparse=True)
    stats = [file.stat() for file in directory.glob("*.safetensors")]
    assert sum(stat.st_size for stat in stats) > 2 * num_parameters(SHAPES["405b"]) > 750 * GIB
    if sum(512 * stat.st_blocks for stat in stats) > GIB:
        pytest.skip("this file system has no sparse files")
    return directory


def sizes_in(text: str) -> list[float]:
    return [float(number) * SIZES[unit] for number, unit in re.findall(r"([\d.]+) (KiB|MiB|GiB)", text)]


# ---- at once, from the command line


@pytest.mark.parametrize("method", ["nf4", "int8", "none"])
def test_a_model_of_hundreds_of_gigabytes_is_refused_with_exit_code_3_and_both_numbers(
    enormous: Path, run_qlora: RunQlora, method: str
) -> None:
    done = run_qlora("load", enormous, "--device", "cpu", "--dtype", "bf16", "--quant", method)
    assert done.code == 3, done.stderr
    assert done.stdout == ""
    match = re.search(r"needs (.+?) on cpu, and (.+?) are free", " ".join(done.stderr.split()))
    assert match, done.stderr
    needed, free = sizes_in(match[0])
    model = build_on_meta(shapes_config("405b"), torch.bfloat16)
    layout = plan_layout(model, QuantizationSettings(method=method), torch.bfloat16, device=CPU)
    assert match[1] == format_bytes(needed_bytes(layout))
    assert 0 < free < needed
    assert "Loading" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_refusal_is_an_object_with_json(enormous: Path, run_qlora: RunQlora) -> None:
    done = run_qlora("load", enormous, "--device", "cpu", "--json")
    assert done.code == 3, done.stderr
    error = done.json["error"]
    assert (error["type"], error["exit_code"]) == ("OutOfMemoryError", 3)
    assert len(sizes_in(error["message"])) == 2
    assert "Use a smaller model or a machine with more memory." in error["hint"]


def test_train_refuses_it_before_the_data_are_read_or_anything_is_written(
    enormous: Path, run_qlora: RunQlora, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    # The first rows are checked before the model is, later rows are not.
    rows.write_text('{"text": "a row"}\n' * 200 + '{"text": 5}\n', encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    flags = ("--model", enormous, "--dataset", rows, "--output", tmp_path / "run", "--device", "cpu")
    done = run_qlora("train", *flags)
    assert done.code == 3, done.stderr
    assert "are free" in done.stderr
    assert "Reading" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    # With a model that fits, the row is the error.
    other = run_qlora("train", *flags, "--model", tiny_model_with_tokenizer(tmp_path))
    assert other.code == 2
    assert "rows.jsonl, row 201" in other.stderr


def tiny_model_with_tokenizer(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    write_model(directory, SHAPES["tiny"])
    return directory


def test_a_plan_is_refused_too(enormous: Path, rows: Path, tmp_path: Path) -> None:
    from qlora_cli.training.run_plan import prepare_run

    with pytest.raises(OutOfMemoryError) as caught:
        prepare_run(train_settings(enormous, rows, tmp_path / "run", model__dtype="bf16"), Recorder())
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert not (tmp_path / "run").exists()


# ---- what is proposed


def shapes_config(size: str) -> Any:
    from transformers import AutoConfig

    values = config_of(SHAPES[size])
    return AutoConfig.for_model(values.pop("model_type"), **values)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """Llama-3.1-8B, whose head is a weight of its own."""
    return build_on_meta(shapes_config("8b"), torch.bfloat16)


@pytest.fixture(scope="module")
def tied() -> PreTrainedModel:
    """Llama-3.2-1B, whose head is the embedding."""
    return build_on_meta(shapes_config("1b"), torch.bfloat16)


def plan(model: PreTrainedModel, device: torch.device, **settings: Any) -> StoragePlan:
    return plan_layout(model, QuantizationSettings(**settings), torch.bfloat16, device=device)


def refusal(
    model: PreTrainedModel, device: torch.device, free: int, *, offload: bool = False, **settings: Any
) -> OutOfMemoryError:
    """Return the error that refuses `model` with `free` bytes."""
    with pytest.raises(OutOfMemoryError) as caught:
        check_fit("a-model", model, plan(model, device, **settings), device, free, offload_embedding=offload)
    return caught.value


def fits(model: PreTrainedModel, device: torch.device, free: int, *, offload: bool = False, **settings: Any) -> bool:
    try:
        check_fit("a-model", model, plan(model, device, **settings), device, free, offload_embedding=offload)
    except OutOfMemoryError:
        return False
    return True


# The settings and the device, the flags that are proposed, and the settings that these set.
OFFLOAD = {"offload": True}
PROPOSALS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("cpu", {"method": "none"}, "--quant int8", {"method": "int8"}),
    ("cpu", {"method": "none"}, "--quant nf4", {"method": "nf4"}),
    ("cpu", {"method": "int8"}, "--quant nf4", {"method": "nf4"}),
    ("cpu", {"double_quant": False}, "--double-quant", {}),
    ("cpu", {"method": "fp4", "double_quant": False}, "--double-quant", {"method": "fp4"}),
    ("cuda", {}, "--offload-embedding", OFFLOAD),
    ("cuda", {"method": "none"}, "--offload-embedding", {"method": "none", **OFFLOAD}),
    ("cuda", {"method": "int8"}, "--offload-embedding", {"method": "int8", **OFFLOAD}),
    ("cuda", {"method": "none"}, "--quant int8", {"method": "int8"}),
    ("cuda", {"method": "none"}, "--quant int8 --offload-embedding", {"method": "int8", **OFFLOAD}),
    ("cuda", {"method": "none"}, "--quant nf4", {"method": "nf4"}),
    ("cuda", {"method": "none"}, "--quant nf4 --offload-embedding", {"method": "nf4", **OFFLOAD}),
    ("cuda", {"method": "int8"}, "--quant nf4 --offload-embedding", {"method": "nf4", **OFFLOAD}),
    ("cuda", {"double_quant": False}, "--double-quant --offload-embedding", OFFLOAD),
]


@pytest.mark.parametrize(("device", "asked", "flags", "changed"), PROPOSALS, ids=lambda value: str(value))
def test_the_proposed_change_fits_exactly_into_the_bytes_it_needs(
    llama: PreTrainedModel, device: str, asked: dict[str, Any], flags: str, changed: dict[str, Any]
) -> None:
    where = torch.device(device)
    settings = {key: value for key, value in changed.items() if key != "offload"}
    offload = "offload" in changed
    enough = needed_bytes(plan(llama, where, **settings), offload_embedding=offload)
    error = refusal(llama, where, enough, **asked)
    assert error.hint == f"{flags} would fit: {format_bytes(enough)}."
    assert fits(llama, where, enough, offload=offload, **settings)
    assert not fits(llama, where, enough - 1, offload=offload, **settings)
    asked_bytes = needed_bytes(plan(llama, where, **asked))
    message = f"a-model needs {format_bytes(asked_bytes)} on {device}, and {format_bytes(enough)} are free"
    assert str(error) == message
    # With one byte less, it is no longer proposed.
    assert refusal(llama, where, enough - 1, **asked).hint != error.hint


def test_the_fitting_change_that_alters_the_model_least_is_proposed_first(llama: PreTrainedModel) -> None:
    enough = needed_bytes(plan(llama, CUDA, method="none"), offload_embedding=True)
    assert (
        refusal(llama, CUDA, enough, method="none").hint == f"--offload-embedding would fit: {format_bytes(enough)}."
    )
    hint = refusal(llama, CUDA, enough - 1, method="none").hint
    assert hint is not None
    assert hint.startswith("--quant int8 would fit")


def test_offloading_a_tied_embedding_is_not_proposed(tied: PreTrainedModel) -> None:
    needed = needed_bytes(plan(tied, CUDA))
    hint = refusal(tied, CUDA, needed - 1).hint
    assert hint is not None
    assert "--offload-embedding" not in hint


def test_int8_is_not_proposed_for_a_model_with_fused_experts() -> None:
    model = build_on_meta(shapes_config("2b-moe"), torch.bfloat16)
    hint = refusal(model, CPU, needed_bytes(plan(model, CPU, method="none")) - 1, method="none").hint
    assert hint == f"--quant nf4 would fit: {format_bytes(needed_bytes(plan(model, CPU)))}."


@pytest.mark.parametrize(("device", "other"), [(CPU, "a machine with more memory"), (CUDA, "a device with more")])
def test_if_nothing_fits_the_smallest_need_is_named(llama: PreTrainedModel, device: torch.device, other: str) -> None:
    least = needed_bytes(plan(llama, device), offload_embedding=device == CUDA)
    cases: list[dict[str, Any]] = [{}, {"method": "none"}, {"method": "int8"}]
    for asked in cases:
        hint = refusal(llama, device, least - 1, **asked).hint
        assert hint is not None
        assert f"the smallest takes {format_bytes(least)}" in hint
        assert other in hint


def test_proposed_changes_keep_skipped_modules_skipped(llama: PreTrainedModel) -> None:
    skipped = ("down_proj",)
    enough = needed_bytes(plan(llama, CPU, skip_modules=skipped))
    cases: list[tuple[str, dict[str, Any]]] = [
        ("--double-quant", {"double_quant": False}),
        ("--quant nf4", {"method": "int8"}),
    ]
    for flags, asked in cases:
        error = refusal(llama, CPU, enough, skip_modules=skipped, **asked)
        assert error.hint == f"{flags} would fit: {format_bytes(enough)}."


def test_proposed_changes_keep_an_offloaded_embedding_offloaded(llama: PreTrainedModel) -> None:
    enough = needed_bytes(plan(llama, CUDA), offload_embedding=True)
    error = refusal(llama, CUDA, enough, offload=True, method="int8")
    assert error.hint == f"--quant nf4 would fit: {format_bytes(enough)}."


def test_an_offloaded_embedding_is_subtracted_from_what_the_device_needs() -> None:
    model = build_on_meta(tiny_config("llama"), torch.bfloat16)
    layout = plan(model, CUDA)
    assert needed_bytes(layout) - needed_bytes(layout, offload_embedding=True) == 2 * 128 * 64
    assert needed_bytes(layout) == layout.inventory.total_bytes + layout.transient_bytes


@pytest.mark.parametrize("number", [2, 3, 8])
def test_of_a_sharded_model_less_is_proposed_and_of_the_same_shards(llama: PreTrainedModel, number: int) -> None:
    shards, layout = Shards(number=number), plan(llama, CUDA)
    on_host = Shards(number=number, on_host=True)
    enough = needed_bytes(layout, shards=on_host)
    constants = sum(entry.constant_bytes for entry in layout.inventory.entries)
    assert enough == constants + layout.transient_bytes
    for free, hint in ((enough, f"--offload-base would fit: {format_bytes(enough)}."), (enough - 1, "in no format")):
        with pytest.raises(OutOfMemoryError) as caught:
            check_fit("a-model", llama, layout, CUDA, free, offload_embedding=False, shards=shards)
        assert hint in (caught.value.hint or "")
        assert "--offload-embedding" not in (caught.value.hint or "")
    check_fit("a-model", llama, layout, CUDA, enough, offload_embedding=False, shards=on_host)


@pytest.mark.parametrize(("number", "on_this_host"), [(2, 2), (8, 4), (3, 1)])
def test_shards_on_the_host_have_to_fit_there_with_those_of_all_its_processes(
    llama: PreTrainedModel, number: int, on_this_host: int
) -> None:
    layout, shards = plan(llama, CUDA), Shards(number=number, on_host=True)
    enough = on_this_host * sum(entry.weight_bytes for entry in layout.inventory.entries) // number
    check_host_fit("a-model", layout, shards, on_this_host, enough)
    with pytest.raises(OutOfMemoryError, match=f"shards, {on_this_host} of {number}, and") as caught:
        check_host_fit("a-model", layout, shards, on_this_host, enough - 1)
    assert "--offload-base" in (caught.value.hint or "")
    assert format_bytes(enough) in caught.value.message


def test_shards_are_kept_on_the_host_only_if_they_fit_there(base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_plan = plan_load(asked_load(base_model), Recorder())
    monkeypatch.setattr(sharded_base, "free_bytes", lambda _: 0)
    with pytest.raises(OutOfMemoryError, match="0 B are free"):
        sharded_base.kept_shards(load_plan, ALONE, on_host=True)
    assert not sharded_base.kept_shards(load_plan, ALONE, on_host=False).on_host
