"""Attach a LoRA adapter to a frozen base: a new one, or one that was trained before; and save it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel

from qlora_cli.adapters.expert_lora import use_for_quantized_experts
from qlora_cli.adapters.initialization import (
    begin,
    check_init,
    check_pissa,
    init_for_peft,
    is_pissa,
    remember_start,
    to_plain_lora,
)
from qlora_cli.adapters.targets import ADAPTER, adapted_layers, resolve_pattern, target_modules, target_parameters
from qlora_cli.adapters.whole_modules import find_whole_modules, train_in_fp32, whole_modules
from qlora_cli.errors import ModelError
from qlora_cli.model_files.adapter_files import ADAPTER_PICKLE, ADAPTER_WEIGHTS
from qlora_cli.model_files.checkpoint import read_header
from qlora_cli.model_files.pickles import check_pickle
from qlora_cli.quantization.methods import why_no_dora
from qlora_cli.settings.choices import DEFAULT_METHOD, quant_flag
from qlora_cli.settings.models import LoraSettings

SAME_BASE = "Was it trained on this base? adapter_config.json names the base it belongs to."


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
        if reason := why_no_dora(model.get_submodule(name)):
            hint = f"Use {quant_flag([DEFAULT_METHOD])}, or leave lora.use_dora out."
            raise ModelError(f"lora.use_dora can't be used on {reason}", hint=hint)


@contextmanager
def _checked_here() -> Iterator[None]:
    """Leave out what PEFT warns of without cause: keys that are of experts, its conversion, how GPT-2 is stored."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern", UserWarning)
        yield


def check_adapter_file(directory: Path) -> None:
    """Check that the weights of the adapter in `directory` can be read, before its base is.

    Raises:
        ModelError: they can't; names the file.
    """
    if (directory / ADAPTER_WEIGHTS).is_file():
        read_header(directory, ADAPTER_WEIGHTS)
    else:
        check_pickle(directory / ADAPTER_PICKLE)


def load_adapter(model: PreTrainedModel, directory: Path, *, trainable: bool) -> PeftModel:
    """Return `model` with the adapter in `directory`, in fp32 as far as it was saved so.

    Its file can be read, as `check_adapter_file` has seen.

    Raises:
        ModelError: the adapter does not fit the model, or its config can't be read.
    """
    try:
        with _checked_here():
            config = PeftConfig.from_pretrained(directory)
        if not isinstance(config, LoraConfig):
            raise ModelError(
                f"the adapter in {directory} is {config.peft_type.value}, not LoRA",
                hint="Train a LoRA adapter on the base.",
            )
        if is_pissa(config):
            check_pissa(model)
        use_for_quantized_experts(config, model)
        model.requires_grad_(False)
        with _checked_here():
            # PEFT would go on with adapters that do nothing where it found none.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = _begun(model, config, directory, trainable=trainable)
            config.exclude_modules = None
            # It drops what it finds no place for, and only here says so.
            left_over = adapted.load_adapter(directory, ADAPTER, is_trainable=trainable).unexpected_keys
    except (OSError, ValueError, KeyError, RuntimeError, UserWarning) as error:
        if isinstance(error, ModelError):
            raise
        reason, *more = [line.strip() for line in str(error).splitlines() if "Error(s) in loading" not in line]
        others = f" (and {len(more)} more)" if more else ""
        raise ModelError(f"the adapter in {directory} can't be attached: {reason}{others}", hint=SAME_BASE) from error
    if left_over:
        raise ModelError(
            f"the adapter in {directory} has {len(left_over)} weights that the base has no place for, such as "
            f"{left_over[0]}",
            hint=SAME_BASE,
        )
    _complete_head(model)
    return adapted


def _begun(model: PreTrainedModel, config: LoraConfig, directory: Path, *, trainable: bool) -> PeftModel:
    """Return `model` with the adapter in `directory` attached, ready for its values to be read as they were saved."""
    if not trainable:
        return PeftModel.from_pretrained(model, directory, config=config)
    if is_pissa(config):
        config.inference_mode = False
        adapted = get_peft_model(model, config)
        remember_start(adapted)
    else:
        adapted = PeftModel.from_pretrained(model, directory, config=config, is_trainable=True)
    train_in_fp32(adapted)
    return adapted


def save_adapter(model: PeftModel, directory: Path, state: dict[str, Any] | None = None) -> None:
    """Write the adapter of `model` to `directory` as it trains, with the rows that it trains and no others."""
    # By itself PEFT asks the hub whether the embedding was grown, and if so writes all of it, gigabytes.
    model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)


def save_trained_adapter(model: PeftModel, directory: Path) -> None:
    """Write the adapter of `model` to `directory`, for the base as it was before the adapter was attached.

    PiSSA takes parts out of the base: what `save_adapter` writes of it is for training on, and for PEFT alone.
    """
    save_adapter(model, directory)
    if is_pissa(model.peft_config[ADAPTER]):
        to_plain_lora(model, directory)


def _trained_rows(model: PreTrainedModel, ids: tuple[int, ...]) -> dict[str, list[int]] | None:
    if not ids:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ModelError(
            f"{type(model).__name__} can't train new tokens: its output head has a bias, which PEFT would drop",
            hint="Leave --new-tokens out.",
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
