"""The Modelfile: what it names, how it prompts, where it stops, and what is reported about it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.errors import ModelError
from qlora_cli.events import Noted
from qlora_cli.merging.exports.ollama import OllamaExport, check_ollama, write_modelfile
from tests.conftest import Recorder
from tests.support.models.chat_tokenizers import make_tokenizer

Write = Callable[..., OllamaExport]


def read_modelfile(path: Path) -> dict[str, list[str]]:
    """Return the arguments of each command, unquoted as Ollama's parser does."""
    text = path.read_text(encoding="utf-8")
    arguments: dict[str, list[str]] = {}
    pattern = r'^(FROM|TEMPLATE|SYSTEM|PARAMETER \w+) ("""(?:.|\n)*?"""|"[^"\n]*"|[^"\n]+)$'
    for command, value in re.findall(pattern, text, re.MULTILINE):
        bare = value[3:-3] if value.startswith('"""') else value.strip('"')
        arguments.setdefault(command.removeprefix("PARAMETER "), []).append(bare)
    rest = re.sub(pattern, "", text, flags=re.MULTILINE)
    assert not rest.strip(), rest
    return arguments


def notes(recorder: Recorder, level: str | None = None) -> str:
    noted = [event for event in recorder.events if isinstance(event, Noted)]
    return "\n".join(event.message for event in noted if level in (None, event.level))


