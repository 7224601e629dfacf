"""Which settings a prediction of memory reads: those whose field says so, and no others.

The keys of cached predictions contain these settings, and `inspect-memory` takes their flags; one read without
the mark would return the prediction of another run.
"""

from pathlib import Path

import pytest

from qlora_cli.events import SilentReporter
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.memory_report import inspect_memory
from qlora_cli.memory.prediction_cache import KEYED, key_of
from qlora_cli.memory.request import MemoryRequest
from qlora_cli.settings.models import SECTIONS, InspectMemorySettings, Section, all_settings, metadata_of
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from qlora_cli.timing.rates import rates_of
from qlora_cli.timing.rates_file import store_rates

# Factors of updates, which only pass into the config of the adapter that is attached.
SCALES = {"lora.alpha", "lora.alpha_pattern", "lora.use_rslora"}


def asked_of(base: Path, **values: str) -> Resolved[InspectMemorySettings]:
    given = {"model.name": str(base), **{name.replace("__", "."): value for name, value in values.items()}}
    return resolve(Sources(flags={path: (path, value) for path, value in given.items()}), InspectMemorySettings)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return a set to which settings read from now on are added, as `section.key`."""
    accessed: set[str] = set()
    names = {model: name for name, model in SECTIONS.items()}
    get = Section.__getattribute__

    def listen(section: Section, key: str) -> object:
        kinds = [kind for kind in type(section).__mro__ if kind in names]
        if kinds and key in type(section).model_fields:
            accessed.add(f"{names[kinds[0]]}.{key}")
        return get(section, key)

    monkeypatch.setattr(Section, "__getattribute__", listen)
    return accessed


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"quantization__method": "int8", "training__optimizer": "paged_adamw_8bit", "model__attention": "eager"},
        {"quantization__method": "none", "lora__use_dora": "true", "data__packing": "true"},
        {"training__num_gpus": "2"},
        {"training__num_gpus": "2", "training__offload_base": "true"},
    ],
)
def test_a_prediction_reads_no_setting_without_the_mark(
    base_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    read: set[str],
    values: dict[str, str],
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    asked = asked_of(base_model, data__max_length="64", **values)
    read.clear()
    inspect_memory(MemoryRequest(asked=asked, gpus=(find_gpu("RTX 4090"),)), SilentReporter())
    marked = {path for path in all_settings() if metadata_of(path).affects_memory}
    question = {path for path in all_settings() if path.startswith("inspect_memory.")}
    assert read - marked - SCALES - set(KEYED) - question == set()
    assert {"lora.rank", "data.max_length", "quantization.method", "training.optimizer"} <= read


def test_the_key_of_a_cached_prediction_has_only_what_it_depends_on(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(**values: str) -> str:
        return key_of(MemoryRequest(asked=asked_of(base_model, **values)), {"model_type": "llama"})

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "one"))  # in that of the session another run may have measured
    assert key() == key(training__learning_rate="1e-5", lora__alpha="8", data__on_long="drop")
    assert key() == key(inspect_memory__write_lock=str(tmp_path / "memory.lock"))
    assert key() == key(inspect_memory__check=str(tmp_path / "memory.lock"), inspect_memory__max_change="0.1")
    unmeasured = key()
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "other"))
    assert key() == unmeasured
    rates = rates_of("RTX 4090", 128)
    assert rates is not None
    store_rates("RTX 4090", "bf16", rates)
    assert key() != unmeasured  # by which its time is predicted
    other = [{"lora__rank": "8"}, {"data__max_length": "2048"}, {"model__attention": "eager"}]
    other += [{"output__max_checkpoints": "3"}, {"training__auto_micro_batch": "true"}]
    assert len({key(), *(key(**values) for values in other)}) == 6
