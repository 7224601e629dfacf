"""What other tools call our settings: the names in axolotl, LLaMA-Factory, TRL, Unsloth and others, and their values.

One table for all places where such a name may turn up: a flag, `--set`, a settings file, and `qlora migrate`. A name
that several tools use means the same in all of them; only its default differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_cli.settings.objectives import COMPARED_BY

TRUE, FALSE = "true", "false"
KEEP_DEFAULT = None  # of a value: our default does the same


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """The names that other tools have for a setting, in lower case with underscores.

    Attributes:
        names: The names.
        setting: Our setting, as `section.key`; None if there is none.
        values: What their values are in ours, by their text in lower case, where they differ; `KEEP_DEFAULT` for what
            our default does. If it is complete, a value that it does not have has no counterpart.
        is_complete: Whether `values` has all values that can be translated.
        advice: What to do instead, or how ours differs: one or two sentences.
        is_needless: Whether nothing has to be done in place of it.
        read_with: The objectives, by our names, with which other tools read it; all, if there are none.
    """

    names: tuple[str, ...]
    setting: str | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    is_complete: bool = False
    advice: str = ""
    is_needless: bool = False
    read_with: tuple[str, ...] = ()


def _to(setting: str, *names: str, advice: str = "", values: Mapping[str, object] | None = None) -> Foreign:
    return Foreign(names=names, setting=setting, advice=advice, values=values or {})


def _only(setting: str, values: Mapping[str, object], *names: str, advice: str = "") -> Foreign:
    return Foreign(names=names, setting=setting, values=values, is_complete=True, advice=advice)


def _none(advice: str, *names: str) -> Foreign:
    return Foreign(names=names, advice=advice)


def _needless(advice: str, *names: str) -> Foreign:
    return Foreign(names=names, advice=advice, is_needless=True)


ALL_LINEAR = {"all": "all-linear", "all-linear": KEEP_DEFAULT, "all_linear": KEEP_DEFAULT}
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "lion": "lion_32bit",
    "paged_lion": "paged_lion_32bit",
}
RARE_ROPE = "It is model.rope_scaling here, as TYPE:FACTOR, such as yarn:4."
MODEL_CODE = "Give --trust-remote-code on the command line: a file may be somebody else's."
WARMUP = "Warm-up is a share of the steps here: training.warmup_ratio."
PER_EPOCH = "It is a number of steps here: --eval-steps and --save-steps."
TRACKER = "Set WANDB_PROJECT and the like in the environment, and give --report-to wandb."
SHARDING = "Several GPUs are --num-gpus here, and a model that is sharded among them --strategy fsdp."
OBJECTIVES = (
    "qlora learns from answers (--objective sft), from pairs of them (dpo, orpo), and from answers with labels (kto)."
)

TABLE: tuple[Foreign, ...] = (
    # The model.
    _to("model.name", "base_model", "model_name_or_path", "model_name", "model_id", "pretrained_model_name_or_path"),
    _to("model.revision", "revision_of_model", "model_revision"),
    _to("model.dtype", "torch_dtype"),
    _only(
        "model.dtype", {TRUE: "bf16", "auto": KEEP_DEFAULT, "full": "bf16", FALSE: KEEP_DEFAULT}, "bf16", "bfloat16"
    ),
    _only("model.dtype", {TRUE: "fp16", FALSE: KEEP_DEFAULT, "auto": KEEP_DEFAULT}, "fp16", "float16"),
    _to("model.attention", "attn_implementation"),
    _only(
        "model.attention",
        {
            TRUE: "flash_attention_2",
            "fa2": "flash_attention_2",
            "sdpa": "sdpa",
            **dict.fromkeys((FALSE, "auto", "disabled")),
        },
        *("flash_attention", "flash_attn", "use_flash_attention_2"),
        advice="It is --attention flash_attention_2 here; sdpa, the default, has kernels of the same kind.",
    ),
    _only("model.attention", {TRUE: "sdpa", FALSE: KEEP_DEFAULT}, "sdp_attention"),
    _only("model.attention", {TRUE: "eager", FALSE: KEEP_DEFAULT}, "eager_attention"),
    _only(
        "model.chat_template",
        {"chatml": "chatml", "tokenizer_default": KEEP_DEFAULT},
        *("template", "chat_template"),
        advice="The chat template of the tokenizer is used here; --chat-template takes another.",
    ),
    _to("model.resize_vocab", "resize_token_embeddings_to_32x"),
    _to("model.new_tokens", "tokens", "add_tokens", "additional_tokens"),
    _none(MODEL_CODE, "trust_remote_code"),
    _none(RARE_ROPE, "rope_scaling", "rope_theta"),
    # Quantization.
    _only(
        "quantization.method",
        {TRUE: "nf4", FALSE: KEEP_DEFAULT},
        *("load_in_4bit", "use_4bit"),
        advice="It is --quant nf4 here, the default.",
    ),
    _only(
        "quantization.method",
        {TRUE: "int8", FALSE: KEEP_DEFAULT},
        "load_in_8bit",
        advice="It is --quant int8 here.",
    ),
    _only("quantization.method", {"4": "nf4", "8": "int8"}, "quantization_bit", "bits", advice="It is --quant here."),
    _only("quantization.method", {"nf4": "nf4", "fp4": "fp4"}, "bnb_4bit_quant_type", "quantization_type"),
    _to(
        "quantization.double_quant",
        *("bnb_4bit_use_double_quant", "double_quantization", "use_double_quant", "use_bnb_nested_quant"),
        "use_nested_quant",
    ),
    _to("quantization.compute_dtype", "bnb_4bit_compute_dtype"),
    _to("quantization.quant_storage", "bnb_4bit_quant_storage"),
    # The adapter.
    _to("lora.rank", "lora_r", "lora_rank", "r"),
    _to("lora.alpha", "lora_alpha"),
    _to("lora.dropout", "lora_dropout"),
    _to("lora.target_modules", "lora_target_modules", "lora_target", "target_modules", values=ALL_LINEAR),
    _only(
        "lora.target_modules",
        {TRUE: KEEP_DEFAULT, FALSE: KEEP_DEFAULT},
        "lora_target_linear",
        advice="All linear layers are the default here: --target-modules all-linear.",
    ),
    _to("lora.modules_to_save", "lora_modules_to_save", "additional_target"),
    _to("lora.use_rslora", "peft_use_rslora"),
    _to("lora.use_dora", "peft_use_dora"),
    _only("lora.init_lora_weights", {TRUE: "pissa", FALSE: KEEP_DEFAULT}, "pissa_init"),
    _only("lora.init_lora_weights", {TRUE: "loftq", FALSE: KEEP_DEFAULT}, "use_loftq"),
    # Data.
    _to(
        "data.dataset",
        *("datasets", "dataset_name", "data_path", "train_file", "train_data", "dataset_path", "train_dataset"),
    ),
    _to("data.eval_dataset", "test_datasets", "eval_file", "validation_file", "val_file"),
    _to("data.eval_split", "val_set_size", "val_size", "test_size", "validation_split_percentage", values={"0": None}),
    _to("data.split", "dataset_train_split"),
    _to("data.max_length", "sequence_len", "cutoff_len", "max_seq_length", "max_seq_len", "model_max_length"),
    _to("data.packing", "sample_packing", "neat_packing"),
    _only(
        "data.loss_on",
        {TRUE: "all", FALSE: KEEP_DEFAULT},
        *("train_on_inputs", "train_on_prompt"),
        advice="It is --loss-on all here; by default only answers are trained.",
    ),
    _only(
        "data.loss_on",
        {TRUE: KEEP_DEFAULT, FALSE: "all"},
        *("completion_only_loss", "assistant_only_loss", "train_on_responses_only"),
        advice="Only answers are trained by default here: --loss-on completions.",
    ),
    _only("data.loss_on", {TRUE: "last", FALSE: KEEP_DEFAULT}, "mask_history"),
    _only("data.drop_duplicates", {TRUE: True, FALSE: KEEP_DEFAULT}, "dataset_exact_deduplication"),
    _none("Columns are found by their names here; --columns text=NAME names another.", "dataset_text_field"),
    _none("Put #500 after the name of a data set for a sample of that size.", "max_samples", "max_train_samples"),
    # The training loop.
    _to("training.learning_rate", "lr"),
    _to("training.epochs", "num_epochs", "num_train_epochs", "n_epochs", "epoch"),
    _to("training.max_steps", "max_steps", "num_steps", "max_iters", values={"-1": None, "0": None}),
    _to(
        "training.micro_batch_size",
        *("per_device_train_batch_size", "train_batch_size", "batch_size", "per_device_batch_size"),
    ),
    _to("training.gradient_accumulation_steps", "gradient_accumulation", "grad_accum", "grad_accumulation_steps"),
    _to("training.schedule", "lr_scheduler", "lr_scheduler_type", "lr_schedule", "scheduler"),
    _to("training.warmup_ratio", "warmup"),
    _none(WARMUP, "warmup_steps", "num_warmup_steps"),
    _to("training.optimizer", "optim", "optimizer", values=OPTIMIZERS),
    _to("training.adam_beta2", "beta2"),
    _to("training.max_grad_norm", "gradient_clipping", "grad_clip", "clip_grad_norm"),
    _only(
        "training.gradient_checkpointing",
        {TRUE: "on", FALSE: "off", "unsloth": KEEP_DEFAULT, "offload": "offload"},
        *("gradient_checkpointing", "use_gradient_checkpointing", "activation_checkpointing"),
        advice="It is --gradient-checkpointing here; by default, what is fastest and fits.",
    ),
    _only(
        "training.sampling",
        {TRUE: "group_by_length", FALSE: KEEP_DEFAULT},
        "group_by_length",
        advice="It is --sampling group_by_length here.",
    ),
    _only("training.loss", {"nll": KEEP_DEFAULT, "chunked_nll": KEEP_DEFAULT, "dft": "dft"}, "loss_type"),
    _only("training.loss", {TRUE: "dft", FALSE: KEEP_DEFAULT}, "use_dft_loss", advice="It is --loss dft here."),
    _to("training.seed", "random_state", "random_seed", "train_seed"),
    _only(
        "training.use_liger_kernel",
        {TRUE: True, FALSE: KEEP_DEFAULT},
        *("enable_liger_kernel", "liger_kernel", "use_liger"),
    ),
    _none(PER_EPOCH, "evals_per_epoch", "saves_per_epoch", "evaluation_strategy", "eval_strategy", "save_strategy"),
    # The output.
    _to("output.directory", "output_dir", "output_path", "save_dir"),
    _to("output.max_checkpoints", "save_total_limit"),
    _to("output.push_to_hub", "hub_model_id", "hub_repo"),
    _to("output.hub_private", "hub_private_repo"),
    _none(
        TRACKER,
        "wandb_project",
        "wandb_entity",
        "wandb_name",
        "wandb_run_name",
        "run_name",
        "use_wandb",
        "wandb_watch",
    ),
    _needless(
        "The same command resumes a run here; --resume takes another checkpoint.",
        *("resume_from_checkpoint", "auto_resume_from_checkpoints"),
    ),
    # What has no counterpart.
    _only(
        "quantization.method",
        {"qlora": "nf4", "lora": "none"},
        "adapter",
        advice="LoRA on a base in 4 bit is the default here; --quant none trains on one in 16 bit.",
    ),
    Foreign(names=("finetuning_type",), values={"lora": None}, is_complete=True, advice="qlora trains LoRA adapters."),
    _only(
        "training.objective",
        {"sft": KEEP_DEFAULT, "pt": KEEP_DEFAULT, "dpo": "dpo", "orpo": "orpo", "kto": "kto"},
        *("stage", "rl", "rlhf_type"),
        advice=OBJECTIVES,
    ),
    Foreign(
        names=("pref_beta", "rl_beta", "dpo_beta", "orpo_alpha"), setting="training.beta", read_with=tuple(COMPARED_BY)
    ),
    Foreign(
        names=("kto_chosen_weight", "kto_desirable_weight", "desirable_weight"),
        setting="training.desirable_weight",
        read_with=("kto",),
    ),
    Foreign(
        names=("kto_rejected_weight", "kto_undesirable_weight", "undesirable_weight"),
        setting="training.undesirable_weight",
        read_with=("kto",),
    ),
    Foreign(
        names=("pref_loss",),
        setting="training.objective",
        values={"sigmoid": KEEP_DEFAULT, "orpo": "orpo"},
        is_complete=True,
        advice="The losses of --objective dpo and orpo are those of the papers.",
        read_with=("dpo",),
    ),
    _none("qlora trains adapters on one base; --base-model names the base of a given adapter.", "lora_model_dir"),
    _none(SHARDING, "deepspeed", "fsdp", "fsdp_config", "tensor_parallel_size", "context_parallel_size"),
    _none(OBJECTIVES, "reward_model"),
    _none("The tokenizer's own tokens are used; --new-tokens adds others.", "special_tokens"),
    _needless(
        "The model's own class is used.", "model_type", "tokenizer_type", "is_llama_derived_model", "tokenizer_config"
    ),
    _needless("Rows are tokenized into a cache that finds itself.", "dataset_prepared_path", "overwrite_cache"),
    _needless(
        "The machine's processors are used as they are needed.",
        *("preprocessing_num_workers", "dataloader_num_workers", "dataset_processes", "dataset_num_proc"),
        *("dataloader_pin_memory", "dataloader_prefetch_factor"),
    ),
    _needless("Every run has a report page.", "plot_loss", "do_train", "do_eval", "logging_dir", "logging_first_step"),
    _needless("A run directory is resumed, never overwritten.", "overwrite_output_dir"),
    _needless("Unknown settings are always errors.", "strict", "remove_unused_columns", "debug"),
    _needless(
        "Rows are padded to the longest of a batch.", "pad_to_sequence_len", "pad_to_multiple_of", "padding_side"
    ),
    _needless("PyTorch's default is used.", "tf32", "ddp_timeout", "local_rank", "include_tokens_per_second"),
    _needless(
        "Only LoRA is trained.", "use_peft", "lora_bias", "bias", "task_type", "lora_task_type", "lora_fan_in_fan_out"
    ),
    _needless("Evaluation batches are those of training.", "per_device_eval_batch_size", "eval_batch_size"),
    _needless("Losses are means over all tokens of a step.", "average_tokens_across_devices", "num_items_in_batch"),
    _needless(
        "It is chosen by itself.", "xformers_attention", "bnb_config_kwargs", "auto_find_batch_size", "device_map"
    ),
)

FOREIGN: Mapping[str, Foreign] = {name: entry for entry in TABLE for name in entry.names}


def spelling_of(name: str) -> str:
    """Return the spelling of a flag or key in the table."""
    return name.lstrip("-").replace("-", "_").lower()


def foreign_of(name: str) -> Foreign | None:
    """Return what another tool's name of a flag or key is here; None if no tool is known to have it."""
    return FOREIGN.get(spelling_of(name))
