"""LoRA on quantized experts: it trains, leaves no parametrizations, and works in plain PEFT on the 16-bit base."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.adapters.fused_lora import switch_fused
from qlora_cli.adapters.writer import save_adapter
from qlora_cli.errors import ModelError
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.settings.models import LoraSettings
from tests.integration.training.test_training import base_digest
from tests.support.models.adapters import put_back
from tests.support.models.experts import MOE, parametrized, save_moe
from tests.support.models.loading import load, logits, save_model
from tests.support.models.reference_models import IDS, ROWS, dequantized, load_plain

pytestmark = pytest.mark.usefixtures("one_thread")

ON_EXPERTS = LoraSettings(rank=8, target_parameters="all-experts")
PREFIX = "base_model.model."


@pytest.fixture(scope="module", params=[family for family in MOE if family != "dbrx"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_moe(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_moe(tmp_path_factory.mktemp("qwen3_moe"), "qwen3_moe")


def expert_wrappers(model: PeftModel) -> dict[str, ParamWrapper]:
    """Return the adapters on fused parameters, by the parameter's full name in the base."""
    return {
        f"{name.removeprefix(PREFIX).replace('.base_layer', '')}.{module.parameter_name}": module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


def loss_of(model: PeftModel) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    return loss


def train(model: PeftModel, num_steps: int, learning_rate: float = 5e-3) -> list[float]:
    """Return the losses before each step and after the last; check that no parametrizations pile up."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert {len(chain) for chain in parametrized(model).values()} == {1}
        assert torch.nn.utils.parametrize._cache == {}
    return [*losses, loss_of(model).item()]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A quantized base with an adapter that was trained for three steps, and its adapter as it was saved."""

    base: LoadedModel
    untrained_logits: torch.Tensor
    digests: tuple[str, str]
    losses: list[float]
    model: PeftModel
    logits: torch.Tensor
    adapter: Path


@pytest.fixture(scope="module")
def trained(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model that tests of a family share; those that switch something switch it back."""
    base = load(checkpoint)
    untrained_logits = logits(base.base, IDS)
    model, _ = attach_adapter(base.base, ON_EXPERTS)
    digest, losses = base_digest(model), train(model, 3)
    adapter = tmp_path_factory.mktemp("adapter")
    save_adapter(model, adapter)
    return Trained(
        base=base,
        untrained_logits=untrained_logits,
        digests=(digest, base_digest(model)),
        losses=losses,
        model=model,
        logits=logits(model, IDS),
        adapter=adapter,
    )


def test_every_stacked_weight_gets_an_adapter_that_trains_and_is_removed_after_each_step(trained: Trained) -> None:
    wrappers = expert_wrappers(trained.model)
    assert wrappers.keys() == set(trained.base.layout.experts)
    assert trained.losses[3] < trained.losses[2] < trained.losses[1] < trained.losses[0]
    assert trained.digests[0] == trained.digests[1]
    for name, wrapper in wrappers.items():
        assert wrapper.lora_B["default"].weight.dtype == torch.float32
        assert wrapper.lora_B["default"].weight.abs().max() > 0, name


def with_peft_alone(base: LoadedModel) -> PeftModel:
    config = LoraConfig(
        r=8,
        target_modules=["q_proj"],
        target_parameters=list(base.layout.experts),
        exclude_modules=r".*\.parametrizations\..*",
    )
    return get_peft_model(base.base, config)


# Three faults of PEFT 0.21.2 that `expert_lora` avoids: when one of these tests fails, PEFT has fixed it.


def test_peft_alone_leaves_one_more_parametrization_after_each_pass(qwen3_moe: Path) -> None:
    model = with_peft_alone(load(qwen3_moe))
    lengths = []
    for _ in range(3):
        with torch.no_grad(), pytest.warns(UserWarning, match="Could not find any LoRA parametrization"):
            loss_of(model)
        lengths.append({len(chain) for chain in parametrized(model).values()})
    assert lengths == [{2}, {3}, {4}]


@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization:UserWarning")
def test_peft_alone_trains_only_one_of_two_weights_of_a_module(qwen3_moe: Path) -> None:
    model = with_peft_alone(load(qwen3_moe))
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    trained = {
        name.rpartition(".")[2]
        for name, wrapper in expert_wrappers(model).items()
        if wrapper.lora_B["default"].weight.grad is not None
    }
    assert trained == {"gate_up_proj"}


def test_peft_alone_nests_wrappers_differently_than_on_an_unquantized_base(qwen3_moe: Path) -> None:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=8, target_modules=["q_proj"], target_parameters=names)
    nested = [
        [name.rpartition(".")[2] for name in expert_wrappers(model) if "layers.0" in name]  # the outer one first
        for model in (get_peft_model(load_plain(qwen3_moe), config), with_peft_alone(load(qwen3_moe)))
    ]
    assert nested == [["down_proj", "gate_up_proj"], ["gate_up_proj", "down_proj"]]


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# transformers 5.2x renames them; 5.17 knows only these names.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")
def test_gradients_with_and_without_checkpointing_are_equal(trained: Trained) -> None:
    model = trained.model
    model.train()
    without, num_forwards = counted_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with_checkpointing, num_forwards_again = counted_gradients(model)
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()
    assert num_forwards_again == 2 * num_forwards > 0  # it did recompute
    assert without.keys() == with_checkpointing.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(without[name], with_checkpointing[name]) for name in without)
    assert all(without[name].abs().max() > 0 for name in without if ".experts." in name)
    assert {len(chain) for chain in parametrized(model).values()} == {1}
    assert torch.nn.utils.parametrize._cache == {}


def counted_gradients(model: PeftModel) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients, and the number of forward passes of expert adapters that they took."""
    forward = ParamWrapper.forward
    calls = []

    def counting(self: ParamWrapper, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParamWrapper, "forward", counting)
        return gradients(model), len(calls)


# ---- elsewhere


def saved_adapter(base: LoadedModel, directory: Path) -> tuple[PeftModel, Path]:
    """Train three steps; return the model and the directory of its adapter."""
    model, _ = attach_adapter(base.base, ON_EXPERTS)
    train(model, 3)
    save_adapter(model, directory)
    return model, directory


def test_logits_and_gradients_are_the_same_in_plain_peft_on_the_dequantized_weights(
    trained: Trained, checkpoint: Path
) -> None:
    model = trained.model
    other = PeftModel.from_pretrained(dequantized(checkpoint, trained.base), trained.adapter, is_trainable=True)
    assert type(next(iter(expert_wrappers(other).values()))) is ParamWrapper  # PEFT's own
    switch_fused(model, enabled=False)  # linear layers are added up in another order, experts are not
    try:
        assert torch.equal(logits(other, IDS), logits(model, IDS))
        expected, actual = gradients(other), gradients(model)
    finally:
        switch_fused(model, enabled=True)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_adapter_does_the_same_in_plain_peft_on_the_unquantized_base_but_for_the_quantization(
    trained: Trained, checkpoint: Path
) -> None:
    other = logits(PeftModel.from_pretrained(load_plain(checkpoint), trained.adapter), IDS)
    assert (other - trained.logits).std() < 0.4 * (trained.logits - trained.untrained_logits).std()


def test_the_adapter_loads_again_on_a_fresh_quantized_base(trained: Trained, checkpoint: Path) -> None:
    again = put_back(load(checkpoint).base, trained.adapter)
    assert torch.equal(logits(again, IDS), trained.logits)


def test_an_adapter_trained_by_plain_peft_loads_on_a_quantized_base(qwen3_moe: Path, tmp_path: Path) -> None:
    base = load(qwen3_moe)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # ends of names, as users write them
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj"], target_parameters=names)
    theirs = get_peft_model(dequantized(qwen3_moe, base), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(2):
        loss_of(theirs).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    theirs.save_pretrained(tmp_path)
    ours = put_back(base.base, tmp_path)
    assert expert_wrappers(ours).keys() == set(base.layout.experts)
    assert torch.equal(logits(ours, IDS), logits(theirs, IDS))


def test_halves_are_not_swapped_if_only_one_of_two_weights_is_quantized(tmp_path: Path) -> None:
    """On a CPU, weights with rows of 32 stay in 16 bit: that of down, not that of gate and up."""
    checkpoint = save_model(tmp_path / "base", "qwen3_moe", vocab_size=ROWS, moe_intermediate_size=32)
    base = load(checkpoint)
    assert {name.rpartition(".")[2] for name in base.layout.experts} == {"gate_up_proj"}
    model, adapter = saved_adapter(base, tmp_path / "adapter")
    assert len(expert_wrappers(model)) == 4
    assert all(wrapper.lora_B["default"].weight.abs().max() > 0 for wrapper in expert_wrappers(model).values())
    other = PeftModel.from_pretrained(dequantized(checkpoint, base), adapter)
    torch.testing.assert_close(logits(other, IDS), logits(model, IDS), rtol=1e-5, atol=1e-6)


def test_half_an_adapter_is_refused_rather_than_loaded(qwen3_moe: Path, tmp_path: Path) -> None:
    _, adapter = saved_adapter(load(qwen3_moe), tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors[next(name for name in tensors if "layers.1.self_attn.q_proj.lora_B" in name)]
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, such as .*layers\.1\.self_attn\.q_proj"):
        put_back(load(qwen3_moe).base, adapter, trainable=False)


# ---- refused


def test_dropout_on_experts_is_refused(qwen3_moe: Path) -> None:
    with pytest.raises(ModelError, match=r"lora.dropout: 0.1 can't be applied to fused experts"):
        attach_adapter(load(qwen3_moe).base, ON_EXPERTS.model_copy(update={"dropout": 0.1}))


def test_unknown_names_are_refused_with_those_that_exist(qwen3_moe: Path) -> None:
    with pytest.raises(ModelError, match=r"lora.target_parameters: 'up_proj' matches no fused parameter") as caught:
        attach_adapter(load(qwen3_moe).base, LoraSettings(target_parameters="up_proj"))
    assert "down_proj, gate_up_proj" in str(caught.value.hint)


def test_a_named_weight_alone_gets_an_adapter(qwen3_moe: Path) -> None:
    model, _ = attach_adapter(load(qwen3_moe).base, LoraSettings(rank=8, target_parameters="down_proj"))
    assert set(expert_wrappers(model)) == {f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)}
    train(model, 2)


def test_a_model_without_experts_is_refused(base_model: Path) -> None:
    with pytest.raises(ModelError, match="has no fused experts"):
        attach_adapter(load(base_model).base, ON_EXPERTS)


def test_experts_in_a_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="DbrxForCausalLM stores its experts concatenated"):
        attach_adapter(load(save_moe(tmp_path, "dbrx")).base, ON_EXPERTS)
