"""`lora.modules_to_save`: modules that train whole next to an adapter, in fp32, and load again unchanged."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.adapters.whole_modules import whole_modules
from qlora_cli.adapters.writer import save_adapter
from qlora_cli.errors import ModelError
from qlora_cli.loss.chunked_loss import trained_tokens
from qlora_cli.model_files.adapter_files import ADAPTER_WEIGHTS
from qlora_cli.quantization.embedding import embedding_of
from qlora_cli.training.loss_model import LossModel
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, train_settings
from tests.support.models.adapters import adapt, assert_loads_again, frozen, put_back, settings_of, train_steps
from tests.support.models.loading import load, logits, save_model
from tests.support.models.reference_models import IDS, ROWS, dequantized

pytestmark = pytest.mark.usefixtures("one_thread")


def refusal(
    checkpoint: Path, *names: str, new_token_ids: tuple[int, ...] = (), flags: Any = None, **lora: object
) -> str:
    """Return message and hint of the error that refuses these modules."""
    base = load(checkpoint, **(flags or {})).base
    with pytest.raises(ModelError) as caught:
        attach_adapter(base, settings_of(modules_to_save=names, **lora), new_token_ids)
    return f"{caught.value} | {caught.value.hint}"


def trained_whole(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters that are not LoRA matrices."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}


NORMS = [f"model.layers.{index}.{name}_layernorm" for index in range(2) for name in ("input", "post_attention")]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("lm_head",), ["lm_head"]),
        (("embed_tokens",), ["model.embed_tokens"]),
        (("norm",), ["model.norm"]),  # and none of the others whose names end in norm
        (("input_layernorm",), [NORMS[0], NORMS[2]]),
        (("layers.1.input_layernorm", "lm_head"), [NORMS[2], "lm_head"]),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_modules_are_found_by_their_names_trained_in_fp32_and_loaded_again(
    llama: Path, names: tuple[str, ...], expected: list[str], dtype: str, tmp_path: Path
) -> None:
    how = {"model__dtype": dtype}
    before = logits(adapt(llama, settings_of(), **how), IDS)
    model = adapt(llama, settings_of(modules_to_save=names), **how)
    assert sorted(name for name, _ in whole_modules(model)) == sorted(expected)
    whole = trained_whole(model)
    assert len(whole) == len(expected)
    assert {p.dtype for p in whole.values()} == {torch.float32}
    torch.testing.assert_close(logits(model, IDS), before, rtol=2e-2, atol=2e-2)
    assert logits(model, IDS).dtype == before.dtype
    values = {name: p.detach().clone() for name, p in whole.items()}
    held = {name: p.clone() for name, p in frozen(model).items()}
    losses = train_steps(model, learning_rate=2e-3)
    assert losses[0] > losses[1] > losses[2]
    assert all(not torch.equal(p, values[name]) for name, p in whole.items())
    assert all(torch.equal(p, held[name]) for name, p in frozen(model).items())
    assert_loads_again(model, llama, tmp_path, **how)
    stored = load_file(tmp_path / ADAPTER_WEIGHTS)
    assert {name: stored[f"base_model.model.{name}.weight"].dtype for name in expected} == dict.fromkeys(
        expected, torch.float32
    )


@pytest.mark.parametrize("names", [("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head"), ("norm", "lm_head")])
def test_a_tied_head_trains_as_one_with_the_embedding(tied: Path, names: tuple[str, ...], tmp_path: Path) -> None:
    model = adapt(tied, settings_of(modules_to_save=names))
    base = model.get_base_model()

    def is_one() -> bool:
        return base.get_input_embeddings().weight is base.get_output_embeddings().weight

    assert is_one()
    assert len(trained_whole(model)) == 1 + ("norm" in names)
    before = base.get_input_embeddings().weight.detach().clone()
    losses = train_steps(model, learning_rate=2e-3)
    assert losses[0] > losses[1] > losses[2]
    assert not torch.equal(base.get_input_embeddings().weight, before)
    assert is_one()
    assert_loads_again(model, tied, tmp_path)
    again = put_back(load(tied).base, tmp_path).get_base_model()
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    other = PeftModel.from_pretrained(dequantized(tied, load(tied)), tmp_path)
    torch.testing.assert_close(logits(other, IDS), logits(model, IDS), rtol=1e-4, atol=1e-5)


def test_the_modules_are_the_same_in_plain_peft(llama: Path, tmp_path: Path) -> None:
    model = adapt(llama, settings_of(modules_to_save=("lm_head", "norm")))
    train_steps(model, learning_rate=2e-3)
    save_adapter(model, tmp_path)
    other = PeftModel.from_pretrained(dequantized(llama, load(llama)), tmp_path)
    torch.testing.assert_close(logits(other, IDS), logits(model, IDS), rtol=1e-4, atol=1e-5)


def test_peft_alone_would_train_every_norm(llama: Path) -> None:
    """`find_whole_modules` avoids this: when this test fails, PEFT matches whole names."""
    config = LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["norm"])
    assert len(whole_modules(get_peft_model(load(llama).base, config))) == 5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_head_trains_in_the_trainer_and_is_in_the_adapter_that_it_writes(
    llama: Path, rows: Path, tmp_path: Path, dtype: str
) -> None:
    """The loss is computed from the weight of the head itself and bypasses its forward."""
    names = ("lm_head", "norm")
    settings = train_settings(llama, rows, tmp_path / "run", model__dtype=dtype, lora__modules_to_save="lm_head,norm")
    train(settings, Recorder())
    adapter = tmp_path / "run" / "adapter"
    stored = load_file(adapter / ADAPTER_WEIGHTS)
    base = load(llama, model__dtype=dtype)
    for name, full in zip(names, ("lm_head", "model.norm"), strict=True):
        first, last = base.base.get_parameter(f"{full}.weight"), stored[f"base_model.model.{full}.weight"]
        assert last.dtype == torch.float32
        moved = (last - first.float()).abs()
        assert (moved > 1e-5).float().mean() > 0.9, name
        assert moved.max() < 0.01
    with_both = put_back(base.base, adapter)
    without = {name: value for name, value in stored.items() if "lm_head" not in name}
    assert len(without) == len(stored) - 1
    assert not torch.equal(with_both.get_base_model().get_output_embeddings().weight, first)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_gradient_in_the_trainer_s_loss_is_that_in_the_model_s_own(
    llama: Path, tied: Path, name: str, is_tied: bool
) -> None:
    model = adapt(tied if is_tied else llama, settings_of(modules_to_save=(name,)))
    model.train()
    (weight,) = trained_whole(model).values()
    (expected,) = torch.autograd.grad(model(input_ids=IDS, labels=IDS, use_cache=False).loss, [weight])
    positions, targets = trained_tokens(IDS)
    losses = LossModel(model.get_base_model(), nullcontext, trains_dft=False)(
        input_ids=IDS, positions=positions, targets=targets
    )
    (gradient,) = torch.autograd.grad(losses.total / losses.num_items, [weight])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


# ---- refused


def test_a_name_that_matches_nothing_is_refused_with_the_available_names(llama: Path) -> None:
    message = refusal(llama, "classifier")
    assert message.startswith("lora.modules_to_save: 'classifier' matches no module of the model | Its modules are")
    assert "lm_head" in message
    # Names match by whole parts, not by the end of a string.
    assert "'head' matches no module" in refusal(llama, "head")


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_quantized_module_is_refused_and_trains_if_it_is_skipped(llama: Path, method: str) -> None:
    flags = {"quantization__method": method}
    message = refusal(llama, "o_proj", flags=flags, target_modules=("q_proj",))
    assert "o_proj is stored quantized, and codes can't be trained" in message
    assert "--set quantization.skip_modules=o_proj" in message
    assert "stored quantized" in refusal(llama, "self_attn", flags=flags)
    lora = settings_of(modules_to_save=("o_proj",), target_modules=("q_proj",))
    model = adapt(llama, lora, quantization__skip_modules="o_proj", **flags)
    assert len(trained_whole(model)) == 2


def test_a_module_that_gets_an_adapter_too_is_refused(llama: Path) -> None:
    flags = {"quantization__method": "none"}
    message = refusal(llama, "mlp", flags=flags)
    assert "model.layers.0.mlp would be trained whole, and model.layers.0.mlp.gate_proj has an adapter" in message
    assert "q_proj would be trained whole" in refusal(llama, "q_proj", flags=flags)
    model = adapt(llama, settings_of(modules_to_save=("mlp",), target_modules=("q_proj",)), **flags)
    losses = train_steps(model, learning_rate=2e-3)
    assert losses[0] > losses[1] > losses[2]


def test_a_module_with_rows_of_new_tokens_is_refused(llama: Path, tied: Path) -> None:
    for checkpoint, name in ((llama, "embed_tokens"), (llama, "lm_head"), (tied, "embed_tokens"), (tied, "lm_head")):
        assert "the rows of --new-tokens are in it" in refusal(checkpoint, name, new_token_ids=(5,))
    adapt(llama, settings_of(modules_to_save=("norm",)))


def test_parts_containers_and_modules_without_weights_are_refused(llama: Path) -> None:
    flags = {"quantization__method": "none"}
    message = refusal(llama, "mlp", "mlp.up_proj", flags=flags, target_modules=("q_proj",))
    assert "model.layers.0.mlp.up_proj is a part of model.layers.0.mlp, which is trained whole" in message
    assert "model.layers is a ModuleList" in refusal(llama, "layers", flags=flags)
    assert "has nothing to train" in refusal(llama, "rotary_emb")


def test_an_embedding_in_host_memory_is_refused(llama: Path) -> None:
    base = load(llama).base
    # Separate from the head, as on a GPU.
    embedding_of(base).weight = torch.nn.Parameter(torch.empty(1, device="meta"))
    with pytest.raises(ModelError, match="an embedding in host memory can't be trained whole"):
        attach_adapter(base, settings_of(modules_to_save=("embed_tokens",)))


def test_a_tied_head_of_another_name_is_refused(tmp_path: Path) -> None:
    gpt2 = save_model(tmp_path, "gpt2", vocab_size=ROWS)
    message = refusal(gpt2, "wte")
    assert "lm_head and transformer.wte are tied, and PEFT would train them separately" in message
