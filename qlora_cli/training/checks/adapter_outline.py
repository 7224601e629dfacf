"""Check a run's adapter before a weight is read: whether the model accepts it, and the sizes of the run's files.

It is attached on the meta device, to the model as it will be stored, by the same code as to the real one.
"""

from copy import deepcopy

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from qlora_cli.adapters.adapter import attach_adapter, attach_from_config
from qlora_cli.adapters.base_parameters import switched_parameters_in
from qlora_cli.adapters.initialization import check_init
from qlora_cli.adapters.loftq import plan_residuals
from qlora_cli.adapters.reader import Adapter
from qlora_cli.adapters.targets import adapted_layers, target_modules
from qlora_cli.adapters.whole_modules import train_in_fp32
from qlora_cli.calibrating.initial_adapter import check_initializable
from qlora_cli.files import check_disk_space, size_of
from qlora_cli.hardware.device import TORCH_DTYPES
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.memory.costs.run_files import FileSizes
from qlora_cli.memory.replaying.optimizer_step import embedding_ids, optimizer_steps
from qlora_cli.quantization.storage_plan import build_on_meta, with_rows
from qlora_cli.settings.choices import Dtype, LoraInit, Optimizer
from qlora_cli.settings.models import LoraSettings, TrainSettings
from qlora_cli.settings.settle import with_values


def disk_bytes(sizes: FileSizes, settings: TrainSettings) -> int:
    """Return the largest size of the run directory."""
    return sizes.disk_bytes(
        max_checkpoints=settings.output.max_checkpoints, keeps_best=settings.training.eval_steps is not None
    )


def check_space(sizes: FileSizes, settings: TrainSettings) -> None:
    """Check that the disk has space for the run directory, in addition to its existing files.

    Raises:
        DiskSpaceError: it has not enough.
    """
    directory = settings.output.directory
    check_disk_space(
        directory,
        max(0, disk_bytes(sizes, settings) - size_of(directory)),
        hint="Free disk space, choose another --output, or lower output.max_checkpoints or --rank.",
    )


def sizes_of(model: PeftModel, optimizer: Optimizer) -> FileSizes:
    """Return the sizes of the files of `model`, which may be on the meta device."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    switched = switched_parameters_in(model)
    steps = optimizer_steps(optimizer, [trained], clips=False, embeddings=embedding_ids(model))
    return FileSizes.of(
        num_trained=sum(parameter.numel() for parameter in trained),
        frozen_bytes=0 if switched is None else switched.frozen_bytes,
        state_bytes=steps.state_bytes,
    )


def outline(load_plan: LoadPlan, lora: LoraSettings) -> PeftModel:
    """Return the model of a run on the meta device, with the adapter to train.

    Raises:
        ModelError: the model does not accept the adapter.
    """
    model = _as_stored(load_plan)
    if load_plan.adapter is not None:
        return _attach_existing(model, load_plan.adapter)
    if lora.init_lora_weights == LoraInit.LOFTQ:
        plan_residuals(load_plan.shapes, load_plan.layout, lora)
    elif lora.init_lora_weights == LoraInit.CALIBRATED:
        check_initializable(load_plan, lora)
    else:
        check_init(model, lora, adapted_layers(model, target_modules(model, lora)[0]))
    # Meta tensors have no values to initialize from.
    without_values = with_values(lora, init_lora_weights=LoraInit.DEFAULT)
    attached, _ = attach_adapter(model, without_values, load_plan.tokenizer.new_token_ids)
    return attached


def _as_stored(load_plan: LoadPlan) -> PreTrainedModel:
    layout, config = load_plan.layout, deepcopy(load_plan.base.config)
    trusts = load_plan.settings.model.trust_remote_code
    model = build_on_meta(config, layout.dtype, trust_remote_code=trusts)
    model = with_rows(model, config, load_plan.num_rows, layout.dtype, trust_remote_code=trusts)
    asked = load_plan.settings.quantization.compute_dtype
    layout.method.store_on_meta(
        model,
        layout.settings,
        layout.dtype,
        unquantized=tuple(layout.unquantized),
        experts=layout.experts,
        compute_dtype=layout.dtype if asked == Dtype.AUTO else TORCH_DTYPES[asked],
    )
    return model


def _attach_existing(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    config: LoraConfig = deepcopy(adapter.lora)
    config.init_lora_weights = True  # others need values; the file's values replace it anyway
    attached = attach_from_config(model, config, adapter.directory)
    train_in_fp32(attached)
    return attached
