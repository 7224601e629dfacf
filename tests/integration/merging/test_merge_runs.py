"""Runs of every kind, trained for two steps and merged from their directories, as `qlora merge` does."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qlora_cli.errors import ModelError
from qlora_cli.events import SilentReporter
from qlora_cli.merging.merge_result import MergeResult
from qlora_cli.merging.merge_run import merge
from qlora_cli.model_files.adapter_files import ADAPTER_WEIGHTS
from qlora_cli.model_files.model_config import TOWERS
from qlora_cli.settings.choices import Device, MergeDtype
from qlora_cli.training.train_run import train
from tests.conftest import ASSETS, Recorder, train_settings, write_jsonl
from tests.support.models.experts import save_moe
from tests.support.models.loading import load, save_model
from tests.support.models.reference_models import ROWS
from tests.support.models.vision_language import FULL_MODELS, load_full, save_full
from tests.support.runs.merge_command import merge_settings
from tests.support.runs.merging import loaded_plain, plain_logits, random_run, stored
from tests.support.runs.merging import merge as merge_weights

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[20, 21, 3070, 22, 3071, 400, 1000]])
NEW_IDS = torch.tensor([[20, 3072, 21, 3073, 22]])  # of tokens that a run has added


def model(family: str = "llama", **changes: Any) -> Callable[[Path], Path]:
    """Return what writes a base of a family."""
    return lambda place: save_model(place, family, **{"vocab_size": ROWS, **changes})


UNQUANTIZED = {"quantization__method": "none"}
GROWN = {"model__new_tokens": "<a>,<b>", "model__resize_vocab": True}
KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "int8": (model(), {"quantization__method": "int8"}),
    "rsLoRA with patterns": (
        model(),
        {
            "lora__use_rslora": True,
            "lora__alpha": 8,
            "lora__rank_pattern": {"down_proj": 4, "layers.0.mlp.down_proj": 2},
            "lora__alpha_pattern": {"q_proj": 3},
        },
    ),
    "DoRA": (model(), {"lora__use_dora": True}),
    "PiSSA": (model(), {"lora__init_lora_weights": "pissa", **UNQUANTIZED}),
    "LoftQ by rsLoRA": (model(), {"lora__init_lora_weights": "loftq", "lora__use_rslora": True}),
    "whole modules of an unquantized base": (model(), {"lora__modules_to_save": "lm_head,norm", **UNQUANTIZED}),
    "a whole tied head": (model(tie_word_embeddings=True), {"lora__modules_to_save": "lm_head"}),
    "new tokens": (model(), {"model__new_tokens": "<a>,<b>"}),
    "new rows of a tied head": (model(vocab_size=3072, tie_word_embeddings=True), GROWN),
    "rows that were lacking": (model(vocab_size=3008), {"model__resize_vocab": True}),
    "new rows and a whole norm": (model(vocab_size=3072), {**GROWN, "lora__modules_to_save": "norm"}),
    "LoRA and stretched positions": (model(), {"model__rope_scaling": "yarn:2"}),
    "Conv1D": (model("gpt2"), {}),
    "experts": (lambda place: save_moe(place, "qwen3_moe"), {"lora__target_parameters": "all-experts"}),
    "experts in one": (lambda place: save_moe(place, "gpt_oss"), {"lora__target_parameters": "all-experts"}),
    "experts without adapters": (lambda place: save_moe(place, "mixtral"), {}),
    "with weights in fp32": (model("deepseek_v32"), {"lora__target_modules": "o_proj,q_a_proj"}),
    "a decoder among towers": (lambda place: save_full(place, "gemma3"), {}),
    "a mixture among towers": (lambda place: save_full(place, "qwen3_vl_moe"), {}),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of two steps, and its base."""

    kind: str
    base: Path
    path: Path

    @property
    def ids(self) -> torch.Tensor:
        """Tokens to compare on, including those that the run added."""
        return NEW_IDS if "new" in self.kind else IDS

    def merged(self, output: Path, **values: Any) -> MergeResult:
        """Merge the run as the command does."""
        return merge(merge_settings(self.path, output=output, **{"device": Device.CPU, **values}), SilentReporter())


