"""Every private name of other libraries that the package uses: its owner, the reason, and the version it was read in.

A library may rename any of them without notice. `tests/contract/test_seams.py` checks that the list is complete, that
no entry is unused, and that each name still exists with the same signature.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from tests.support.source.private_names import source_of

TORCH = "torch 2.13.0"
TRANSFORMERS = "transformers 5.23.0"
TRL = "trl 1.16.0"
PEFT = "peft 0.21.2"
BITSANDBYTES = "bitsandbytes 0.50.2"
ACCELERATE = "accelerate 1.15.0"
DATASETS = "datasets 5.2.0"
TYPER = "typer 0.29.2"


MARKS = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}


class Kind(StrEnum):
    """The kind of a name, which decides how it is looked up."""

    FUNCTION = "function"  # or method: with its signature
    ATTRIBUTE = "attribute"  # of a class, or given to instances by its methods
    MODULE = "module"
    OPERATOR = "operator"  # of torch.ops.aten
    WORD = "word"  # in the source of a module: a key of a file, or what it logs


@dataclass(frozen=True)
class Seam:
    """One private name: `owner` is a module or a class, `signature` as `signature_of` writes it."""

    owner: str
    name: str
    kind: Kind
    read_at: str
    why: str
    signature: str | None = None

    def fault(self) -> str | None:
        """Return a sentence on what has changed since the name was read; None if nothing has."""
        because = f"read at {self.read_at}, used to {self.why}"
        try:
            owner = resolved(self.owner)
        except (ImportError, AttributeError):
            return f"{self.owner} is gone, and {self.name} with it ({because})"
        if not self._is_in(owner):
            return f"{self.owner} has no {self.kind} {self.name} any more ({because})"
        if self.kind == Kind.FUNCTION and (now := signature_of(getattr(owner, self.name))) != self.signature:
            return f"{self.owner}.{self.name} takes ({now}) instead of ({self.signature}) ({because})"
        return None

    def _is_in(self, owner: Any) -> bool:
        if self.kind in (Kind.FUNCTION, Kind.OPERATOR):
            return hasattr(owner, self.name)
        if self.kind == Kind.MODULE:
            return importlib.util.find_spec(f"{self.owner}.{self.name}") is not None
        if self.kind == Kind.WORD:
            return self.name in source_of(owner)
        return hasattr(owner, self.name) or re.search(rf"\.{self.name}\b[^=\n]*=[^=]", source_of(owner)) is not None


def resolved(dotted: str) -> Any:
    """Return the module, class or operators that a dotted path names."""
    if dotted == "torch.ops.aten":
        return torch.ops.aten
    module, _, name = dotted.rpartition(".")
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


def signature_of(function: Callable[..., Any]) -> str:
    """Return the parameters of a function as callers see them: names, `*` and `**`, and `=` after optional ones."""
    return ", ".join(
        f"{MARKS.get(one.kind.name, '')}{one.name}{'' if one.default is one.empty else '='}"
        for one in inspect.signature(function).parameters.values()
    )


def _function(owner: str, name: str, signature: str, read_at: str, why: str) -> Seam:
    return Seam(owner, name, Kind.FUNCTION, read_at, why, signature)


def _attribute(owner: str, name: str, read_at: str, why: str) -> Seam:
    return Seam(owner, name, Kind.ATTRIBUTE, read_at, why)


def _operator(name: str, why: str) -> Seam:
    return Seam("torch.ops.aten", name, Kind.OPERATOR, TORCH, why)


def _word(owner: str, name: str, read_at: str, why: str) -> Seam:
    return Seam(owner, name, Kind.WORD, read_at, why)


TRAINER, MODEL = "transformers.Trainer", "transformers.PreTrainedModel"
WRAPPER = "peft.utils.other.AuxiliaryTrainingWrapper"
STEP = "self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate="

SEAMS = (
    # ---- the training loop: qlora_cli/training/trainer_seam.py ----
    _function(TRAINER, "_get_train_sampler", "self, train_dataset=", TRANSFORMERS, "give rows their order"),
    _function(TRAINER, "_get_grad_norm", "self, model, grad_norm=", TRANSFORMERS, "skip steps that are not finite"),
    _function(TRAINER, "_maybe_log_save_evaluate", STEP, TRANSFORMERS, "keep the state after each whole step"),
    _function(TRAINER, "_save_checkpoint", "self, model, trial", TRANSFORMERS, "publish whole checkpoints"),
    _function("trl.SFTTrainer", "_save_checkpoint", "self, model, trial", TRL, "step around its model card"),
    _function(TRAINER, "_save", "self, output_dir=, state_dict=", TRANSFORMERS, "save the adapter in fp32"),
    _function(
        TRAINER, "_load_from_checkpoint", "self, resume_from_checkpoint, model=", TRANSFORMERS, "load an adapter"
    ),
    _function(
        TRAINER, "_load_optimizer_and_scheduler", "self, checkpoint", TRANSFORMERS, "check states and name their file"
    ),
    _function(TRAINER, "_load_scaler", "self, checkpoint", TRANSFORMERS, "name the file of a bad state"),
    _function(TRAINER, "_load_rng_state", "self, checkpoint", TRANSFORMERS, "give each process its own generators"),
    _attribute(TRAINER, "_tr_loss", TRANSFORMERS, "resume in the middle of a logging interval, and skip steps"),
    _attribute(TRAINER, "_total_loss_scalar", TRANSFORMERS, "resume with the loss so far"),
    _attribute(TRAINER, "_globalstep_last_logged", TRANSFORMERS, "resume in the middle of a logging interval"),
    _attribute("trl.SFTTrainer", "_total_train_tokens", TRL, "resume with the tokens so far"),
    _attribute("trl.SFTTrainer", "_metrics", TRL, "resume with what it will report the mean of"),
    _attribute("transformers.TrainingArguments", "_n_gpu", TRANSFORMERS, "keep the model out of DataParallel"),
    _attribute("torch.optim.lr_scheduler.LRScheduler", "_last_lr", TORCH, "compare a saved schedule with the run's"),
    _word("torch._dynamo.trace_rules", "_C", TORCH, "reach what has no public name"),
    _word(
        "torch._dynamo.trace_rules",
        "_cuda_clearCublasWorkspaces",
        TORCH,
        "give cuBLAS workspaces of the size that a deterministic run has set, and of the usual one after it",
    ),
    Seam("torch", "_dynamo", Kind.MODULE, TORCH, "have scales captured as constants; `config` lies there"),
    # ---- modules as PyTorch holds them ----
    _attribute("torch.nn.Module", "_parameters", TORCH, "switch between an adapter's parameters and the base's"),
    _attribute("torch.nn.Module", "_modules", TORCH, "switch between a quantized layer and a plain one"),
    _word("torch._dynamo.eval_frame", "_orig_mod", TORCH, "read adapters that were saved compiled"),
    _word("torch.distributed.fsdp._common_utils", "_fsdp_wrapped_module", TORCH, "read adapters saved under FSDP"),
    _word(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "_checkpoint_wrapped_module",
        TORCH,
        "read adapters that were saved under a wrapper of checkpointing",
    ),
    # ---- the memory trace ----
    Seam("torch.utils", "_python_dispatch", Kind.MODULE, TORCH, "see each operator; TorchDispatchMode lies there"),
    Seam("torch.utils", "_pytree", Kind.MODULE, TORCH, "walk through the tensors of an operator's arguments"),
    _attribute("torch.UntypedStorage", "_cdata", TORCH, "know a storage by its address while it lives"),
    _attribute("torch._ops.OpOverload", "_opname", TORCH, "find a quantization method's own operators"),
    _operator("_local_scalar_dense", "answer a question to a tensor without values"),
    _operator("_softmax", "do as softmax does under autocast"),
    _operator("_softmax_backward_data", "count what its kernel takes"),
    _operator("_scaled_dot_product_flash_attention", "run the kernel that a GPU would"),
    _operator("_scaled_dot_product_flash_attention_backward", "count what its kernel takes"),
    _operator("_scaled_dot_product_efficient_attention", "run the kernel that a GPU would"),
    _operator("_scaled_dot_product_efficient_attention_backward", "count what its kernel takes"),
    _word("transformers.modeling_layers", "_gradient_checkpointing_func", TRANSFORMERS, "see where it checkpoints"),
    _function(
        "transformers.masking_utils",
        "_ignore_causal_mask_sdpa",
        "padding_mask, q_length, kv_length, q_offset, kv_offset, local_attention_size=",
        TRANSFORMERS,
        "answer whether rows are padded",
    ),
    # ---- models and configs of transformers ----
    _attribute(
        "transformers.PreTrainedConfig", "_attn_implementation", TRANSFORMERS, "know which kernel it computes by"
    ),
    _attribute(
        "transformers.PreTrainedConfig", "_experts_implementation", TRANSFORMERS, "leave kernels of the hub out"
    ),
    _attribute(
        "transformers.PreTrainedConfig", "_name_or_path", TRANSFORMERS, "leave a config's origin out of its key"
    ),
    _attribute(MODEL, "_supports_sdpa", TRANSFORMERS, "choose an attention that the model has"),
    _attribute(MODEL, "_supports_flash_attn", TRANSFORMERS, "refuse an attention that the model has not"),
    _attribute(
        MODEL, "_supports_flex_attn", TRANSFORMERS, "know whether a model hands on its mask without reading it"
    ),
    _attribute(
        MODEL,
        "_compatible_flash_implementations",
        TRANSFORMERS,
        "refuse what would be replaced by a kernel of the hub",
    ),
    _function(MODEL, "_get_dtype_plan", "self, dtype", TRANSFORMERS, "know which weights stay in fp32"),
    _attribute(MODEL, "_keep_in_fp32_modules", TRANSFORMERS, "leave unquantized what stays in fp32"),
    _attribute(MODEL, "_keep_in_fp32_modules_strict", TRANSFORMERS, "the same"),
    _attribute(MODEL, "_keys_to_ignore_on_load_unexpected", TRANSFORMERS, "tell expected tensors from left-over ones"),
    _attribute(
        "transformers.GenerationConfig", "_from_model_config", TRANSFORMERS, "write a file as transformers does"
    ),
    # ---- loading and quantizing ----
    _function(
        "transformers.quantizers.base.HfQuantizer",
        "_process_model_after_weight_loading",
        "self, model, **kwargs",
        TRANSFORMERS,
        "finish a model that our quantizer loaded",
    ),
    _word(
        "transformers.core_model_loading",
        "_original_source_patterns",
        TRANSFORMERS,
        "copy a conversion with its patterns",
    ),
    _word("transformers.core_model_loading", "_original_target_patterns", TRANSFORMERS, "the same"),
    _word(
        "transformers.initialization",
        "_is_hf_initialized",
        TRANSFORMERS,
        "keep a quantized layer from being initialized again",
    ),
    _attribute("transformers.BitsAndBytesConfig", "_load_in_4bit", TRANSFORMERS, "leave it out of a config.json"),
    _attribute("transformers.BitsAndBytesConfig", "_load_in_8bit", TRANSFORMERS, "leave it out of a config.json"),
    _function(
        "bitsandbytes.nn.parametrize",
        "_register_parametrization_hooks",
        "module, param_name",
        BITSANDBYTES,
        "quantize experts on the meta device as its own function does with values",
    ),
    Seam(
        "bitsandbytes.autograd",
        "_functions",
        Kind.MODULE,
        BITSANDBYTES,
        "quiet its logger, which speaks at each product",
    ),
    _word("accelerate.hooks", "_hf_hook", ACCELERATE, "find what is on the CPU behind a placeholder"),
    # ---- adapters ----
    _function(
        "peft.tuners.lora.layer.ParamWrapper",
        "_activate_lora",
        "self, active_adapters",
        PEFT,
        "add to quantized experts",
    ),
    _attribute(
        "peft.tuners.lora.layer.ParamWrapper", "_did_swap_in_out_features", PEFT, "know which side is the input"
    ),
    _function("peft.LoraConfig", "_register_custom_module", "self, mapping", PEFT, "give experts our layer"),
    _function(WRAPPER, "_get_available_adapters", "self", PEFT, "take part in switching adapters"),
    _attribute(WRAPPER, "_active_adapter", PEFT, "be switched on and off with an adapter"),
    _attribute(WRAPPER, "_disable_adapters", PEFT, "the same"),
    _attribute(WRAPPER, "_adapters", PEFT, "the same"),
    # ---- files of other libraries, and the command line ----
    _word("datasets.arrow_dataset", "_data_files", DATASETS, "read what save_to_disk wrote"),
    _attribute("typer._click.core.Context", "_protected_args", TYPER, "know the subcommand before it is parsed"),
)

# Phrases that the code looks for in messages of transformers, for lack of another source: see docs/decisions/0017.
PHRASES = (
    _word("transformers.core_model_loading", "Loading weights", TRANSFORMERS, "report the bytes that were read"),
    _word("transformers.core_model_loading", "on tensors destined for", TRANSFORMERS, "name a weight that failed"),
    _word("transformers.core_model_loading", "Ckpt contains", TRANSFORMERS, "name a weight that failed"),
    _word("transformers.utils.loading_report", "LOAD REPORT", TRANSFORMERS, "say its table in our own words"),
    _word("transformers.utils.loading_report", "Error(s) in loading state_dict", TRANSFORMERS, "tell faults of files"),
    _word("transformers.utils.loading_report", "automatic conversion of the weights", TRANSFORMERS, "the same"),
)

# Names with an underscore that are documented for everybody.
DOCUMENTED = {
    "_exit": "os: ends a child without clean-up",
    "_getframe": "sys: the frames of the caller",
    "_missing_": "enum: the member for an unknown value",
    "_replace": "collections.namedtuple: the underscore keeps it apart from fields",
}
# Suffixes of keys, which are not names.
ENDS_OF_KEYS = {
    ("qlora_cli/runs/report/run_page.py", "_seconds"),
    ("qlora_cli/runs/report/run_page.py", "_share"),
    ("qlora_cli/runs/report/run_page.py", "_parameters"),
    ("qlora_cli/evaluating/tasks.py", "_stderr"),
}
