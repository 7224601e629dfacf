"""The training loop."""

from math import ceil
from typing import Annotated

from pydantic import Field

from qlora_cli.settings.choices import Checkpointing, OnNan, Optimizer, Sampling, Schedule, Strategy, TrainingLoss
from qlora_cli.settings.help_groups import HelpGroup
from qlora_cli.settings.objectives import COMPARED_BY, Objective
from qlora_cli.settings.section import Section
from qlora_cli.settings.setting_metadata import (
    DATA,
    TRAINING_DATA,
    Command,
    EffectiveWith,
    Metadata,
    OnResume,
)
from qlora_cli.settings.values import WHERE_CHEAP, CheckpointingSwitch, NameList, NumBytes, SwitchOrFile, Texts

TIMED = (Command.TRAIN, Command.INSPECT_MEMORY)


class TrainingSettings(Section):
    """The training loop."""

    objective: Annotated[
        Objective,
        Metadata(flag="--objective", commands=(Command.TRAIN, Command.INSPECT_DATA), affects_memory=True),
    ] = Field(
        default=Objective.SFT,
        description="What is learned: the answers of the rows (sft), or which of two answers is better (dpo, orpo), "
        "from rows with a chosen and a rejected one, or which answers are wanted (kto), from rows with a label.",
    )
    beta: Annotated[
        float, Metadata(flag="--beta", effective_with=EffectiveWith(key="objective", values=tuple(COMPARED_BY)))
    ] = Field(
        default=0.1,
        gt=0,
        description="How strongly dpo and kto are held to the base, and how much orpo weighs the comparison: the "
        "reward of a nat of log-probability.",
    )
    desirable_weight: Annotated[
        float, Metadata(effective_with=EffectiveWith(key="objective", values=(Objective.KTO,)))
    ] = Field(
        default=1.0,
        gt=0,
        description="Weight of the loss of an answer that is wanted, with kto: more, if there are fewer of them.",
    )
    undesirable_weight: Annotated[
        float, Metadata(effective_with=EffectiveWith(key="objective", values=(Objective.KTO,)))
    ] = Field(
        default=1.0,
        gt=0,
        description="Weight of the loss of an answer that is not wanted, with kto: more, if there are fewer of them.",
    )
    learning_rate: Annotated[float, Metadata(flag="--learning-rate", group=HelpGroup.ESSENTIALS)] = Field(
        default=2e-4, gt=0, lt=1, description="Peak learning rate."
    )
    schedule: Annotated[Schedule, Metadata(flag="--schedule")] = Field(
        default=Schedule.COSINE, description="Learning-rate schedule after warm-up."
    )
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps spent warming up.")
    min_lr_ratio: Annotated[
        float,
        Metadata(
            effective_with=EffectiveWith(
                key="schedule", values=(Schedule.COSINE_WITH_MIN_LR, Schedule.POLYNOMIAL, Schedule.WARMUP_STABLE_DECAY)
            )
        ),
    ] = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Where cosine_with_min_lr, polynomial and warmup_stable_decay end: a share of the learning rate.",
    )
    decay_ratio: Annotated[
        float, Metadata(effective_with=EffectiveWith(key="schedule", values=(Schedule.WARMUP_STABLE_DECAY,)))
    ] = Field(
        default=0.1, gt=0, le=1, description="Share of the steps, at the end, in which warmup_stable_decay decays."
    )
    polynomial_power: Annotated[
        float, Metadata(effective_with=EffectiveWith(key="schedule", values=(Schedule.POLYNOMIAL,)))
    ] = Field(default=1.0, gt=0, description="Power of the schedule polynomial; 1 is a line.")
    cosine_cycles: Annotated[
        int, Metadata(effective_with=EffectiveWith(key="schedule", values=(Schedule.COSINE_WITH_RESTARTS,)))
    ] = Field(default=2, ge=2, description="How often cosine_with_restarts falls from the peak to 0.")
    weight_decay: Annotated[float, Metadata(affects_memory=True)] = Field(
        default=0.0, ge=0, description="Weight decay: decoupled, but with sgd added to the gradient."
    )
    adam_beta2: float = Field(default=0.999, gt=0, lt=1, description="AdamW's second-moment decay.")
    max_grad_norm: float = Field(default=0.3, gt=0, description="Gradients are clipped to this norm.")
    epochs: Annotated[
        float, Metadata(flag="--epochs", group=HelpGroup.ESSENTIALS, commands=TIMED, on_resume=OnResume.LENGTH)
    ] = Field(default=1.0, gt=0, description="Passes over the training data.")
    max_steps: Annotated[int | None, Metadata(flag="--max-steps", on_resume=OnResume.LENGTH)] = Field(
        default=None, ge=1, description="Stop after this many steps; overrides epochs."
    )
    micro_batch_size: Annotated[
        int,
        Metadata(
            flag="--micro-batch-size",
            group=HelpGroup.MEMORY,
            commands=(Command.TRAIN, Command.INSPECT_DATA),
            affects_memory=True,
            on_resume=OnResume.BATCH,
        ),
    ] = Field(default=1, ge=1, description="Rows in one forward and backward pass.")
    gradient_accumulation_steps: Annotated[
        int,
        Metadata(
            flag="--gradient-accumulation-steps",
            group=HelpGroup.MEMORY,
            commands=(Command.TRAIN, Command.INSPECT_DATA),
            affects_memory=True,
            on_resume=OnResume.BATCH,
        ),
    ] = Field(default=16, ge=1, description="Micro-batches whose gradients are added up to one step.")
    micro_batch_tokens: Annotated[
        int | None,
        Metadata(
            flag="--micro-batch-tokens",
            group=HelpGroup.MEMORY,
            commands=(Command.TRAIN, Command.INSPECT_DATA),
            affects_memory=True,
            on_resume=OnResume.BATCH,
        ),
    ] = Field(
        default=None,
        ge=8,
        description="Divide the rows of a step into micro-batches of up to this many tokens, without padding, instead "
        "of micro_batch_size rows each. If neither is given, what is predicted to be fastest on the GPU.",
    )
    num_gpus: Annotated[
        int, Metadata(flag="--num-gpus", group=HelpGroup.MEMORY, affects_memory=True, on_resume=OnResume.FREE)
    ] = Field(
        default=1,
        ge=1,
        le=1024,
        description="Processes that share the micro-batches of each step, each with a GPU of its own.",
    )
    strategy: Annotated[
        Strategy, Metadata(flag="--strategy", group=HelpGroup.MEMORY, affects_memory=True, on_resume=OnResume.FREE)
    ] = Field(
        default=Strategy.AUTO,
        description="What each of several GPUs holds of the base: all of it (ddp), or a shard, and a layer at a time "
        "while it computes (fsdp). auto: ddp, or fsdp if it does not fit on one.",
    )
    offload_base: Annotated[
        bool, Metadata(flag="--offload-base", group=HelpGroup.MEMORY, affects_memory=True, on_resume=OnResume.FREE)
    ] = Field(
        default=False,
        description="Keep the shards of a base that several GPUs share (fsdp) in host memory, and copy a layer to the "
        "GPU while it computes: the least memory of a GPU, and slower.",
    )
    calibrate: Annotated[bool, Metadata(flag="--calibrate", group=HelpGroup.MEMORY)] = Field(
        default=False,
        description="Choose the 4-bit codes of the base by what it computes on the rows to train: nearer to 16 bit in "
        "the same bytes. The run owns this base, in base/.",
    )
    calibration_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of the rows for --calibrate and --lora-init calibrated; by default 8 for each feature of "
        "the widest layer.",
    )
    memory_budget: Annotated[
        NumBytes | None,
        Metadata(flag="--memory-budget", group=HelpGroup.MEMORY, affects_memory=True, metavar="SIZE"),
    ] = Field(
        default=None,
        description="What the run may take of the GPU, such as 20GiB. Layers stay in 16 bit as far as the plan leaves "
        "some of it, those first that cost predictions on the rows most for their bytes, which is measured.",
    )
    gradient_checkpointing: Annotated[
        CheckpointingSwitch,
        Metadata(
            flag="--gradient-checkpointing", group=HelpGroup.MEMORY, affects_memory=True, on_resume=OnResume.FREE
        ),
    ] = Field(
        default=Checkpointing.AUTO,
        description="Recompute activations in the backward pass. auto: the fastest that is predicted to fit on the "
        "GPU, off on a CPU; selective: keep the base's products and attention, which take most of the "
        "time, and recompute the rest; offload: recompute, and keep what is saved for it in host memory.",
    )
    kept_products: Annotated[
        NameList,
        Metadata(
            affects_memory=True,
            on_resume=OnResume.FREE,
            effective_with=EffectiveWith(key="gradient_checkpointing", values=(Checkpointing.SELECTIVE,)),
        ),
    ] = Field(
        default=None,
        description="Linear layers, by the last part of their names, whose products selective checkpointing keeps. "
        "If not given, with a GPU those that would be computed again otherwise, as far as they fit; else all.",
    )
    auto_micro_batch: Annotated[
        bool, Metadata(flag="--auto-micro-batch", group=HelpGroup.MEMORY, on_resume=OnResume.FREE)
    ] = Field(
        default=False,
        description="Halve the micro-batch, and keep the batch size, if the longest rows do not fit at the start.",
    )
    optimizer: Annotated[Optimizer, Metadata(flag="--optimizer", affects_memory=True)] = Field(
        default=Optimizer.ADAMW_TORCH, description="Optimizer of the adapter."
    )
    loraplus_lr_ratio: Annotated[float | None, Metadata(affects_memory=True)] = Field(
        default=None, gt=0, description="LoRA+: the B matrices learn at this multiple of the learning rate."
    )
    loss: Annotated[TrainingLoss, Metadata(flag="--loss", affects_memory=True)] = Field(
        default=TrainingLoss.NLL,
        description="Loss of a trained token: its negative log-likelihood (nll), or that weighted by the probability "
        "of the token (dft, Dynamic Fine-Tuning). Losses are shown and compared as nll.",
    )
    neftune_noise_alpha: Annotated[float | None, Metadata(affects_memory=True)] = Field(
        default=None, gt=0, description="NEFTune: scale of the noise on embeddings while training."
    )
    fused_lora: Annotated[bool, Metadata(affects_memory=True, on_resume=OnResume.FREE)] = Field(
        default=True,
        description="Compute a layer, unless in 8 bit, and its adapter in one step; PEFT's own layers are slower.",
    )
    torch_compile: Annotated[bool, Metadata(affects_memory=True, on_resume=OnResume.FREE)] = Field(
        default=False, description="Compile the decoder layers with torch.compile."
    )
    use_liger_kernel: Annotated[bool, Metadata(affects_memory=True, on_resume=OnResume.FREE)] = Field(
        default=False, description="Liger's fused kernels; needs liger-kernel and a GPU."
    )
    sampling: Annotated[Sampling, Metadata(flag="--sampling", group=HelpGroup.DATA, commands=TRAINING_DATA)] = Field(
        default=Sampling.RANDOM,
        description="Order of rows; group_by_length batches rows of similar length, which saves padding.",
    )
    longest_first: Annotated[
        bool, Metadata(flag="--longest-first", group=HelpGroup.MEMORY, commands=TRAINING_DATA)
    ] = Field(
        default=False,
        description="Start with the longest rows, so that running out of memory happens at once.",
    )
    seed: Annotated[int, Metadata(flag="--seed", commands=DATA)] = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seeds the adapter, samples and splits of the data, its order and dropout.",
    )
    full_determinism: Annotated[bool, Metadata(affects_memory=True, on_resume=OnResume.FREE)] = Field(
        default=False, description="Only deterministic kernels, where PyTorch has them; slower on a GPU."
    )
    on_nan: Annotated[OnNan, Metadata(flag="--on-nan", group=HelpGroup.RARE, on_resume=OnResume.FREE)] = Field(
        default=OnNan.STOP,
        description="What to do with a step whose loss or gradient norm is not finite: stop the run before it, or "
        "skip the step.",
    )
    max_nan_skips: Annotated[
        int,
        Metadata(
            on_resume=OnResume.FREE,
            effective_with=EffectiveWith(key="on_nan", values=(OnNan.SKIP,), why="nothing is skipped"),
        ),
    ] = Field(default=10, ge=1, description="The run ends if more steps than this are skipped for on_nan.")
    logging_steps: Annotated[int, Metadata(on_resume=OnResume.FREE)] = Field(
        default=1, ge=1, description="Steps between two reports of the loss."
    )
    eval_steps: Annotated[
        int | None, Metadata(flag="--eval-steps", group=HelpGroup.OUTPUT, affects_memory=True, on_resume=OnResume.FREE)
    ] = Field(default=None, ge=1, description="Steps between two evaluations; only at the end if not given.")
    save_steps: Annotated[
        int | None, Metadata(flag="--save-steps", group=HelpGroup.OUTPUT, on_resume=OnResume.FREE)
    ] = Field(default=None, ge=1, description="Steps between two checkpoints; a tenth of the run if not given.")
    early_stopping_patience: Annotated[int | None, Metadata(on_resume=OnResume.FREE)] = Field(
        default=None, ge=1, description="Stop after this many evaluations without a better held-out loss."
    )
    load_best_model_at_end: Annotated[bool, Metadata(on_resume=OnResume.FREE)] = Field(
        default=False, description="Write the adapter of the best evaluation, not of the last step."
    )
    general_text: Annotated[
        SwitchOrFile,
        Metadata(flag="--general-text", group=HelpGroup.OUTPUT, on_resume=OnResume.FREE, metavar="auto|on|off|FILE"),
    ] = Field(
        default=WHERE_CHEAP,
        description="Measure at the end what was forgotten: the loss of base and result on a text of ours (on), or on "
        "a text file. auto: on ours, if the run trains at least twenty times as many tokens.",
    )
    sample_prompts: Annotated[
        Texts, Metadata(flag="--sample-prompt", group=HelpGroup.OUTPUT, on_resume=OnResume.FREE, is_repeatable=True)
    ] = Field(
        default=None,
        description="Prompts to answer before training and at each evaluation; may be given several times.",
    )
    sample_tokens: Annotated[int, Metadata(on_resume=OnResume.FREE)] = Field(
        default=64, ge=1, description="Longest answer to a sample prompt, in tokens."
    )

    @property
    def divides_steps(self) -> bool:
        """Whether the rows of a step are divided as a whole: filled, among processes, or compared by one baseline."""
        return self.micro_batch_tokens is not None or self.num_gpus > 1 or self.objective.has_labels

    @property
    def shards_base(self) -> bool:
        """Whether each process holds a shard of the base; settled where that was `auto`."""
        return self.strategy == Strategy.FSDP or self.offload_base

    @property
    def sharding_setting(self) -> str:
        """The path of the setting by which the base is sharded."""
        return "training.strategy" if self.strategy == Strategy.FSDP else "training.offload_base"

    @property
    def rows_per_process(self) -> int:
        """The rows of a full step that one process computes, of several the one with most."""
        return ceil(self.rows_per_step / self.num_gpus)

    @property
    def micro_batches_per_process(self) -> int:
        """The micro-batches of a full step that one process computes, of several the one with most.

        They have `micro_batch_size` rows.
        """
        return ceil(self.gradient_accumulation_steps / self.num_gpus)

    @property
    def rows_per_step(self) -> int:
        """The rows of a full step; the last one of an epoch may have fewer."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    def num_steps(self, num_rows: int) -> int:
        """Return the optimizer steps of a run over `num_rows` rows, counted like the trainer does."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, ceil(self.epochs * self.steps_per_epoch(num_rows)))

    def steps_per_epoch(self, num_rows: int) -> int:
        """Return the optimizer steps of an epoch of `num_rows` rows."""
        return ceil(ceil(num_rows / self.micro_batch_size) / self.gradient_accumulation_steps)
