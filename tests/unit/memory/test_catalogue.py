"""The bundled catalogue: its configs build models of the published size, and each name finds its model."""

import copy
import inspect
import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig, configuration_utils, modeling_rope_utils

from qlora_cli.memory.catalogue import CatalogueModel, catalogue, find_in_catalogue, nearest_names
from qlora_cli.quantization.inventory import unique_parameters
from qlora_cli.quantization.storage_plan import build_on_meta

MODELS = catalogue()
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
BILLION, MILLION = 1e9, 1e6


def built_config(model: CatalogueModel) -> PreTrainedConfig:
    """Return the config; transformers changes its input, so it gets a copy."""
    config: PreTrainedConfig = AutoConfig.for_model(**copy.deepcopy(dict(model.config)))
    return config


def count_parameters(model: CatalogueModel) -> int:
    """Return the number of parameters of the model that the config builds, tied ones once."""
    built = build_on_meta(built_config(model), torch.bfloat16)
    return sum(parameter.numel() for _, _, parameter in unique_parameters(built))


def named_size(name: str) -> float:
    """Return the number of parameters that a name such as `llama-3.1-8b` states."""
    match = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name)
    assert match, f"{name} states no size"
    return float(match[1]) * (BILLION if match[2] == "b" else MILLION)


def test_the_catalogue_has_many_models() -> None:
    assert len(MODELS) >= 40


def test_no_two_models_share_a_name() -> None:
    spellings = [spelling.casefold() for model in MODELS for spelling in model.spellings]
    assert sorted(spellings) == sorted(set(spellings))


@each_model
def test_a_model_has_as_many_parameters_as_published(model: CatalogueModel) -> None:
    count = count_parameters(model)
    if model.num_parameters is None:
        assert "computed" in model.source
        assert count == pytest.approx(named_size(model.name), rel=0.12)
    else:
        assert count == model.num_parameters


@each_model
def test_a_config_is_plain_json_without_its_own_code(model: CatalogueModel) -> None:
    assert json.loads(json.dumps(dict(model.config))) == model.config
    assert not {"auto_map", "trust_remote_code"} & set(model.config)


@each_model
def test_transformers_reads_every_key_of_a_config(model: CatalogueModel) -> None:
    """A misspelt key would become an attribute that nothing reads, so each key must occur where configs are read."""
    modules = (inspect.getmodule(type(built_config(model))), configuration_utils, modeling_rope_utils)
    text = "\n".join(inspect.getsource(module) for module in modules if module is not None)
    assert [key for key in model.config if not re.search(rf"\b{key}\b", text)] == []


@each_model
def test_a_model_names_the_source_of_its_config_and_is_found_by_each_spelling(model: CatalogueModel) -> None:
    assert model.source
    assert "/" in model.hub_id
    for spelling in model.spellings:
        assert find_in_catalogue(spelling) is model
        assert find_in_catalogue(spelling.upper()) is model


@pytest.mark.parametrize("name", ["llama-3.1-8b", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"])
def test_a_gated_model_is_found_by_its_name_and_its_hub_ids(name: str) -> None:
    model = find_in_catalogue(name)
    assert model is not None
    assert (model.name, model.is_gated, model.num_parameters) == ("llama-3.1-8b", True, 8_030_261_248)


def test_an_unknown_name_has_no_model_but_nearest_names() -> None:
    assert find_in_catalogue("llama-3.1-9b") is None
    assert "llama-3.1-8b" in nearest_names("llama-3.1-9b")
    assert "qwen3-8b" in nearest_names("someone/Qwen3-8B")
    assert nearest_names("zzzz") == []


def test_alternating_attention_is_as_published() -> None:
    """Gemma 3: one layer in six sees the whole row, the last of each six; the rest see 1024 tokens."""
    model = find_in_catalogue("gemma-3-4b")
    assert model is not None
    config = built_config(model)
    full = [index for index, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert full == [5, 11, 17, 23, 29]
    assert config.sliding_window == 1024


def test_reading_the_catalogue_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, qlora_cli.memory.catalogue as c; c.catalogue(); print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
