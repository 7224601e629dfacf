"""The output head: the logits of every architecture, trained parts of it, and models that are refused."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.errors import ModelError
from qlora_cli.loss.chunked_loss import token_losses, trained_tokens
from qlora_cli.loss.output_head import backbone_of, check_head, output_head
from qlora_cli.quantization.embedding import embedding_of
from qlora_cli.settings.models import LoraSettings
from tests.support.models.tiny_models import COMMON, FAMILIES, tiny_model

IDS = torch.randint(3, 127, (2, 24), generator=torch.Generator().manual_seed(0))
REFUSED = {"llama4_text"}  # its class does not name its layers
# Heads with a scale or a cap that changes the logits of a tiny model.
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "logit_scale": ("cohere", {"logit_scale": 0.3}),
    "lm_head_multiplier": ("falcon_h1", {"lm_head_multiplier": 3.0}),
    "logits_scaling, a divisor": ("granite", {"logits_scaling": 0.25}),
    "logits_scaling, of experts": ("granitemoe", {"logits_scaling": 0.25}),
    "final_logit_softcapping": ("gemma2", {"final_logit_softcapping": 0.1}),
    "logits_soft_cap": ("recurrent_gemma", {"logits_soft_cap": 0.1}),
}
# The same of architectures that no other test needs.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "logits_scaling, a factor": ("hyperclovax", {"logits_scaling": 4.0}),
    "output_logit_soft_cap": ("xlstm", {"num_heads": 4, "output_logit_soft_cap": 0.1}),
    "no cap": ("nanochat", {"final_logit_softcapping": None}),
}


def other_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return a random model of an architecture that is not in the table of families."""
    values = {**COMMON, **changes}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **values)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def loss_of(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean loss by the head of `model`, as in training."""
    hidden = backbone_of(model)(input_ids=IDS, use_cache=False).last_hidden_state
    positions, targets = trained_tokens(labels)
    return token_losses(hidden, output_head(model), positions, targets, hidden.dtype).total / len(targets)


def assert_same_loss(model: PreTrainedModel) -> None:
    """Assert that the loss, and the gradient of the embedding, are those of the model's own forward pass."""
    labels = IDS.masked_fill(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.4, -100)
    model.eval()
    embedding = embedding_of(model).weight
    own = model(input_ids=IDS, labels=labels, use_cache=False).loss
    ours = loss_of(model, labels)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    expected, gradient = (torch.autograd.grad(loss, [embedding])[0] for loss in (own, ours))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - REFUSED))
def test_the_loss_is_that_of_the_model_s_own_forward_pass(family: str) -> None:
    model = tiny_model(family)
    check_head(model)
    assert_same_loss(model)


@pytest.mark.parametrize("name", SCALED)
def test_scales_and_caps_are_known(name: str) -> None:
    family, changes = SCALED[name]
    model = tiny_model(family, **changes)
    check_head(model)
    assert_same_loss(model)
    head = output_head(model)
    assert head.scale != 1 or head.soft_cap is not None


@pytest.mark.parametrize("name", OTHERS)
def test_scales_and_caps_of_other_architectures_are_known(name: str) -> None:
    family, changes = OTHERS[name]
    model = other_model(family, **changes)
    check_head(model)
    assert_same_loss(model)


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_soft_cap", "logit_scale"])
def test_without_its_scale_or_cap_the_check_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, changes = SCALED[name]
    model = tiny_model(family, **changes)
    for names in ("SOFT_CAPS", "MULTIPLIERS"):
        monkeypatch.setattr(f"qlora_cli.loss.output_head.{names}", ())
    with pytest.raises(ModelError, match="are not those of its output head"):
        check_head(model)


def test_logits_that_are_computed_in_another_way_are_refused() -> None:
    model = tiny_model("llama").train()

    def sharpen(_: torch.nn.Module, __: Any, output: Any) -> None:
        output.logits = output.logits * 1.01

    model.register_forward_hook(sharpen)
    with pytest.raises(ModelError, match="LlamaForCausalLM are not those") as caught:
        check_head(model)
    assert caught.value.exit_code == 2
    assert model.training
    assert not model.model._forward_hooks


