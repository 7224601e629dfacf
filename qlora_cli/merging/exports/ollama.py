"""Write a Modelfile, from which Ollama builds a model with the prompts and stop tokens of training.

What Ollama accepts is defined in its sources: parser/parser.go (Modelfile), template/template.go (TEMPLATE), convert/
(import of safetensors) of github.com/ollama/ollama.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_cli.errors import ModelError
from qlora_cli.events import Noted, Reporter
from qlora_cli.merging.exports.export_format import Export, Format
from qlora_cli.merging.exports.gguf import gguf_file
from qlora_cli.merging.exports.go_template import go_template
from qlora_cli.merging.exports.template_turns import (
    ASSISTANT,
    SystemPosition,
    Turns,
    derive_turns,
    strips_contents,
    writes_bos,
)
from qlora_cli.merging.merge_result import Divergence
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.given_model import CONFIG
from qlora_cli.model_files.source import find_model
from qlora_cli.settings.choices import ExportFormat
from qlora_cli.settings.models import ModelSettings
from qlora_cli.tokenizing.tokenizer import LoadedTokenizer, load_tokenizer
from qlora_cli.writing import write_file

MODELFILE = "Modelfile"
NO_TEMPLATE = "{{ .Prompt }}"
# Half a million positions don't justify reserving the memory for their keys and values.
MOST_CONTEXT_TOKENS = 8192
# By the names in generation_config.json; the first applies without sampling, too.
PARAMETERS = {
    "repetition_penalty": "repeat_penalty",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
}
# The architectures that Ollama imports from safetensors: the switch in convert/convert.go, as of August 2026.
IMPORTED = frozenset(
    f"{name}For{head}"
    for head, names in {
        "CausalLM": "Cohere DeepseekV3 Gemma Gemma2 Gemma3 Gemma4 Glm4MoeLite GptOss Laguna Lfm2 Lfm2Moe Llama "
        "Ministral3 Mixtral NemotronH Olmo3 Phi3 Qwen2 Qwen3Next",
        "ConditionalGeneration": "Gemma3 Gemma3n Gemma4 GlmOcr Lfm2Vl Llama4 Mistral3 Mllama Qwen2_5_VL Qwen3VL "
        "Qwen3VLMoe Qwen3_5 Qwen3_5Moe",
    }.items()
    for name in names.split()
)
PLAIN_NAME = re.compile(r"[\w./+-]+")


class OllamaFormat(Format):
    """A Modelfile, next to the 16-bit model unless it names a GGUF."""

    name = ExportFormat.OLLAMA

    @staticmethod
    def serving(path: Path) -> Sequence[str]:
        """Return the command that serves it."""
        return ("ollama", "create", "NAME", "-f", str(path / "Modelfile"))

    @property
    def holds_model(self) -> bool:
        """The Modelfile names the safetensors, unless a GGUF is written, too."""
        return ExportFormat.GGUF not in self.request.merge.formats

    @property
    def depends_on(self) -> ExportFormat | None:
        """The format that FROM names: the GGUF, or the safetensors of another format."""
        candidates = (ExportFormat.GGUF, ExportFormat.HF)
        return next((name for name in candidates if name in self.request.merge.formats), None)

    @property
    def files(self) -> tuple[str, ...]:
        """The Modelfile, and the model if it is included."""
        return (MODELFILE, *super().files) if self.holds_model else (MODELFILE,)

    def check(self, inputs: Inputs, reporter: Reporter) -> None:
        """Check that the chat template can be written in Ollama's language."""
        del reporter  # differences are noted when the Modelfile is written
        check_ollama(inputs.tokenizer.tokenizer)

    def write(self, export: Export) -> Divergence | None:
        """Write the Modelfile, with a relative path to the model."""
        export.target.mkdir(exist_ok=True)
        gguf = export.directories.get(ExportFormat.GGUF)
        source = export.model if gguf is None else gguf_file(gguf, export.name)
        write_modelfile(
            export.model,
            export.target / MODELFILE,
            source=os.path.relpath(source, export.target),
            trust_remote_code=self.request.model.trust_remote_code,
            reporter=export.reporter,
        )
        return None


@dataclass(frozen=True, kw_only=True)
class OllamaExport:
    """A Modelfile that was written. `has_template` says whether TEMPLATE reproduces the model's chat template."""

    modelfile: Path
    source: str
    has_template: bool
    stops: tuple[str, ...]
    parameters: Mapping[str, float]
    notes: tuple[str, ...]


