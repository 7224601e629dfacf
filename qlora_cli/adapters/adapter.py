"""Attach a LoRA adapter to a frozen base: a new one, or one that was read from files."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from qlora_cli.adapters.base_parameters import ExtendedHead, switch_parameters
from qlora_cli.adapters.expert_lora import expert_wrappers
from qlora_cli.adapters.fused_lora import fused_types
from qlora_cli.adapters.initialization import (
    check_init,
    init_for_peft,
    initialize,
    is_pissa,
    save_initial_factors,
)
from qlora_cli.adapters.reader import Adapter, attach
from qlora_cli.adapters.state import put_values, set_origin
from qlora_cli.adapters.targets import (
    ADAPTER,
    adapted_layers,
    names_ending_in,
    resolve_pattern,
    target_modules,
    target_parameters,
)
from qlora_cli.adapters.whole_modules import find_whole_modules, train_in_fp32, whole_modules
from qlora_cli.errors import ModelError
from qlora_cli.quantization.methods import dora_problem
from qlora_cli.quantization.residuals import QuantizationResiduals
from qlora_cli.settings.choices import DEFAULT_METHOD, quant_flag
from qlora_cli.settings.models import LoraSettings


def attach_adapter(
    model: PreTrainedModel,
    settings: LoraSettings,
    new_token_ids: tuple[int, ...] = (),
    base_commit: str | None = None,
    residuals: QuantizationResiduals | None = None,
) -> tuple[PeftModel, tuple[str, ...]]:
    """Freeze `model` and attach trainable LoRA matrices in fp32 to its targets; return it with notes.

    The rows of `new_token_ids` are trained too, in the embedding and in an untied head, and so are modules that the
    settings name to be trained whole. `base_commit`, for a base from the hub, is recorded with the adapter.
    `residuals` are those that it is initialized from, if they were not recorded while `model` was loaded.

    PEFT's `prepare_model_for_kbit_training` is not called: it would upcast norms, embedding and head to
    fp32, which costs 2 GiB on Llama-3.1-8B and gains nothing for a frozen base.

    Raises:
        ModelError: a name in the settings matches nothing in the model, or something that can't be trained.
    """
    modules, notes = target_modules(model, settings)
    parameters = target_parameters(model, settings)
    layers = adapted_layers(model, modules)
    adapted = [*layers, *parameters]
    check_init(model, settings, layers, residuals)
    if settings.use_dora:
        _check_dora(model, layers)
    rows = _trained_rows(model, new_token_ids)
    whole = find_whole_modules(model, settings.modules_to_save or (), adapted, rows or ())
    with _without_spurious_warnings():
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
            modules_to_save=list(whole.suffixes) or None,
            ensure_weight_tying=whole.is_tied,
            trainable_token_indices=rows,
            bias="none",
        )
        _use_own_layers(config, model)
        model.requires_grad_(False)
        result = get_peft_model(model, config, autocast_adapter_dtype=True)
    config.exclude_modules = None  # specific to this base; on another PEFT would warn that there are no such modules
    assert {name for name, _ in whole_modules(result)} == set(whole.names), "PEFT trains other modules whole"
    train_in_fp32(result)
    initialize(result, settings.init_lora_weights, residuals)
    return result, notes


def _use_own_layers(config: LoraConfig, model: PreTrainedModel) -> None:
    """Have PEFT make our layers, except for types with a weight that is named in `target_parameters`."""
    parameters = names_ending_in(dict(model.named_parameters()), config.target_parameters or ())
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in parameters]
    fused = {
        layer_type: fused_type
        for layer_type, fused_type in fused_types().items()
        if not any(isinstance(owner, layer_type) for owner in owners)
    }
    config._register_custom_module({**fused, **expert_wrappers(config, model)})


def _check_dora(model: PreTrainedModel, layers: list[str]) -> None:
    for name in layers:
        if reason := dora_problem(model.get_submodule(name)):
            hint = f"Use {quant_flag([DEFAULT_METHOD])}, or leave it out."
            raise ModelError(f"can't be used on {reason}", hint=hint, setting="lora.use_dora")


@contextmanager
def _without_spurious_warnings() -> Iterator[None]:
    """Suppress PEFT's unfounded warnings: on keys of experts, on rsLoRA with patterns, on GPT-2's layout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern", UserWarning)
        yield


def attach_from_config(model: PreTrainedModel, lora: LoraConfig, directory: Path) -> PeftModel:
    """Freeze `model` and attach an adapter by the config that was read from `directory`, without its values yet.

    Raises:
        ModelError: the model has nothing that the config names, or can't be adapted so.
    """
    config = deepcopy(lora)
    _use_own_layers(config, model)
    config.inference_mode = False
    model.requires_grad_(False)
    return attach(model, config, directory)


def load_adapter(
    model: PreTrainedModel, adapter: Adapter, *, trainable: bool, num_rows: int | None = None
) -> PeftModel:
    """Attach an adapter that was read for `model`, in fp32 if it was saved so; return the adapted model.

    Parameters of the base in the adapter's file are active while the adapter is enabled; otherwise the base's own are.
    `num_rows` is the size of the base's own vocabulary, if that of `model` was extended for the adapter.
    """
    head = model.get_output_embeddings()
    extended = None if num_rows is None or head is None else ExtendedHead(module=head, num_rows=num_rows)
    adapted = attach_from_config(model, adapter.lora, adapter.directory)
    adapted.peft_config[ADAPTER].inference_mode = not trainable
    adapted.peft_config[ADAPTER].bias = "none"  # trained biases are switched with those of the base
    if trainable:
        if is_pissa(adapter.lora):
            save_initial_factors(adapted)
        train_in_fp32(adapted)
    else:
        adapted.eval()
        adapted.requires_grad_(False)
    put_values(adapted, adapter.values)
    trained = adapter.trained if trainable else frozenset()
    switch_parameters(adapted, adapter.base_parameters, given=adapter.in_file, trained=trained, extended=extended)
    set_origin(adapted, adapter)
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