def test_ids_without_a_row_of_the_head_do_not_weaken_the_check() -> None:
    """As of models that pad their logits with minus infinity."""
    model = tiny_model("llama")
    factor = 1.0

    def pad(_: torch.nn.Module, __: Any, output: Any) -> None:
        output.logits = torch.nn.functional.pad(output.logits * factor, (0, 3), value=-torch.inf)

    model.register_forward_hook(pad)
    check_head(model)
    factor = 1.01
    with pytest.raises(ModelError, match="are not those of its output head"):
        check_head(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_weights_are_not_called_another_way_of_computing(value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = value
    check_head(model)


def test_a_head_that_transforms_its_input_first_is_refused() -> None:
    model = other_model("modernbert-decoder", hidden_size=64, num_attention_heads=4, global_attn_every_n_layers=1)
    with pytest.raises(ModelError, match="are not those of its output head"):
        check_head(model)


def test_a_model_whose_layers_are_not_named_is_refused() -> None:
    with pytest.raises(ModelError, match="Llama4ForCausalLM can't be told from its output head"):
        check_head(tiny_model("llama4_text"))


def test_a_head_of_codes_is_refused() -> None:
    model = tiny_model("llama")
    codes = torch.nn.Parameter(torch.zeros(4096, 1, dtype=torch.uint8), requires_grad=False)
    head: Any = model.get_output_embeddings()
    head.weight = codes
    with pytest.raises(ModelError, match="no output head with a weight in 16 bit or fp32"):
        output_head(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "recurrent_gemma", "granite", "qwen3_moe", "gpt2", "phi"])
def test_the_check_allows_for_rounding_to_16_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family)
    with torch.autocast("cpu", dtype=dtype):
        check_head(model)


@pytest.mark.parametrize("is_tied", [False, True])
def test_trained_rows_have_the_gradient_that_peft_s_own_head_gives_them(is_tied: bool) -> None:
    model, _ = attach_adapter(tiny_model("llama", tie_word_embeddings=is_tied), LoraSettings(rank=4), (5, 9, 3))
    base = model.get_base_model()
    head = output_head(base)
    assert head.rows is not None
    assert not head.weight.requires_grad
    rows = [parameter for name, parameter in model.named_parameters() if "trainable_tokens_delta" in name]
    assert len(rows) == (1 if is_tied else 2)
    with torch.no_grad():
        for parameter in rows:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model.eval()
    check_head(base)
    own = torch.autograd.grad(model(input_ids=IDS, labels=IDS, use_cache=False).loss, rows)
    ours = torch.autograd.grad(loss_of(base, IDS), rows)
    for gradient, expected in zip(ours, own, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_disabled_adapter_leaves_the_rows_of_the_base() -> None:
    model, _ = attach_adapter(tiny_model("llama"), LoraSettings(rank=4), (5, 9))
    base = model.get_base_model()
    rows = output_head(base).rows
    assert rows is not None
    with torch.no_grad():
        rows.values.add_(1.0)
    with model.disable_adapter():
        assert output_head(base).rows is None
        check_head(base)
        own = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        torch.testing.assert_close(loss_of(base, IDS), own)
    assert loss_of(base, IDS) != own


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_head_that_is_trained_whole_has_the_gradient_of_the_model_s_own_loss(is_tied: bool) -> None:
    lora = LoraSettings(rank=4, modules_to_save=("lm_head",))
    model, _ = attach_adapter(tiny_model("llama", tie_word_embeddings=is_tied), lora)
    weight = output_head(model.get_base_model()).weight
    assert weight.requires_grad
    model.eval()
    (own,) = torch.autograd.grad(model(input_ids=IDS, labels=IDS, use_cache=False).loss, [weight])
    (ours,) = torch.autograd.grad(loss_of(model.get_base_model(), IDS), [weight])
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-6)