def trained(base: Path, place: Path, kind: str, **how: Any) -> Run:
    """Train for two steps, far enough to make a measurable difference."""
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    rows = write_jsonl(place / "rows.jsonl", [json.loads(line) for line in lines])
    changed = {
        "training__max_steps": 2,
        "training__save_steps": 2,
        "training__learning_rate": 1e-2,
        "lora__rank": 4,
        **how,
    }
    return Run(
        kind=kind, base=base, path=train(train_settings(base, rows, place / "run", **changed), Recorder()).output
    )


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Return the run of a kind, which is trained once."""

    @cache
    def made(kind: str) -> Run:
        make, how = KINDS[kind]
        place = tmp_path_factory.mktemp("run")
        return trained(make(place / "base"), place, kind, **how)

    return made


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, run_of: Callable[[str], Run]) -> Run:
    return run_of(request.param)


@pytest.fixture(scope="module")
def exact(run: Run) -> MergeResult:
    """The run, merged in fp32."""
    return run.merged(run.path.with_name("exact"), dtype=MergeDtype.FP32)


def test_a_finished_pissa_run_without_its_adapter_merges_after_the_same_command_has_written_it(
    run_of: Callable[[str], Run], tmp_path: Path
) -> None:
    run = run_of("PiSSA")
    adapter = load_file(run.path / "adapter" / ADAPTER_WEIGHTS)
    shutil.rmtree(run.path / "adapter")
    with pytest.raises(ModelError, match="it was initialized by pissa, which changed its base") as refused:
        run.merged(tmp_path / "merged")
    assert "give the same qlora train command again" in str(refused.value.hint)
    trained(run.base, run.path.parent, "PiSSA", **KINDS["PiSSA"][1])
    again = load_file(run.path / "adapter" / ADAPTER_WEIGHTS)
    assert all(torch.equal(again[name], value) for name, value in adapter.items())
    done = run.merged(tmp_path / "merged", dtype=MergeDtype.FP32)
    assert done.verification is not None
    assert done.verification.passed


def test_the_merged_model_is_the_one_that_was_trained(run: Run, exact: MergeResult) -> None:
    assert exact.verification is not None
    assert exact.verification.passed
    trained_model = load(run.path)
    adapted = plain_logits(trained_model.model, run.ids)
    config = config_of(exact.output)
    if "text_config" in config:  # the test of towers loads the whole of it
        merged_logits = plain_logits(load(exact.output, **UNQUANTIZED).base, run.ids)
    else:
        loaded = loaded_plain(exact.output, "auto")
        merged_logits = plain_logits(loaded, run.ids)
        embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
        assert loaded.config.tie_word_embeddings == (head.weight is embedding.weight)
        tokenizer = AutoTokenizer.from_pretrained(exact.output)
        assert embedding.num_embeddings == head.out_features == loaded.config.vocab_size >= len(tokenizer)
        is_stretched = "model__rope_scaling" in KINDS[run.kind][1]
        positions = trained_model.base.config.rope_parameters if is_stretched else None
        assert config.get("rope_parameters") == (positions or config_of(run.base).get("rope_parameters"))
    if run.kind == "int8":  # which rounds the inputs of products too
        assert (merged_logits - adapted).norm() < 0.05 * adapted.norm()
    else:
        torch.testing.assert_close(merged_logits, adapted, rtol=1e-4, atol=1e-4)
        assert exact.verification.divergence.max_logit_difference < 1e-4
    quantized = KINDS[run.kind][1].get("quantization__method") != "none"
    assert exact.base == ("dequantized" if quantized else "original")
    assert (exact.base_choice.original is not None) == quantized  # measured


def test_weights_have_the_dtypes_of_the_base_and_else_only_these_differ(
    run: Run, exact: MergeResult, tmp_path: Path
) -> None:
    merged = merge_weights(run.path, output=tmp_path / "merged")
    before, after, in_fp32 = stored(run.base), merged.tensors, stored(exact.output)
    assert {name: after[name].dtype for name in before} == {name: value.dtype for name, value in before.items()}
    assert {name: value.shape for name, value in after.items()} == {
        name: value.shape for name, value in in_fp32.items()
    }
    assert without_dtypes(config_of(merged.directory)) == without_dtypes(config_of(exact.output))


def config_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return content


def without_dtypes(config: dict[str, Any]) -> dict[str, Any]:
    inner = {key: without_dtypes(value) for key, value in config.items() if isinstance(value, dict)}
    return {key: value for key, value in {**config, **inner}.items() if key != "dtype"}


@pytest.mark.parametrize("family", FULL_MODELS)
def test_towers_are_copied_to_the_byte_and_the_whole_model_loads_again(family: str, tmp_path: Path) -> None:
    base = save_full(tmp_path / "base", family)
    _, run = random_run(base, tmp_path)
    exact = merge_weights(run, output=tmp_path / "exact", base="dequantized", dtype="fp32")
    whole = plain_logits(load_full(exact.directory, family))
    text = plain_logits(load(exact.directory, quantization__method="none").base)
    torch.testing.assert_close(whole, text, rtol=1e-4, atol=1e-4)
    before, after = stored(base), merge_weights(run, output=tmp_path / "merged").tensors
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert not [name for name in changed if any(part in name for part in TOWERS)]


@pytest.mark.parametrize(
    "how",
    [
        {"model__rope_scaling": "yarn:2"},
        {"model__new_tokens": ",".join(f"<{number}>" for number in range(70)), "model__resize_vocab": True},
    ],
    ids=["stretched", "grown"],
)
@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "llava"])
def test_changes_to_the_decoder_are_in_the_config_of_the_whole_model(
    family: str, how: dict[str, Any], tmp_path: Path
) -> None:
    """Also if rotary positions have sections for images, which the decoder alone does not know."""
    base = save_full(tmp_path / "base", family)
    model, run = random_run(base, tmp_path, **how)
    merged = merge_weights(run, output=tmp_path / "merged", base="dequantized", dtype="fp32")
    ids = NEW_IDS + 64 * (NEW_IDS > 3000) if "model__new_tokens" in how else IDS
    whole = load_full(merged.directory, family)
    torch.testing.assert_close(plain_logits(whole, ids), plain_logits(model, ids), rtol=1e-4, atol=1e-4)
    old = json.loads((base / "config.json").read_text(encoding="utf-8"))["text_config"]["rope_parameters"]
    new = json.loads((merged.directory / "config.json").read_text(encoding="utf-8"))["text_config"]["rope_parameters"]
    assert old.keys() <= new.keys()
    assert (old == new) == ("model__new_tokens" in how)


@pytest.mark.parametrize("older", [{"rope_scaling": None, "rope_theta": 20000.0}, {"rope_theta": 20000.0}])
def test_a_config_by_transformers_4_keeps_its_names_for_positions(older: dict[str, Any], tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", vocab_size=ROWS)
    content = json.loads((base / "config.json").read_text(encoding="utf-8"))
    del content["rope_parameters"]
    (base / "config.json").write_text(json.dumps({**content, **older}), encoding="utf-8")
    model, run = random_run(base, tmp_path, model__rope_scaling="yarn:2")
    merged = merge_weights(run, output=tmp_path / "merged", base="dequantized", dtype="fp32")
    merged_logits = plain_logits(loaded_plain(merged.directory))
    torch.testing.assert_close(merged_logits, plain_logits(model), rtol=1e-4, atol=1e-4)
    written = json.loads((merged.directory / "config.json").read_text(encoding="utf-8"))
    assert "rope_parameters" not in written
    assert written["rope_theta"] == 20000.0
    assert written["rope_scaling"]["rope_type"] == "yarn"
