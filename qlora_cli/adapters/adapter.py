"""Attach a LoRA adapter to a frozen base: a new one, or one that was read from its files."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel

from qlora_cli.adapters.base_parameters import GrownHead, keep
from qlora_cli.adapters.expert_lora import use_for_quantized_experts
from qlora_cli.adapters.initialization import (
    begin,
    check_init,
    init_for_peft,
    is_pissa,
    remember_start,
)
from qlora_cli.adapters.reader import Adapter, put_on
from qlora_cli.adapters.state import put_values, remember_origin
from qlora_cli.adapters.targets import ADAPTER, adapted_layers, resolve_pattern, target_modules, target_parameters
from qlora_cli.adapters.whole_modules import find_whole_modules, train_in_fp32, whole_modules
from qlora_cli.errors import ModelError
from qlora_cli.quantization.methods import dora_problem
from qlora_cli.settings.choices import DEFAULT_METHOD, quant_flag
from qlora_cli.settings.models import LoraSettings


def attach_adapter(
    model: PreTrainedModel,
    settings: LoraSettings,
    new_token_ids: tuple[int, ...] = (),
    base_commit: str | None = None,
) -> tuple[PeftModel, tuple[str, ...]]:
    """Return `model` frozen, with LoRA matrices in fp32 on its targets, the only part that trains; and notes.

    The rows of `new_token_ids` train too, in the embedding and in a head of its own, and the modules that settings
    name as a whole. `base_commit`, of a base from the hub, is recorded with the adapter.

    PEFT's `prepare_model_for_kbit_training` is not called: it would upcast norms, embedding and head to
    fp32, which costs 2 GiB on Llama-3.1-8B and gains nothing for a frozen base.

    Raises:
        ModelError: a name in the settings matches nothing of the model, or what can't be trained so.
    """
    modules, notes = target_modules(model, settings)
    parameters = target_parameters(model, settings)
    layers = adapted_layers(model, modules)
    adapted = [*layers, *parameters]
    check_init(model, settings, layers)
    if settings.use_dora:
        _check_dora(model, layers)
    rows = _trained_rows(model, new_token_ids)
    whole = find_whole_modules(model, settings.modules_to_save or (), adapted, rows or ())
    with _checked_here():
        config = LoraConfig(
            task_type="CAUSAL_LM",
            revision=base_commit,
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=modules,
            target_parameters=parameters or None,
            rank_pattern=resolve_pattern(settings.rank_pattern, adapted, "lora.rank_pattern"),
            alpha_pattern=resolve_pattern(settings.alpha_pattern, adapted, "lora.alpha_pattern"),
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            init_lora_weights=init_for_peft(settings.init_lora_weights),
            modules_to_save=list(whole.ends) or None,
            ensure_weight_tying=whole.is_tied,
            trainable_token_indices=rows,
            bias="none",
        )
        use_for_quantized_experts(config, model)
        model.requires_grad_(False)
        result = get_peft_model(model, config, autocast_adapter_dtype=True)
    config.exclude_modules = None  # of this base only; elsewhere PEFT would say that there are no such modules
    assert {name for name, _ in whole_modules(result)} == set(whole.names), "PEFT trains other modules whole"
    train_in_fp32(result)
    begin(result, settings.init_lora_weights)
    _complete_head(model)
    return result, notes


def _check_dora(model: PreTrainedModel, layers: list[str]) -> None:
    for name in layers:
        if reason := dora_problem(model.get_submodule(name)):
            hint = f"Use {quant_flag([DEFAULT_METHOD])}, or leave it out."
            raise ModelError(f"can't be used on {reason}", hint=hint, setting="lora.use_dora")


@contextmanager
def _checked_here() -> Iterator[None]:
    """Leave out what PEFT warns of without cause: keys that are of experts, its conversion, how GPT-2 is stored."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern", UserWarning)
        yield


def place_adapter(model: PreTrainedModel, lora: LoraConfig, directory: Path) -> PeftModel:
    """Return `model` frozen, with an adapter by the config that was read from `directory`, ready for its values.

    Raises:
        ModelError: the model has nothing that the config names, or can't be adapted so.
    """
    config = deepcopy(lora)
    use_for_quantized_experts(config, model)
    config.inference_mode = False
    model.requires_grad_(False)
    return put_on(model, config, directory)


def load_adapter(
    model: PreTrainedModel, adapter: Adapter, *, trainable: bool, num_rows: int | None = None
) -> PeftModel:
    """Return `model` with an adapter that was read for it, in fp32 as far as it was saved so.

    What the adapter's file holds of the base itself is in its place while the adapter is on; the base's own is when it
    is off. `num_rows` are the rows of the base's own vocabulary, if `model` was given more for the adapter.
    """
    head = model.get_output_embeddings()
    grown = None if num_rows is None or head is None else GrownHead(module=head, num_rows=num_rows)
    adapted = place_adapter(model, adapter.lora, adapter.directory)
    adapted.peft_config[ADAPTER].inference_mode = not trainable
    adapted.peft_config[ADAPTER].bias = "none"  # those that were trained are kept next to those of the base
    if trainable:
        if is_pissa(adapter.lora):
            remember_start(adapted)
        train_in_fp32(adapted)
    else:
        adapted.eval()
        adapted.requires_grad_(False)
    put_values(adapted, adapter.values)
    trained = adapter.trained if trainable else frozenset()
    keep(adapted, adapter.kept, given=adapter.given, trained=trained, grown=grown)
    remember_origin(adapted, adapter)
    _complete_head(model)
    return adapted


def _trained_rows(model: PreTrainedModel, ids: tuple[int, ...]) -> dict[str, list[int]] | None:
    if not ids:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ModelError(
            f"{type(model).__name__} can't train new tokens: its output head has a bias, which PEFT would drop",
            hint="Leave --new-tokens out.",
            setting="model.new_tokens",
        )
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    modules = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return {names[module]: list(ids) for module in modules}


def _complete_head(model: PreTrainedModel) -> None:
    # TRL's fused loss reads weight and bias of the head. PEFT's wrapper of a head with trained rows hands the weight
    # on, with those rows in it, but has no bias to say that there is none.
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.bias = None
