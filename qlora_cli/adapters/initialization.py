"""Initialize an adapter's matrices where PEFT's own initialization does not work, and convert PiSSA to plain LoRA.

PEFT's orthogonal initialization uses the dtype of the stored weight, here that of packed codes, and its LoftQ
quantizes the weights itself. PiSSA is PEFT's own: PEFT repeats it when an adapter with that config is loaded.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from qlora_cli.adapters.targets import ADAPTER, BASE, rank_of
from qlora_cli.errors import ModelError
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_pissa_initialization
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.quantization.methods import is_quantized_layer
from qlora_cli.quantization.residuals import QuantizationResiduals
from qlora_cli.settings.choices import METHODS, LoraInit, quant_flag
from qlora_cli.settings.models import LoraSettings

SETTING = "lora.init_lora_weights"
INITIAL_FACTORS = "qlora_pissa_start"  # the attribute of a model with the A and B that were subtracted from its base

PeftInit = bool | str


def init_for_peft(init: LoraInit) -> PeftInit:
    """Return the value for PEFT's config: the default if the initialization is replaced afterwards."""
    return init.value if init in {LoraInit.GAUSSIAN, LoraInit.PISSA} else True


def is_pissa(config: LoraConfig) -> bool:
    """Return whether an adapter holds the principal components of its base, which PEFT subtracts on attaching."""
    return is_pissa_initialization(config.init_lora_weights)


def is_olora(config: LoraConfig) -> bool:
    """Return whether an adapter was initialized by OLoRA, which subtracts components from the base, too."""
    return isinstance(config.init_lora_weights, str) and config.init_lora_weights.lower() == "olora"


def base_change(config: LoraConfig) -> str | None:
    """Return why the model with its adapter disabled differs from its base; None if it does not."""
    if is_pissa(config):
        return "a PiSSA adapter in training holds a part of it"
    if is_olora(config):
        return "an OLoRA adapter holds a part of it"
    if config.layer_replication:
        return "the adapter repeats layers of it (layer_replication)"
    return None


def check_init(
    model: PreTrainedModel,
    settings: LoraSettings,
    layers: list[str],
    residuals: QuantizationResiduals | None = None,
) -> None:
    """Check that adapters on `layers`, full names, can be initialized as the settings say.

    Raises:
        ModelError: they can't.
    """
    init = settings.init_lora_weights
    if init.fits_quantization_error and residuals is None and _residuals_of(model) is None:
        measurable = quant_flag(method for method in METHODS if method.traits.measures_error)
        raise ModelError(
            f"{init.value} needs the weights as they were before quantization, which were not recorded",
            hint=f"Load the 16-bit model with {measurable}, or use another lora.init_lora_weights.",
            setting=SETTING,
        )
    for name in layers if init in {LoraInit.PISSA, LoraInit.ORTHOGONAL} else ():
        layer, rank = model.get_submodule(name), rank_of(name, settings)
        if init == LoraInit.ORTHOGONAL and rank % 2:
            raise ModelError(
                f"orthogonal needs an even rank, and {name} has {rank}",
                hint="Change lora.rank or lora.rank_pattern.",
                setting=SETTING,
            )
        if init == LoraInit.PISSA:
            check_unquantized(layer, "PiSSA")
            _check_rank(name, layer, rank)


def check_unquantized(module: nn.Module, kind: str) -> None:
    """Check that no weight in `module`, from which a new adapter of `kind` subtracts components, is quantized.

    Raises:
        ModelError: one is.
    """
    if any(is_quantized_layer(layer) for layer in module.modules()):
        raise _subtracts_components(
            kind, hint="Use --quant none, or loftq, which is initialized from the quantization error."
        )


def quantized_base_problem(config: LoraConfig) -> ModelError | None:
    """Return why an adapter that was read can't be attached to a quantized base; None if it can."""
    if not (is_pissa(config) or is_olora(config)):
        return None
    kind = "PiSSA" if is_pissa(config) else "OLoRA"
    return _subtracts_components(kind, hint="Use --quant none, with a base that is not stored quantized.")


def _subtracts_components(kind: str, *, hint: str) -> ModelError:
    return ModelError(
        f"{kind} can't be used on a quantized base: it subtracts principal components from the weights, and the rest "
        "would have to be quantized again, to a base that fits this adapter only",
        hint=hint,
    )


def _check_rank(name: str, layer: nn.Module, rank: int) -> None:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if rank > min(weight.shape):
        raise ModelError(
            f"{name} is {' x '.join(map(str, weight.shape))}, and has no {rank} principal components for pissa",
            hint="Lower lora.rank, or give the layer another in lora.rank_pattern.",
            setting=SETTING,
        )


