"""Files next to merged weights work elsewhere: configs, tokenizer, template, card, index; also in each format."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_cli.merging.output_formats import RequestedFormats
from qlora_cli.merging.verifying import comparison
from qlora_cli.merging.verifying.streamed import StreamedModel
from qlora_cli.settings.choices import ExportFormat
from tests.support.models.loading import copy_tokenizer, logits
from tests.support.processes.plain_python import PlainPython
from tests.support.runs.merge_command import (
    UNCOMPARED,
    adapter_alone,
    copy_run,
    merge_settings,
    merged,
    qlora_merge,
    refused,
    trained_run,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CONVERTER = Path(__file__).parents[2] / "support" / "runs" / "gguf_converter.py"
GGUF = ("--format", "gguf", "--llama-cpp", CONVERTER)
ANSWER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(report.values()), report
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "What is a list?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
print(model.dtype, answer.shape[1] > inputs["input_ids"].shape[1], sorted(set(sys.modules) & {"peft", "qlora_cli"}))
"""


@pytest.fixture(scope="module")
def run(shallow_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("merge"), shallow_base)


@pytest.fixture(scope="module")
def result(run: Path) -> dict[str, Any]:
    """The command's report on a merge of the run into its own directory."""
    return merged(run)


@pytest.fixture(scope="module")
def model(run: Path, result: dict[str, Any]) -> Path:
    assert result["output"] == str(run / "merged")
    return run / "merged"


