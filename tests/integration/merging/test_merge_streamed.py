"""Models that run layer by layer: one layer in memory at a time, together with several adapters."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from qlora_cli.errors import OutOfMemoryError
from qlora_cli.events import Noted, SilentReporter
from qlora_cli.merging.merge_run import merge
from qlora_cli.merging.planning.adapter_changes import Read
from qlora_cli.merging.planning.base_weights import Base, base_reader
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.merging.verifying.comparison import ModelComparer
from qlora_cli.merging.verifying.streamed import StreamedModel, WeightedAdapter, check_fit, largest_unit_bytes
from qlora_cli.model_files.adapter_files import ADAPTER_WEIGHTS
from qlora_cli.quantization.methods.skip_modules import fused_experts
from qlora_cli.settings.choices import BaseWeights
from tests.conftest import Recorder
from tests.support.models.loading import save_model
from tests.support.models.reference_models import IDS, ROWS, load_plain
from tests.support.models.tiny_models import FAMILIES, tiny_model
from tests.support.runs.merging import on_plain, planned, request_of, save

pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(**values: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM", **values})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), vocab_size=ROWS, num_hidden_layers=6)


def streamed(inputs: Inputs, read: Any, **values: Any) -> StreamedModel:
    return StreamedModel(inputs.config.config, read, device=torch.device("cpu"), dtype=torch.float32, **values)


class Handed:
    """Reads weights and knows which are still in memory: a tensor made from an array keeps the array alive."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._living: dict[int, int] = {}
        self.names: list[str] = []
        self.most_bytes = 0

    def __call__(self, name: str) -> torch.Tensor:
        self.names.append(name)
        array = self._read(name).float().numpy().copy()
        self._living[id(array)] = array.nbytes
        weakref.finalize(array, self._living.pop, id(array))
        self.most_bytes = max(self.most_bytes, self.living_bytes)
        return torch.from_numpy(array)

    @property
    def living_bytes(self) -> int:
        return sum(self._living.values())


def test_never_more_than_one_layer_is_in_memory(llama: Path, tmp_path: Path) -> None:
    adapter = save(on_plain(llama, config_of()), tmp_path / "adapter")
    inputs, _ = planned(request_of(adapter))
    handed = Handed(base_reader(inputs.base, Base(inputs.base, BaseWeights.ORIGINAL)))
    model = streamed(inputs, handed, adapters=[WeightedAdapter(adapter=one) for one in inputs.adapters])
    largest_bytes = largest_unit_bytes(inputs.base.model, torch.float32)
    assert largest_bytes < sum(parameter.nbytes for parameter in load_plain(llama).parameters()) / 2
    model.logits(IDS, torch.ones_like(IDS))
    assert handed.living_bytes == 0
    assert handed.most_bytes == largest_bytes
    assert len(handed.names) == len({*handed.names}) == len(list(load_plain(llama).parameters()))  # each is read once


def test_the_largest_unit_is_the_embedding_or_a_layer(llama: Path, tmp_path: Path) -> None:
    adapter = save(on_plain(llama, config_of()), tmp_path / "adapter")
    inputs, _ = planned(request_of(adapter))
    largest_bytes = largest_unit_bytes(inputs.base.model, torch.float32)
    assert largest_bytes == ROWS * 64 * 4
    check_fit(inputs.base.model, torch.float32, 2 * largest_bytes)
    with pytest.raises(OutOfMemoryError, match="for one layer"):
        check_fit(inputs.base.model, torch.float32, 2 * largest_bytes - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_in_a_unit(family: str) -> None:
    """A weight in no unit would stay uninitialized."""
    config = tiny_model(family).config
    model = StreamedModel(
        config, tiny_model(family).state_dict().__getitem__, device=torch.device("cpu"), dtype=torch.float32
    )
    names = {slot.name for slots in model._units for slot in slots}
    assert names == {name for name, _ in model._base.named_parameters()}


def adapters_of(kind: str, base: Path, place: Path) -> list[Path]:
    """Return two adapters on one base, which PEFT can or can't run at once."""
    second: dict[str, Any] = {"whole": {"modules_to_save": ["lm_head"]}}.get(kind, {"target_modules": ["v_proj"]})
    if kind == "experts":
        second = {"target_parameters": [name for name, _ in fused_experts(load_plain(base))]}
    configs = [config_of(lora_alpha=3), config_of(**second)]
    return [save(on_plain(base, config), place / str(number)) for number, config in enumerate(configs)]


@pytest.mark.parametrize("kind", ["layers", "whole", "experts"])
def test_a_sum_that_peft_cannot_run_is_not_called_verified(kind: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "qwen3_moe", vocab_size=3072)
    request = request_of(*adapters_of(kind, base, tmp_path), weights=(0.5, 1.0), output=tmp_path / "merged")
    recorder, ran = Recorder(), kind == "layers"
    verification = merge(request, recorder).verification
    assert verification is not None
    assert (verification.ran_adapters, verification.modules is not None) == (ran, ran)
    notes = [event.message for event in recorder.events if isinstance(event, Noted)]
    assert any("the sum itself is not verified" in note for note in notes) is not ran
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert ("which is not verified itself" in card) is not ran


@pytest.mark.parametrize("kind", ["layers", "whole", "experts"])
def test_several_adapters_on_a_base_are_the_sum_of_their_effects(kind: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "qwen3_moe", vocab_size=3072)
    adapters = adapters_of(kind, base, tmp_path)
    weights = (0.5, 1.0) if kind == "whole" else (0.5, -1.25)
    inputs, plan = planned(request_of(*adapters, weights=weights, dtype="fp32"))
    comparer = ModelComparer(inputs, SilentReporter())
    divergence = comparer.compare(comparer.reference(plan), comparer.planned(plan))
    assert divergence.max_logit_difference < 1e-5
    alone, _ = planned(request_of(adapters[0]))
    assert (
        comparer.compare(comparer.reference(plan), ModelComparer(alone, SilentReporter()).reference(plan)).mean_kl
        > 1e-6
    )
    if kind == "layers":  # and as one adapter of both, by hand
        expected = load_plain(base)
        for place, weight, alpha in zip(adapters, weights, (3, 8), strict=True):
            state = load_file(place / ADAPTER_WEIGHTS)
            for key in [key for key in state if "lora_B" in key]:
                name = key.removeprefix("base_model.model.").replace("lora_B.", "")
                product = state[key] @ state[key.replace("lora_B", "lora_A")]
                expected.get_parameter(name).data += weight * alpha / 4 * product
        batch = comparer.texts.batch(0)
        with torch.no_grad():
            logits = expected(input_ids=batch[0], attention_mask=batch[1]).logits[batch[1].bool()]
        torch.testing.assert_close(comparer.reference(plan), logits, rtol=1e-4, atol=1e-4)