@pytest.fixture
def model(base_model: Path, tmp_path: Path) -> Path:
    """The bundled model, to be changed."""
    return Path(shutil.copytree(base_model, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None takes one out."""
    merged = {**json.loads(file.read_text(encoding="utf-8")), **values}
    remaining = {key: value for key, value in merged.items() if value is not None}
    file.write_text(json.dumps(remaining), encoding="utf-8")


def test_a_gguf_is_prompted_and_stopped_as_the_model(model: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    export = write_modelfile(model, tmp_path / "Modelfile", source="./tiny.gguf", reporter=recorder)
    modelfile = read_modelfile(tmp_path / "Modelfile")
    assert modelfile["FROM"] == ["./tiny.gguf"]
    assert modelfile["stop"] == ["<|im_end|>"]
    assert modelfile["num_ctx"] == ["512"]
    assert modelfile["TEMPLATE"][0].startswith("{{ range $i, $_ := .Messages }}")  # llama.cpp writes BOS itself
    assert "<|im_start|>assistant\n{{ else if" in modelfile["TEMPLATE"][0]
    assert "SYSTEM" not in modelfile
    assert export.has_template
    assert (export.stops, export.parameters) == (("<|im_end|>",), {"num_ctx": 512})
    assert not notes(recorder)


def test_safetensors_are_prompted_with_bos_unless_ollama_adds_it(model: Path, tmp_path: Path) -> None:
    # It goes by a setting of tokenizer_config.json, where llama.cpp's converter looks at the tokenizer itself.
    target = tmp_path / "Modelfile"
    write_modelfile(model, target, source=".", reporter=Recorder())
    assert read_modelfile(target)["TEMPLATE"][0].startswith("<|bos|>{{ range")
    change(model / "tokenizer_config.json", add_bos_token=True)
    write_modelfile(model, target, source=".", reporter=Recorder())
    assert read_modelfile(target)["TEMPLATE"][0].startswith("{{ range")


def test_a_template_without_bos_is_warned_about_where_bos_is_added(model: Path, tmp_path: Path) -> None:
    template = model / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").removeprefix("{{ bos_token }}"), encoding="utf-8")
    recorder = Recorder()
    write_modelfile(model, tmp_path / "Modelfile", source="./a.gguf", reporter=recorder)
    assert "begins prompts with <|bos|>" in notes(recorder, "warning")


def test_every_end_token_stops(model: Path, tmp_path: Path) -> None:
    change(model / "generation_config.json", eos_token_id=[4, 0])
    export = write_modelfile(model, tmp_path / "Modelfile", source="./a.gguf", reporter=Recorder())
    assert set(export.stops) == {"<|im_end|>", "<|pad|>"}
    assert set(read_modelfile(tmp_path / "Modelfile")["stop"]) == set(export.stops)


def test_the_token_that_ends_a_turn_stops_even_if_no_config_names_it(model: Path, tmp_path: Path) -> None:
    gemma = make_tokenizer("gemma").tokenizer
    gemma.save_pretrained(model)
    change(model / "config.json", eos_token_id=gemma.eos_token_id)
    change(model / "generation_config.json", eos_token_id=gemma.eos_token_id)
    recorder = Recorder()
    export = write_modelfile(model, tmp_path / "Modelfile", source="./a.gguf", reporter=recorder)
    assert set(export.stops) == {"<eos>", "<end_of_turn>"}
    assert "strips white space" in notes(recorder)


def test_sampling_is_as_in_the_generation_config(model: Path, tmp_path: Path) -> None:
    values = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    change(model / "generation_config.json", **values)
    write_modelfile(model, tmp_path / "Modelfile", source="./a.gguf", reporter=Recorder())
    modelfile = read_modelfile(tmp_path / "Modelfile")
    assert {key: modelfile[key] for key in ("temperature", "top_p", "top_k", "repeat_penalty")} == {
        "temperature": ["0.6"],
        "top_p": ["0.95"],
        "top_k": ["20"],
        "repeat_penalty": ["1.05"],
    }


def test_sampling_that_is_off_is_not_written(model: Path, tmp_path: Path) -> None:
    change(model / "generation_config.json", do_sample=False, temperature=0.6, top_k=20, repetition_penalty=1.05)
    export = write_modelfile(model, tmp_path / "Modelfile", source="./a.gguf", reporter=Recorder())
    assert export.parameters == {"num_ctx": 512, "repeat_penalty": 1.05}


def test_the_context_is_bounded(model: Path, tmp_path: Path) -> None:
    change(model / "config.json", max_position_embeddings=131072)
    export = write_modelfile(model, tmp_path / "Modelfile", source="./a.gguf", reporter=Recorder())
    assert export.parameters["num_ctx"] == 8192


def test_without_a_chat_template_prompts_are_passed_on(model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").unlink()
    recorder = Recorder()
    export = write_modelfile(model, tmp_path / "Modelfile", source="./a.gguf", reporter=recorder)
    assert not export.has_template
    assert read_modelfile(tmp_path / "Modelfile")["TEMPLATE"] == ["{{ .Prompt }}"]
    assert "no chat template" in notes(recorder)


def test_a_template_without_a_system_message_is_noted(model: Path, tmp_path: Path) -> None:
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refuses + template, encoding="utf-8")
    recorder = Recorder()
    export = write_modelfile(model, tmp_path / "Modelfile", source="./a.gguf", reporter=recorder)
    assert 'eq .Role "system"' not in read_modelfile(tmp_path / "Modelfile")["TEMPLATE"][0]
    assert "has no system message" in "\n".join(export.notes) == notes(recorder)


def test_a_template_that_writes_the_date_is_warned_about(model: Path, tmp_path: Path) -> None:
    dated = "{{ strftime_now('%Y') }}" + (model / "chat_template.jinja").read_text(encoding="utf-8")
    (model / "chat_template.jinja").write_text(dated, encoding="utf-8")
    recorder = Recorder()
    write_modelfile(model, tmp_path / "Modelfile", source="./a.gguf", reporter=recorder)
    assert "today's date" in notes(recorder, "warning")


def test_a_template_that_cannot_be_written_leaves_no_modelfile(model: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(ModelError, match="TEMPLATE"):
        write_modelfile(model, tmp_path / "Modelfile", source="./a.gguf", reporter=Recorder())
    assert not (tmp_path / "Modelfile").exists()
    tokenizer = make_tokenizer("chatml").tokenizer
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match="TEMPLATE"):
        check_ollama(tokenizer)


def test_what_can_be_written_passes_the_check() -> None:
    tokenizer = make_tokenizer("llama").tokenizer
    check_ollama(tokenizer)
    tokenizer.chat_template = None
    check_ollama(tokenizer)


@pytest.mark.parametrize("name", ["./my model.gguf", "./größe (1).gguf", "./a#b.gguf"])
def test_odd_names_are_quoted(model: Path, tmp_path: Path, name: str) -> None:
    write_modelfile(model, tmp_path / "Modelfile", source=name, reporter=Recorder())
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8").splitlines()[0] == f'FROM "{name}"'


@pytest.mark.parametrize("name", ['./a"b.gguf', "./a\nb.gguf"])
def test_names_that_no_modelfile_can_hold_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="can't name"):
        write_modelfile(model, tmp_path / "Modelfile", source=name, reporter=Recorder())


def test_an_architecture_that_ollama_does_not_import_is_warned_about(model: Path, tmp_path: Path) -> None:
    change(model / "config.json", architectures=["StableLmForCausalLM"])
    recorder = Recorder()
    write_modelfile(model, tmp_path / "Modelfile", source=".", reporter=recorder)
    assert "does not know StableLmForCausalLM" in notes(recorder, "warning")
    assert "add --format gguf" in notes(recorder, "warning")
    again = Recorder()
    write_modelfile(model, tmp_path / "Modelfile", source="./a.gguf", reporter=again)
    assert not notes(again)


def test_an_imported_architecture_is_noted_to_depend_on_the_version(model: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    write_modelfile(model, tmp_path / "Modelfile", source=".", reporter=recorder)
    assert "versions of Ollama import different" in notes(recorder, "info")
    assert not notes(recorder, "warning")