def initialize(model: PeftModel, init: LoraInit, residuals: QuantizationResiduals | None = None) -> None:
    """Initialize the matrices of the adapter of `model`, which was attached with `init_for_peft`.

    `residuals` are taken from the loading of the model if they are not given, and freed one after another.
    """
    if init == LoraInit.PISSA:
        save_initial_factors(model)
    elif init == LoraInit.ORTHOGONAL:
        for _, layer in _lora_layers(model):
            _initialize_orthogonal(layer)
    elif init.fits_quantization_error:
        residuals = residuals or _residuals_of(model.get_base_model())
        assert residuals is not None, "checked before the adapter was attached"
        for name, layer in _lora_layers(model):
            factors = residuals.factors.pop(f"{name}.weight", None)
            if factors is not None:  # else the layer is not stored in 4 bit
                root = layer.scaling[ADAPTER] ** 0.5
                _set_factors(layer, factors.left / root, factors.right / root)


def _residuals_of(model: PreTrainedModel) -> QuantizationResiduals | None:
    quantizer = getattr(model, "hf_quantizer", None)
    residuals = getattr(getattr(quantizer, "quantization_config", None), "residuals", None)
    return residuals if isinstance(residuals, QuantizationResiduals) and residuals.factors else None


def _lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            yield name.removeprefix(BASE), module


def _initialize_orthogonal(layer: LoraLayer) -> None:
    """Initialize A and B to non-zero matrices whose product is zero, as PEFT does for unquantized weights.

    The rows of A are built from one half of an orthonormal basis, the columns of B from the other.
    """
    rank = layer.r[ADAPTER]
    basis, _ = torch.linalg.qr(torch.randn(rank, rank))
    right = (torch.randn(layer.in_features, rank // 2) @ basis[0::2]).T / 10
    left = torch.randn(rank // 2, layer.out_features).T @ basis[1::2] / 10
    _set_factors(layer, left, right)


@torch.no_grad()
def _set_factors(layer: LoraLayer, left: torch.Tensor, right: torch.Tensor) -> None:
    """Copy `left` to B and `right` to A; if the adapter's rank is larger, leave the remaining rows and columns.

    A row of zeros leaves that of A, too: two zeros would have no gradient.
    """
    lora_a, lora_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    lora_a[: right.shape[0]] = torch.where(right.any(1, keepdim=True), right.to(lora_a), lora_a[: right.shape[0]])
    lora_b[:, : left.shape[1]] = left
    if ADAPTER in layer.lora_magnitude_vector:  # the norm of the weight with its update
        layer.lora_magnitude_vector[ADAPTER].update_layer(
            base_layer=layer.get_base_layer(), lora_A=lora_a, lora_B=lora_b, scaling=layer.scaling[ADAPTER]
        )


def save_initial_factors(model: PeftModel) -> None:
    """Save the A and B that PiSSA subtracted from the base of `model` in host memory, for `to_plain_lora`."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    start = {key: value.detach().to("cpu", copy=True) for key, value in state.items() if _is_factor(key)}
    setattr(model, INITIAL_FACTORS, start)


def _is_factor(key: str) -> bool:
    return key.endswith((".lora_A.weight", ".lora_B.weight"))


def as_trained(model: PeftModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a saved state of the adapter of `model` as it trains: without what `to_plain_lora` has added."""
    start: dict[str, torch.Tensor] = getattr(model, INITIAL_FACTORS, {})
    trained = dict(state)
    for key, first in start.items():
        dim, sign = _concatenation(key)
        length = first.shape[dim]
        if key in state and state[key].shape[dim] == 2 * length:
            raw, added = torch.split(state[key], length, dim=dim)
            if torch.equal(added, sign * first):
                trained[key] = raw.contiguous()
    return trained


def _concatenation(key: str) -> tuple[int, int]:
    """Return the dimension along which PiSSA's initial factor is concatenated to the trained one, and its sign."""
    return (0, 1) if key.endswith(".lora_A.weight") else (1, -1)


def to_plain_lora(model: PeftModel, directory: Path) -> None:
    """Convert the PiSSA adapter of `model`, saved in `directory`, to LoRA of twice the rank on the original base.

    The base in training is W - s B0 A0, so the update of W is s (B A - B0 A0) = s [B, -B0] [A; A0]. PEFT's own
    conversion would omit DoRA's magnitudes and modules trained whole, and not scale rsLoRA with a pattern.
    """
    start: dict[str, torch.Tensor] = getattr(model, INITIAL_FACTORS)
    state = load_file(directory / ADAPTER_WEIGHTS)
    assert start.keys() == {key for key in state if _is_factor(key)}, "the adapter is not the one that was initialized"
    for key, first in start.items():
        dim, sign = _concatenation(key)
        state[key] = torch.cat([state[key], sign * first], dim=dim)
    save_file(state, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    # The file may be from another author: keys that it lacks have PEFT's defaults.
    config, lora = read_json(directory / ADAPTER_CONFIG), model.peft_config[ADAPTER]
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    factor = 2**0.5 if lora.use_rslora else 2  # which keeps the scale
    config |= {
        "init_lora_weights": True,
        "r": 2 * lora.r,
        "lora_alpha": factor * lora.lora_alpha,
        "rank_pattern": {key: 2 * rank for key, rank in ranks.items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in alphas.items()},
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
