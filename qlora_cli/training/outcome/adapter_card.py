"""Describe a trained adapter in a model card: what it belongs to, what it was trained on and how, and how to load it.

It is published with the adapter, so local paths are reduced to their last part, and none is named as the hub's base.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # lazy there
from transformers import BitsAndBytesConfig

from qlora_cli import __version__
from qlora_cli.events import Rewards
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.loading.save import NOTE
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.quantization.methods.four_bit_quantizer import QloraConfig
from qlora_cli.settings.choices import TrainingLoss
from qlora_cli.settings.models import TrainSettings
from qlora_cli.training.run_plan import PreparedRun
from qlora_cli.units import counted
from qlora_cli.visible import public_name

CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class TrainedSteps:
    """The steps of a run whose adapter is described, with the losses of the last one, if finite.

    They are means over trained tokens, in nats, or over what is compared; `eval_rewards` are those of held-out rows.
    """

    steps: int
    num_steps: int
    loss: float | None
    eval_loss: float | None
    eval_rewards: Rewards | None = None


def write_card(directory: Path, prepared: PreparedRun, trained: TrainedSteps) -> None:
    """Write the card of the adapter of `prepared` into `directory`."""
    (directory / CARD).write_text("\n".join(_lines(prepared, trained)) + "\n", encoding="utf-8")


def _lines(prepared: PreparedRun, trained: TrainedSteps) -> Iterator[str]:
    loaded, settings = prepared.loaded, prepared.settings
    name, commit = _base_of(loaded, settings)
    yield "---"
    yield yaml.safe_dump(_front_matter(name if commit else None), sort_keys=False).strip()
    yield "---"
    yield ""
    yield f"# {public_name(str(prepared.plan.output.resolve()))}"
    yield ""
    at = f" at commit `{commit}`" if commit else ""
    yield f"A LoRA adapter for `{public_name(name)}`{at}, trained on it as {loaded.layout.describe()}."
    yield ""
    yield "| | |"
    yield "|---|---|"
    for what, said in (*_facts(prepared, trained), *_settings(settings)):
        yield f"| {what} | {said} |"
    yield ""
    yield "## Load it"
    yield ""
    yield from _how_to_load(loaded, settings, name, commit)
    yield ""
    yield f"Trained by qlora {__version__}. `qlora merge` gives a model without an adapter, verified against this one."


def _front_matter(base: str | None) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["qlora", "lora"]}
    if base is not None:
        front["base_model"] = base
        front["tags"].append(f"base_model:adapter:{base}")
    return front


def _base_of(loaded: LoadedModel, settings: TrainSettings) -> tuple[str, str | None]:
    """Return the name of the base, and its commit if it is of the hub; for one that the run made, of its original."""
    name, commit = loaded.source.base_name, loaded.source.commit
    note = loaded.source.path / NOTE
    if settings.training.calibrate and note.is_file():
        content = read_json(note)
        name, commit = str(content.get("source")), content.get("commit")
    return (name, str(commit)) if commit and _is_repository(name) else (name, None)


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _facts(prepared: PreparedRun, trained: TrainedSteps) -> Iterator[tuple[str, str]]:
    training = prepared.settings.training
    if training.objective.compares:
        compared = ", compared with the base" if training.objective.has_reference else ""
        wanted, unwanted = training.desirable_weight, training.undesirable_weight
        weights = f", weights {wanted:g} (wanted) and {unwanted:g} (not)" if (wanted, unwanted) != (1, 1) else ""
        yield "objective", f"{training.objective.value}, beta {training.beta:g}{weights}{compared}"
    if (kept := prepared.plan.kept_layers) is not None:
        yield "base", kept.sentence
    data = (("trained on", prepared.train_data), ("held out", prepared.eval_data))
    for what, report in ((what, one.report) for what, one in data if one is not None):
        names = ", ".join(f"`{public_name(name)}`" for name in report.name.split(", "))
        yield what, f"{names}, {counted(report.rows_trained, 'row')}, fingerprint `{report.fingerprint}`"
    unfinished = "" if trained.steps == trained.num_steps else f" of {trained.num_steps:,}"
    yield "steps", f"{trained.steps:,}{unfinished}, of {counted(prepared.plan.examples_per_step, 'row')} each"
    for what, loss in (("loss at the end", trained.loss), ("held-out loss", trained.eval_loss)):
        if loss is not None and math.isfinite(loss):
            yield what, f"{loss:.4f}{'' if training.objective.compares else ' nats a token'}"
    if trained.eval_rewards is not None:
        yield f"held-out {trained.eval_rewards.rows}", str(trained.eval_rewards)


def _settings(settings: TrainSettings) -> Iterator[tuple[str, str]]:
    lora, training = settings.lora, settings.training
    kinds = [name for name, is_used in (("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora)) if is_used]
    kind = ", ".join([f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}", *kinds])
    yield "adapter", f"{kind}, begun as {lora.init_lora_weights.value}"
    rate = f"learning rate {training.learning_rate:g}, {training.schedule.value}"
    loss = "" if training.loss == TrainingLoss.NLL else f", loss {training.loss.value}"
    yield "optimization", f"{training.optimizer.value}, {rate}{loss}, seed {training.seed}"


def _how_to_load(loaded: LoadedModel, settings: TrainSettings, name: str, commit: str | None) -> Iterator[str]:
    base, revision = public_name(name), f", revision={commit!r}" if commit else ""
    if settings.training.calibrate:
        yield "The base was calibrated by the run, and is in `base/` of its directory: the adapter fits it alone."
        yield ""
        base, revision = "base", ""
    plain = _plain_quantization(loaded)
    if loaded.layout.experts and (plain is None or settings.training.calibrate):
        yield "The base holds quantized experts, which plain transformers can't load. `qlora generate` and"
        yield "`qlora evaluate` load it with this adapter, and `qlora merge` makes a plain model of both."
        return
    if loaded.layout.experts:
        yield "qlora quantizes the experts, too; plain transformers loads them in 16 bit."
        yield ""
    imported = ["AutoModelForCausalLM", "AutoTokenizer", *(["BitsAndBytesConfig"] if plain else [])]
    yield "```python"
    yield "from peft import PeftModel"
    yield f"from transformers import {', '.join(imported)}"
    yield ""
    yield 'adapter = "path or name of this adapter"'
    quantization = ""
    if plain:
        given = ", ".join(f"{key}={value!r}" for key, value in _arguments(plain).items())
        yield f"quantization = BitsAndBytesConfig({given})"
        quantization = ", quantization_config=quantization"
    yield f"model = AutoModelForCausalLM.from_pretrained({base!r}{revision}, dtype={_dtype(loaded)!r}{quantization})"
    yield "tokenizer = AutoTokenizer.from_pretrained(adapter)"
    if loaded.new_token_ids:
        yield f"model.resize_token_embeddings({loaded.base.config.get_text_config().vocab_size})"
    yield "model = PeftModel.from_pretrained(model, adapter)"
    yield "```"


def _plain_quantization(loaded: LoadedModel) -> BitsAndBytesConfig | None:
    """Return how plain transformers quantizes the base while it reads it, if it is to do so."""
    config = getattr(loaded.base.config, "quantization_config", None)
    if loaded.layout.prequantized is not None or not isinstance(config, BitsAndBytesConfig):
        return None
    return config.plain() if isinstance(config, QloraConfig) else config


def _arguments(config: BitsAndBytesConfig) -> dict[str, Any]:
    """Return the arguments of a quantization config that are not the defaults."""
    switches = {f"load_in_{bits}": True for bits in ("4bit", "8bit") if getattr(config, f"load_in_{bits}")}
    others = {key: value for key, value in config.to_diff_dict().items() if not key.lstrip("_").startswith("load_in")}
    return {**switches, **{key: value for key, value in others.items() if key != "quant_method"}}


def _dtype(loaded: LoadedModel) -> str:
    return str(loaded.dtype.torch_dtype).removeprefix("torch.")
