"""Merging as the command does it, without comparison and card; adapters to merge, and references for the results.

The adapters are made by plain PEFT on the plain model in fp32, with random values in place of trained ones.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.adapters.writer import save_adapter
from qlora_cli.errors import QloraError
from qlora_cli.events import SilentReporter
from qlora_cli.files import as_json
from qlora_cli.merging.companion_files import write_companion_files
from qlora_cli.merging.merge_result import BaseChoice, Verification
from qlora_cli.merging.merger import Merger
from qlora_cli.merging.planning.base_weights import Base, base_reader
from qlora_cli.merging.planning.inputs import Inputs, read_inputs
from qlora_cli.merging.planning.merge_plan import MergePlan, plan_merge
from qlora_cli.merging.verifying.comparison import ModelComparer
from qlora_cli.merging.verifying.streamed import StreamedModel, WeightedAdapter
from qlora_cli.merging.verifying.verify import verify
from qlora_cli.merging.write import write_weights
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.settings.choices import BaseWeights, MergeDtype
from qlora_cli.settings.models import MergeCommandSettings
from tests.support.models.adapters import PREFIX, settings_of
from tests.support.models.loading import load, logits
from tests.support.models.reference_models import IDS, load_plain
from tests.support.runs.merge_command import merge_settings

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The output directory of a merge, with its inputs and its plan."""

    directory: Path
    inputs: Inputs
    plan: MergePlan

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that were written."""
        return stored(self.directory)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def request_of(*adapters: Path, **values: Any) -> MergeCommandSettings:
    """Return the request to merge these adapters into the base as it is stored."""
    return merge_settings(*adapters, **{"base": "original", **values})


def merge(*adapters: Path, output: Path, **values: Any) -> Merged:
    """Merge, and write the result to `output`, as `qlora merge` does without comparison and card."""
    return write(*planned(request_of(*adapters, **values)), output)


def merge_again(
    merged: Merged,
    output: Path,
    *,
    dtype: MergeDtype = MergeDtype.KEEP,
    weight: float = 1,
    kind: BaseWeights | None = None,
) -> Merged:
    """Merge what was read for `merged` in another dtype, with another weight, or into another kind of base."""
    inputs = merged.inputs
    asked = inputs.request.merge.model_copy(update={"dtype": dtype, "weights": (weight,)})
    changes = {name: [replace(one, weight=weight) for one in several] for name, several in inputs.changes.items()}
    inputs = replace(inputs, request=inputs.request.model_copy(update={"merge": asked}), changes=changes)
    plan = plan_merge(inputs.base, inputs.config, changes, kind or merged.plan.base, dtype)
    return write(inputs, plan, output)


def write(inputs: Inputs, plan: MergePlan, output: Path) -> Merged:
    """Write what is planned to `output`."""
    output.mkdir(parents=True)
    merger = Merger(inputs.base, Base(inputs.base, plan.base))
    write_weights(plan, inputs.source.path, output, merger.value, SilentReporter())
    write_companion_files(inputs, plan, output)
    return Merged(directory=output, inputs=inputs, plan=plan)


def planned(request: MergeCommandSettings) -> tuple[Inputs, MergePlan]:
    """Return everything that is known before a weight is read."""
    inputs = read_inputs(request, SilentReporter())
    kind = BaseWeights.DEQUANTIZED if inputs.base.packed else BaseWeights(request.merge.base)
    return inputs, plan_merge(inputs.base, inputs.config, inputs.changes, kind, MergeDtype(request.merge.dtype))


def refused(*adapters: Path, **values: Any) -> str:
    """Return message and hint of the error by which a merge is refused before anything is written."""
    with pytest.raises(QloraError) as caught:
        planned(request_of(*adapters, **values))
    assert caught.value.hint
    assert caught.value.exit_code == 2
    return f"{caught.value} | {caught.value.hint}"


def on_plain(checkpoint: Path, config: LoraConfig) -> PeftModel:
    """Return the plain model in fp32 with a new adapter by plain PEFT, all of whose values are random."""
    return adapted(load_plain(checkpoint), config)


def adapted(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Return a model with a new adapter, all of whose values are random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about ties, which the tests are about, and about how GPT-2 is stored
        model: PeftModel = get_peft_model(base, config)
    randomize(model)
    return model


def randomize(model: torch.nn.Module) -> None:
    """Change every trainable value about as much as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def save(model: PeftModel, directory: Path, **how: Any) -> Path:
    """Write an adapter as plain PEFT does, which updates a model card sooner than it makes one from a template."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "README.md").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory, **how)
    return directory


def save_changing(base: Path, directory: Path, kind: str) -> Path:
    """Write an adapter that changes its base as well: PiSSA that still trains, OLoRA, repeated `layers`."""
    values: dict[str, Any] = (
        {"layer_replication": [[0, 2], [1, 2]]} if kind == "layers" else {"init_lora_weights": kind}
    )
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **values)
    model = on_plain(base, config)
    save(model, directory)
    file = directory / ADAPTER_CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values, "base_model_name_or_path": str(base)}))
    return directory


def change_adapter(directory: Path, change: Callable[[dict[str, torch.Tensor]], Tensors]) -> None:
    """Change the values of an adapter in its file."""
    file = directory / ADAPTER_WEIGHTS
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file)


def changed_copy(adapter: Path, place: Path, change: Callable[[dict[str, torch.Tensor]], Tensors]) -> Path:
    """Return a copy of an adapter at `place`, with its values changed."""
    shutil.copytree(adapter, place)
    change_adapter(place, change)
    return place


def merged_by_peft(model: PeftModel, dtype: torch.dtype, directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of PEFT's own merge in fp32, cast to `dtype` and written by `save_pretrained`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole: PreTrainedModel = model.merge_and_unload()
    torch.nn.Module.to(whole, dtype).save_pretrained(directory)
    return stored(directory)


def merged_by_hand(
    model: PeftModel, whole: PreTrainedModel, dtype: torch.dtype, directory: Path
) -> dict[str, torch.Tensor]:
    """Return the tensors of the base with W + s * (B @ A) for each LoRA layer, in fp32 and cast once to `dtype`.

    `whole` is the plain base in fp32, which is changed.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            module = whole.get_submodule(path.removeprefix(PREFIX).replace(".base_layer", ""))
            weight = getattr(module, layer.parameter_name if isinstance(layer, ParamWrapper) else "weight")
            weight.data += _delta_by_hand(layer)
    torch.nn.Module.to(whole, dtype).save_pretrained(directory)
    return stored(directory)