@pytest.fixture(scope="module")
def formats(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The directory of a merge into all formats at once, and the command's report on it."""
    output = tmp_path_factory.mktemp("formats") / "all"
    names = [part for name in ("hf", "nf4", "ollama", "gguf-lora") for part in ("--format", name)]
    return output, merged(run, "--output", output, *names, *GGUF)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


# ---- files next to the weights


def test_plain_transformers_loads_and_prompts_it_in_a_process_of_its_own(
    plain_python: PlainPython, model: Path
) -> None:
    done = plain_python(ANSWER, model)
    assert done.stdout == "torch.bfloat16 True []\n", done.stderr


def test_the_config_is_that_of_the_base_and_the_tokenizer_is_that_of_the_run(run: Path, model: Path) -> None:
    base, config = read(run.parent / "base" / "config.json"), read(model / "config.json")
    assert config == base
    assert (model / "chat_template.jinja").read_bytes() == (run / "adapter" / "chat_template.jinja").read_bytes()
    of_run, of_result = (AutoTokenizer.from_pretrained(place) for place in (run / "adapter", model))
    assert of_result.get_vocab() == of_run.get_vocab()
    assert (of_result.eos_token, of_result.pad_token) == (of_run.eos_token, of_run.pad_token)


def test_it_ends_as_trained_and_pads_with_a_token_that_is_no_end(run: Path, tmp_path: Path) -> None:
    own = copy_run(run, tmp_path / "own")
    base = own.parent / "base"
    generation = read(base / "generation_config.json") | {"eos_token_id": 2, "temperature": 0.7, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps({**generation, "pad_token_id": 2}))
    merged(own, *UNCOMPARED)
    tokenizer = AutoTokenizer.from_pretrained(own / "merged")
    generated = GenerationConfig.from_pretrained(own / "merged")
    assert generated.eos_token_id == [tokenizer.eos_token_id, 2]
    assert generated.pad_token_id == tokenizer.pad_token_id
    assert generated.pad_token_id not in generated.eos_token_id
    assert (generated.temperature, generated.do_sample) == (0.7, True)


def test_a_base_without_a_generation_config_gets_one_that_ends(run: Path, tmp_path: Path) -> None:
    own = copy_run(run, tmp_path / "own")
    (own.parent / "base" / "generation_config.json").unlink()
    merged(own, *UNCOMPARED)
    made = read(own / "merged" / "generation_config.json")
    assert (made["eos_token_id"], made["pad_token_id"]) == (4, 0)


def test_licences_are_copied(run: Path, tmp_path: Path) -> None:
    own = copy_run(run, tmp_path / "own")
    (own.parent / "base" / "LICENSE.txt").write_text("terms")
    (own.parent / "base" / "notes.txt").write_text("not ours to spread")
    merged(own, *UNCOMPARED)
    assert (own / "merged" / "LICENSE.txt").read_text() == "terms"
    assert not (own / "merged" / "notes.txt").exists()


def test_shards_keep_their_names_and_the_index_its_exact_size(run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype="auto").save_pretrained(base, max_shard_size="2MB")
    copy_tokenizer(base)
    adapter = adapter_alone(run, tmp_path / "alone")
    report = merged(adapter, "--base-model", base, "--output", tmp_path / "out", *UNCOMPARED)
    index = read(tmp_path / "out" / "model.safetensors.index.json")
    assert index["weight_map"] == read(base / "model.safetensors.index.json")["weight_map"]
    sizes = 0
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / file, "pt") as stored:
            names = list(stored.keys())
            assert {index["weight_map"][name] for name in names} == {file}
            sizes += sum(stored.get_tensor(name).nbytes for name in names)
    assert index["metadata"]["total_size"] == sizes
    assert report["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


# ---- card and record


def test_the_card_says_what_it_is_made_of_and_how_it_was_verified(
    run: Path, model: Path, result: dict[str, Any]
) -> None:
    _, front, text = (model / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "# run-merged" in text
    table = [line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| ") and len(line) > 7]
    rows = {cells[0]: cells[1] for cells in table}
    fingerprint = read(run / "run.json")["data"]["train"]["fingerprint"]
    assert rows["adapter"] == "`run`: LoRA of rank 16"
    assert fingerprint in rows["trained on"]
    assert rows["merged into"].startswith(
        "the dequantized weights of the base (the mean KL divergence from the trained model"
    )
    divergence = result["verification"]["divergence"]
    assert (
        f"over {divergence['num_tokens']} tokens: mean KL divergence {divergence['mean_kl']:.2g} nats"
        in rows["verified"]
    )


def test_the_record_holds_the_result_of_the_command_without_paths(
    run: Path, model: Path, result: dict[str, Any]
) -> None:
    record = read(model / "merge.json")
    for key in ("verification", "base", "base_choice", "num_tensors", "num_merged_tensors", "dtype", "commit"):
        assert record[key] == result[key]
    digest = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    steps = read(run / "run.json")["result"]["steps"]
    adapter = {"name": "run", "weight": 1.0, "kind": "LoRA of rank 16", "sha256": digest}
    assert record["adapters"] == [{**adapter, "step": steps, "run_is_done": True}]
    assert [(one["step"], one["run_is_done"]) for one in result["adapters"]] == [(steps, True)]
    assert (record["base_model"], record["format"]) == ("base", "hf")
    assert str(run.parent) not in (model / "merge.json").read_text() + (model / "README.md").read_text()


def test_the_card_says_that_nothing_was_verified(run: Path, tmp_path: Path) -> None:
    report = merged(run, "--output", tmp_path / "out", "--no-verify", "--base", "original")
    assert report["verification"] is None
    assert "| verified | no |" in (tmp_path / "out" / "README.md").read_text()
    assert "(as asked)" in (tmp_path / "out" / "README.md").read_text()


# ---- formats


def test_each_of_several_formats_has_a_directory(formats: tuple[Path, dict[str, Any]]) -> None:
    output, report = formats
    assert list(report["outputs"]) == ["hf", "nf4", "ollama", "gguf-lora", "gguf"]
    assert report["outputs"]["nf4"] == str(output / "nf4")
    assert sorted(path.name for path in output.iterdir()) == ["gguf", "gguf-lora", "hf", "nf4", "ollama"]
    assert (output / "hf" / "model.safetensors").is_file()
    assert sorted(path.name for path in (output / "gguf").iterdir()) == ["README.md", "all.gguf", "merge.json"]
    assert (output / "ollama" / "Modelfile").read_text().startswith("FROM ../gguf/all.gguf\n")
    assert report["bytes_written"] == sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    assert [read(output / name / "merge.json")["format"] for name in report["outputs"]] == list(report["outputs"])
    assert "library_name: gguf" in (output / "gguf" / "README.md").read_text()
    assert (output / "gguf-lora" / "all-lora.gguf").is_file()
    assert ", the adapter alone, for llama.cpp" in (output / "gguf-lora" / "README.md").read_text()


def test_the_4_bit_model_is_compared_with_the_merged_one(formats: tuple[Path, dict[str, Any]]) -> None:
    output, report = formats
    assert report["requantized"].keys() - {"gguf"} == {"nf4"}  # where llama.cpp is here, it runs the other
    assert report["requantized"]["nf4"]["to"] == "NF4 with double quantization"
    merged_kl, nf4 = report["verification"]["divergence"]["mean_kl"], report["requantized"]["nf4"]["divergence"]
    assert merged_kl < nf4["mean_kl"] < 0.5  # quantized again, it differs, but it is the same model
    assert nf4["reference_perplexity"] == pytest.approx(report["verification"]["divergence"]["perplexity"])
    assert read(output / "nf4" / "merge.json")["requantized"] == report["requantized"]["nf4"]
    assert read(output / "hf" / "merge.json")["requantized"] is None
    assert (
        f"from the merged model, mean KL divergence {nf4['mean_kl']:.2g}" in (output / "nf4" / "README.md").read_text()
    )
    sizes = [(output / name / "model.safetensors").stat().st_size for name in ("hf", "nf4")]
    assert sizes[1] < sizes[0] / 1.5
    loaded = AutoModelForCausalLM.from_pretrained(output / "nf4", device_map="cpu")
    assert loaded.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert torch.isfinite(logits(loaded)).all()


@pytest.mark.parametrize("name", list(ExportFormat))
def test_all_files_of_the_first_format_are_pushed(
    run: Path, formats: tuple[Path, dict[str, Any]], name: ExportFormat
) -> None:
    later_formats = tuple(other for other in ExportFormat if other != name)
    request = merge_settings(run, formats=(name, *later_formats), llama_cpp=CONVERTER)
    place, patterns = RequestedFormats.of(request).pushed(formats[0])
    assert place == formats[0] / name.value
    left_out = [path.name for path in place.iterdir() if not any(path.match(pattern) for pattern in patterns)]
    assert left_out == []


def test_a_format_that_is_quantized_again_and_not_compared_says_so(run: Path, tmp_path: Path) -> None:
    report = merged(run, "--output", tmp_path / "out", *GGUF, "--gguf-type", "q8_0", *UNCOMPARED)
    assert report["requantized"] == {"gguf": {"to": "Q8_0", "divergence": None}}
    assert "| requantized | to Q8_0: not compared |" in (tmp_path / "out" / "README.md").read_text()


def test_no_file_of_an_export_names_the_directory_it_was_made_in(formats: tuple[Path, dict[str, Any]]) -> None:
    output, _ = formats
    for path in output.rglob("*"):
        if path.is_file():
            assert b".saving" not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["nf4", "gguf", "ollama"])
def test_a_single_format_is_the_output_itself(
    run: Path, tmp_path: Path, name: str, formats: tuple[Path, dict[str, Any]]
) -> None:
    output = tmp_path / "all"
    options = GGUF if name == "gguf" else ("--format", name)
    report = merged(run, "--output", output, *options, "--no-verify", "--base", "dequantized")
    assert report["outputs"] == {name: str(output)}
    alone = {path.name for path in output.iterdir()}
    together = {path.name for path in (formats[0] / name).iterdir()}
    assert not [path for path in output.iterdir() if path.is_dir()]
    assert together <= alone
    if name == "ollama":  # the model is next to the Modelfile then
        assert {"Modelfile", "model.safetensors", "config.json"} <= alone
        assert (output / "Modelfile").read_text().startswith("FROM .\n")
    else:
        assert together == alone
        (weights,) = [path for path in alone if path.endswith(("safetensors", "gguf"))]
        # The stand-in for a converter writes tensors in any order.
        sizes = [(place / weights).stat().st_size for place in (output, formats[0] / name)]
        assert sizes[0] == sizes[1]


def test_the_gguf_of_a_run_is_named_after_the_run(run: Path, tmp_path: Path) -> None:
    own = copy_run(run, tmp_path / "own")
    merged(own, *GGUF, *UNCOMPARED)
    assert (own / "merged" / "run-merged.gguf").is_file()


def test_a_converter_that_fails_ends_with_1_and_leaves_the_model_under_a_name_that_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRONG", "width")
    done = qlora_merge(run, "--output", tmp_path / "out", *GGUF, *UNCOMPARED, "--json")
    assert done.exit_code == 1
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "ExportError"
    model = tmp_path / "out-failed-export" / "model"
    assert error["hint"].endswith(f"The merged 16-bit model is done, and in {model}.")
    assert list(tmp_path.iterdir()) == [model.parent]
    assert AutoModelForCausalLM.from_pretrained(model).num_parameters() > 2_000_000


def test_missing_dependencies_of_a_format_are_reported_before_anything_is_merged(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    output = ("--output", tmp_path / "out")
    assert "git clone" in refused(run, *output, "--format", "gguf")
    assert "does not exist" in refused(run, *output, "--format", "gguf", "--llama-cpp", tmp_path / "none")


def test_the_tokenizer_class_has_the_name_that_the_base_gives_it(run: Path, tmp_path: Path) -> None:
    other = copy_run(run, tmp_path / "copy")
    for directory in (other.parent / "base", other / "adapter"):
        path = directory / "tokenizer_config.json"
        name = "PreTrainedTokenizerFast" if directory.name == "base" else "TokenizersBackend"
        path.write_text(json.dumps({**read(path), "tokenizer_class": name}), encoding="utf-8")
    report = merged(other, *UNCOMPARED, "--base-model", other.parent / "base")
    assert read(Path(report["output"]) / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(report["output"]).eos_token_id == 4


def test_a_model_that_can_not_be_compared_for_lack_of_memory_is_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> None:
        raise MemoryError

    other = copy_run(run, tmp_path / "copy")
    monkeypatch.setattr(StreamedModel, "logits", short)
    done = qlora_merge(other, "--base", "original", "--device", "cpu", "--json")
    assert done.exit_code == 3
    error = json.loads(done.stdout)["error"]
    failed = other / "merged-failed-verification"
    assert str(failed) in error["hint"]
    assert (failed / "config.json").is_file()
    assert not (other / "merged").exists()


def test_too_little_memory_for_one_layer_is_reported_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy_run(run, tmp_path / "copy")
    monkeypatch.setattr(comparison, "free_bytes", lambda _: 1000)
    done = qlora_merge(other, "--base", "original", "--device", "cpu", "--json")
    assert done.exit_code == 3
    assert "for one layer" in json.loads(done.stdout)["error"]["message"]
    assert sorted(path.name for path in other.iterdir() if path.name.startswith(("merged", ".merged"))) == []


def test_the_sentencepiece_model_of_the_base_is_copied(run: Path, tmp_path: Path) -> None:
    other = copy_run(run, tmp_path / "copy")
    (other.parent / "base" / "tokenizer.model").write_bytes(b"pieces")
    report = merged(other, *UNCOMPARED)
    assert (Path(report["output"]) / "tokenizer.model").read_bytes() == b"pieces"