def check_ollama(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check before anything is merged that a TEMPLATE can reproduce the chat template.

    Raises:
        ModelError: it can't.
    """
    if tokenizer.chat_template is not None:
        for drops_bos in (False, True):  # which depends on what FROM names
            derive_turns(tokenizer, drops_bos=drops_bos)


def write_modelfile(
    model: Path, target: Path, *, source: str, reporter: Reporter, trust_remote_code: bool = False
) -> OllamaExport:
    """Write the Modelfile `target` for the model in the directory `model`, and report notes for the user.

    `source` is the argument of FROM, relative to the Modelfile: `.` for safetensors next to it, or `./NAME.gguf`.

    Raises:
        ModelError: no TEMPLATE can reproduce the chat template, or a Modelfile can't name `source`.
    """
    settings = ModelSettings(name=str(model), trust_remote_code=trust_remote_code)
    loaded = load_tokenizer(find_model(settings), settings)
    config = read_json(model / CONFIG)
    generation = _read_if_exists(model / "generation_config.json")
    adds_bos = writes_bos(loaded.tokenizer) if source.endswith(".gguf") else _imports_bos(model)
    turns = None
    if loaded.tokenizer.chat_template is not None:
        turns = derive_turns(loaded.tokenizer, drops_bos=adds_bos)
    parameters = {**_context(config), **_sampling(generation)}
    stops = _stops(loaded, turns)
    template = NO_TEMPLATE if turns is None else go_template(replace(turns, opening="") if adds_bos else turns)
    write_file(target, _modelfile(source, template, stops, parameters))
    notes = [*_notes(loaded.tokenizer, turns, adds_bos=adds_bos), *_notes_on_source(config, source)]
    for note in notes:
        reporter.report(note)
    return OllamaExport(
        modelfile=target,
        source=source,
        has_template=turns is not None,
        stops=stops,
        parameters=parameters,
        notes=tuple(note.message for note in notes),
    )


def _read_if_exists(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _imports_bos(model: Path) -> bool:
    """Return whether Ollama puts BOS before text for a model from safetensors, which depends on this key alone."""
    return bool(_read_if_exists(model / "tokenizer_config.json").get("add_bos_token"))


def _modelfile(source: str, template: str, stops: tuple[str, ...], parameters: Mapping[str, float]) -> str:
    lines = [
        f"FROM {_from_argument(source)}",
        "",
        f'TEMPLATE """{template}"""',
        "",
        *(f"PARAMETER stop {_quoted(stop)}" for stop in stops),
        *(f"PARAMETER {name} {value}" for name, value in parameters.items()),
    ]
    return "\n".join(lines) + "\n"


def _from_argument(source: str) -> str:
    if not source.isprintable() or '"' in source:
        raise ModelError(f"a Modelfile can't name {source!r}", hint="Choose a file name of plain letters and digits.")
    return source if PLAIN_NAME.fullmatch(source) else f'"{source}"'


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def _stops(loaded: LoadedTokenizer, turns: Turns | None) -> tuple[str, ...]:
    """Return the texts that end an answer: those of the end tokens, and of the token that ends a turn."""
    tokenizer = loaded.tokenizer
    ids = sorted(loaded.end_ids)
    if turns is not None:
        after = tokenizer.encode(turns.after[ASSISTANT].strip(), add_special_tokens=False)
        ids += [number for number in after[:1] if number in tokenizer.added_tokens_decoder]
    texts = (str(tokenizer.decode([number], skip_special_tokens=False)) for number in ids)
    return tuple(dict.fromkeys(text for text in texts if text.strip() and text.isprintable()))


def _context(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the context length: the model's positions, up to a limit."""
    text = config.get("text_config") or config
    positions = text.get("max_position_embeddings") or text.get("n_positions") or config.get("max_position_embeddings")
    return {"num_ctx": min(positions, MOST_CONTEXT_TOKENS)} if isinstance(positions, int) else {}


def _sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """Return the sampling parameters in generation_config.json."""
    return {
        theirs: generation[ours]
        for ours, theirs in PARAMETERS.items()
        if isinstance(generation.get(ours), int | float)
        and (generation.get("do_sample") or theirs == "repeat_penalty")
    }


def _notes(tokenizer: PreTrainedTokenizerBase, turns: Turns | None, *, adds_bos: bool) -> list[Noted]:
    if turns is None:
        return [Noted(message="the tokenizer has no chat template: the Modelfile passes prompts on unchanged")]
    notes = []
    if turns.system_position == SystemPosition.NOWHERE:
        notes.append(Noted(message="the chat template has no system message: Ollama will ignore it"))
    if strips_contents(tokenizer, turns):
        message = "the chat template strips white space around messages, which a TEMPLATE can't: send them without"
        notes.append(Noted(message=message))
    if "strftime_now" in str(tokenizer.chat_template):
        message = "the chat template writes today's date, which the Modelfile fixes"
        notes.append(Noted(message=message, level="warning"))
    if adds_bos and not turns.opening:
        message = (
            f"Ollama begins prompts with {tokenizer.bos_token}, as the tokenizer does, but the chat template that was "
            "trained does not"
        )
        notes.append(Noted(message=message, level="warning"))
    return notes


def _notes_on_source(config: Mapping[str, Any], source: str) -> list[Noted]:
    if source.endswith(".gguf"):
        return []
    [architecture, *_] = config.get("architectures") or ["a model without architectures in its config.json"]
    if architecture not in IMPORTED:
        message = f"Ollama's importer does not know {architecture} in safetensors: add --format gguf"
        return [Noted(message=message, level="warning")]
    message = (
        "versions of Ollama import different safetensors models, and newer ones run them with MLX only; "
        "all of them run a GGUF (add --format gguf)"
    )
    return [Noted(message=message)]