@torch.no_grad()
def _delta_by_hand(layer: Any) -> torch.Tensor:
    name = "default"
    left, right, scale = layer.lora_B[name].weight, layer.lora_A[name].weight, layer.scaling[name]
    if not isinstance(layer, ParamWrapper):
        delta: torch.Tensor = left @ right * scale
        return delta.T if layer.fan_in_fan_out else delta
    if layer.num_experts == 1:
        alone: torch.Tensor = left @ right * scale
        return alone
    rank = layer.r[name]
    experts = [
        left[:, expert :: layer.num_experts] @ right[expert * rank : (expert + 1) * rank] * scale
        for expert in range(layer.num_experts)
    ]
    return torch.stack([one if layer._did_swap_in_out_features else one.T for one in experts])


def assert_same(actual: Tensors, expected: Tensors) -> None:
    """Check that tensors are equal to the bit, by name, dtype, shape and values."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def loaded_plain(directory: Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """Return a model loaded by plain transformers, with every weight present and none unexpected."""
    result: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    model: PreTrainedModel
    model, info = result
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model


def streamed_logits(
    merged: Merged, *, with_adapters: bool, kind: BaseWeights = BaseWeights.ORIGINAL, ids: torch.Tensor = IDS
) -> torch.Tensor:
    """Return the logits, `(tokens, vocabulary)`, of the base, `with_adapters` or without, layer by layer."""
    inputs = merged.inputs
    read = base_reader(inputs.base, Base(inputs.base, kind))
    model = StreamedModel(
        inputs.config.config,
        read,
        device=torch.device("cpu"),
        dtype=torch.float32,
        adapters=[WeightedAdapter(adapter=adapter) for adapter in inputs.adapters if with_adapters],
    )
    return model.logits(ids, torch.ones_like(ids))


def verified(merged: Merged) -> Verification:
    """Return the comparison of the written model with the base and its adapters."""
    choice = BaseChoice(base=merged.plan.base.value, reason="asked", original=None, dequantized=None)
    comparer = ModelComparer(merged.inputs, SilentReporter())
    return verify(comparer, merged.plan, choice, merged.directory, None, SilentReporter())


def plain_logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Return the logits, `(tokens, vocabulary)`."""
    return logits(model, ids).flatten(0, 1)


def random_run(base: Path, place: Path, **how: Any) -> tuple[PeftModel, Path]:
    """Return a loaded base with an adapter of random values on it, and a run of them as training writes it.

    Its record contains only what a merge must know: how the base was stored.
    """
    loaded = load(base, **how)
    model, _ = attach_adapter(loaded.base, settings_of(alpha=16), loaded.new_token_ids)
    randomize(model)
    save_adapter(model, place / "run" / "adapter")
    loaded.tokenizer.save_pretrained(place / "run" / "adapter")
    settings = loaded.settings
    record = {
        "settings": {
            "model": settings.model.model_dump(mode="json"),
            "quantization": settings.quantization.model_dump(mode="json"),
        },
        "base_model": as_json(asdict(loaded.report())),
        "base_model_path": str(loaded.source.path),
    }
    (place / "run" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return model, place / "run"
