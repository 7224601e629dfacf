"""Compare the models of a merge on the same texts and device, each with its own weights."""

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from qlora_cli.errors import OutOfMemoryError
from qlora_cli.events import PhaseStarted, Reporter
from qlora_cli.hardware.counters import is_out_of_memory
from qlora_cli.hardware.device import OVERFLOWS_FP16, choose_device
from qlora_cli.loading.model_outline import read_model_outline
from qlora_cli.merging.merge_result import Divergence, ModuleCheck
from qlora_cli.merging.merger import merged
from qlora_cli.merging.planning.adapter_changes import Read
from qlora_cli.merging.planning.base_weights import Base, BaseModel, base_reader, parameter_groups
from qlora_cli.merging.planning.conversions import read_conversions
from qlora_cli.merging.planning.inputs import Inputs, read_base
from qlora_cli.merging.planning.merge_plan import Changes, MergePlan, PlannedTensor, plan_merge
from qlora_cli.merging.planning.stored_tensors import StoredTensors
from qlora_cli.merging.planning.weight_changes import ExpertUpdate
from qlora_cli.merging.verifying.adapted_modules import ModuleWatch
from qlora_cli.merging.verifying.divergence import divergence
from qlora_cli.merging.verifying.reread import differing_files, is_same
from qlora_cli.merging.verifying.streamed import StreamedModel, WeightedAdapter, check_fit
from qlora_cli.merging.verifying.texts import Texts, read_texts
from qlora_cli.model_files.checkpoint import read_checkpoint
from qlora_cli.model_files.model_config import read_config
from qlora_cli.model_files.source import ModelSource
from qlora_cli.quantization.embedding import embedding_of
from qlora_cli.quantization.memory_check import free_bytes
from qlora_cli.quantization.storage_plan import build_on_meta
from qlora_cli.settings.choices import BaseWeights, MergeDtype

# So that two models differ by their weights, not by the rounding of every product, which is larger in bf16.
COMPUTE_DTYPE = torch.float32


@dataclass(frozen=True, kw_only=True)
class WrittenModel:
    """A model run from its files: its logits, the number of parameters, and those that differ from the plan."""

    logits: torch.Tensor
    num_parameters: int
    differing: tuple[str, ...]


class ModelComparer:
    """Runs the models of a merge over the same texts, each in one pass."""

    def __init__(self, inputs: Inputs, reporter: Reporter) -> None:
        """Choose the device and read the texts.

        Raises:
            OutOfMemoryError: not even one layer fits on the device.
        """
        self._inputs, self._reporter = inputs, reporter
        self.device = choose_device(inputs.request.model.device)
        check_fit(inputs.base.model, COMPUTE_DTYPE, free_bytes(self.device))
        vocabulary = embedding_of(inputs.base.model).num_embeddings
        self.texts: Texts = read_texts(inputs.tokenizer, inputs.record, vocabulary, reporter)
        self._trained: torch.Tensor | None = None
        self._checks: dict[BaseWeights, ModuleCheck | None] = {}
        self._planned: dict[tuple[BaseWeights, MergeDtype], torch.Tensor] = {}
        # Planned models differ by their weights alone, and by whether the head is untied.
        self._empty: dict[bool, StreamedModel] = {}

    @property
    def runs_adapters(self) -> bool:
        """Whether PEFT can run the adapters on their base; if not, the merge is compared with their sum."""
        return len(self._inputs.adapters) == 1 or _can_run_together(self._inputs.changes)

    def trained(self) -> torch.Tensor:
        """Return the logits of the trained model: the base as in training, with the adapters attached."""
        if self._trained is None:
            self._trained = self.with_adapters(BaseWeights.DEQUANTIZED)
        return self._trained

    def reference(self, plan: MergePlan) -> torch.Tensor:
        """Return the logits that the merged model is compared with: of its base with the adapters attached."""
        return self.trained() if plan.base == BaseWeights.DEQUANTIZED else self.with_adapters(plan.base)

    def with_adapters(self, kind: BaseWeights) -> torch.Tensor:
        """Return the logits of a base with the adapters attached, as PEFT runs them.

        Several that PEFT can't run together are summed in fp32 instead. Otherwise, if the merge is to be verified,
        each adapted module is compared with the merged one in the same pass.
        """
        inputs = self._inputs
        if not self.runs_adapters:
            return self.planned(self.in_fp32(kind))
        self._reporter.report(PhaseStarted(title=f"Running the {kind.value} base with the adapter on it"))
        base = Base(inputs.base, kind)
        read = base_reader(inputs.base, base)
        adapters = [
            WeightedAdapter(adapter=adapter, weight=weight)
            for adapter, weight in zip(inputs.adapters, inputs.request.merge.weights, strict=True)
        ]
        watch = ModuleWatch(planned_reader(inputs.base, self.in_fp32(kind))) if inputs.request.merge.verify else None
        logits = self._logits(inputs.config.config, read, adapters, watch)
        self._checks[kind] = None if watch is None else watch.check()
        return logits

    def modules(self, plan: MergePlan) -> ModuleCheck | None:
        """Return the comparison of the adapted modules from the run of the reference of `plan`."""
        return self._checks.get(plan.base)

    def unrounded(self, plan: MergePlan) -> torch.Tensor:
        """Return the logits of the model that `plan` would write in fp32."""
        return self.planned(self.in_fp32(plan.base))

    @property
    def may_be_fp16(self) -> bool:
        """Whether models of this kind can compute in fp16; in some, activations exceed its range."""
        return not self._inputs.config.config.model_type.startswith(OVERFLOWS_FP16)

    def in_dtype(self, plan: MergePlan, dtype: MergeDtype) -> torch.Tensor:
        """Return the logits of the model that `plan` would write in another dtype."""
        return self.planned(self._planned_in(plan.base, dtype))

    def in_fp32(self, kind: BaseWeights) -> MergePlan:
        """Return the plan of the same merge in fp32."""
        return self._planned_in(kind, MergeDtype.FP32)

    def _planned_in(self, kind: BaseWeights, dtype: MergeDtype) -> MergePlan:
        inputs = self._inputs
        return plan_merge(inputs.base, inputs.config, inputs.changes, kind, dtype)

    def planned(self, plan: MergePlan) -> torch.Tensor:
        """Return the logits of the model that `plan` would write; they are cached."""
        key = (plan.base, plan.dtype)
        if key not in self._planned:
            self._planned[key] = self._run_planned(plan)
        return self._planned[key]

    def _run_planned(self, plan: MergePlan) -> torch.Tensor:
        description = "as written" if plan.dtype == self._inputs.request.merge.dtype else f"in {plan.dtype.value}"
        self._reporter.report(PhaseStarted(title=f"Running the merge into the {plan.base.value} base, {description}"))
        inputs = self._inputs
        read = planned_reader(inputs.base, plan)
        model = self._empty.get(plan.unties)
        if model is not None:
            model.read_from(read)
            return self._run(model)
        config = deepcopy(inputs.config.config)
        if plan.unties:
            config.tie_word_embeddings = False
        self._empty[plan.unties] = self._streamed(config, read)
        return self._run(self._empty[plan.unties])

    def written(self, directory: Path, plan: MergePlan) -> "WrittenModel":
        """Return the logits of the model in a directory, and the parameters that differ from `plan`."""
        expected = exact_reader(self._inputs.base, plan, self.in_fp32(plan.base))
        compared, differing = [], list(differing_files(directory, self._inputs, plan))
        read, config = self._file_reader(directory)

        def read_and_compare(name: str) -> torch.Tensor:
            value, planned_value = read(name), expected(name)
            compared.append(name)
            if not is_same(value, planned_value):
                differing.append(name)
            return value

        logits = self._logits(config, read_and_compare)
        return WrittenModel(
            logits=logits, num_parameters=len(set(compared)), differing=tuple(dict.fromkeys(differing))
        )

    def stored(self, directory: Path) -> torch.Tensor:
        """Return the logits of the model in a directory."""
        read, config = self._file_reader(directory)
        return self._logits(config, read)

    def _file_reader(self, directory: Path) -> tuple[Read, PreTrainedConfig]:
        self._reporter.report(PhaseStarted(title="Running the merged model from its files"))
        config = read_config(_source(directory), trust_remote_code=self._inputs.request.model.trust_remote_code)
        checkpoint = read_checkpoint(directory, allow_pickle=False)
        tensors = StoredTensors(directory, checkpoint)
        model = build_on_meta(
            config.config, COMPUTE_DTYPE, trust_remote_code=self._inputs.request.model.trust_remote_code
        )
        groups = read_conversions(model, list(tensors.headers), config.key_mapping).groups
        by_name = parameter_groups(groups)

        def read(name: str) -> torch.Tensor:
            group = by_name[name]
            return group.forward(model, {key: tensors[key] for key in group.keys})[name]

        return _with_ties(read, by_name, model.all_tied_weights_keys or {}), config.config

    def quantized(self, directory: Path) -> torch.Tensor:
        """Return the logits of a model that was written in 4 bit, with dequantized weights."""
        self._reporter.report(PhaseStarted(title="Running the 4-bit model from its files"))
        outline = read_model_outline(
            _source(directory), trust_remote_code=self._inputs.request.model.trust_remote_code
        )
        checkpoint = read_checkpoint(directory, allow_pickle=False)
        base = read_base(outline, checkpoint, self._inputs.tokenizer, None, self._inputs.request)
        return self._logits(outline.base.config, base_reader(base, Base(base, BaseWeights.DEQUANTIZED)))

    def compare(self, reference: torch.Tensor, other: torch.Tensor) -> Divergence:
        """Return the divergence of logits from those of a reference."""
        return divergence(reference, other, self.texts.targets)

    def _logits(
        self,
        config: PreTrainedConfig,
        read: Read,
        adapters: Sequence[WeightedAdapter] = (),
        watch: ModuleWatch | None = None,
    ) -> torch.Tensor:
        return self._run(self._streamed(config, read, adapters, watch))

    def _streamed(
        self,
        config: PreTrainedConfig,
        read: Read,
        adapters: Sequence[WeightedAdapter] = (),
        watch: ModuleWatch | None = None,
    ) -> StreamedModel:
        return StreamedModel(
            config,
            read,
            device=self.device,
            dtype=COMPUTE_DTYPE,
            adapters=adapters,
            watch=watch,
            trust_remote_code=self._inputs.request.model.trust_remote_code,
        )

    def _run(self, model: StreamedModel) -> torch.Tensor:
        try:
            return model.logits(*self.texts.batch(self._inputs.tokenizer.tokenizer.pad_token_id))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"comparing did not fit into the memory of {self.device}",
                hint="Compare on the CPU with --device cpu, or merge with --no-verify and a --base.",
            ) from error


def _can_run_together(changes: Changes) -> bool:
    """Return whether PEFT can run several adapters at once: not with modules trained whole, nor with experts."""
    return all(
        one.is_update and not isinstance(one.change, ExpertUpdate) for several in changes.values() for one in several
    )


def _source(directory: Path) -> ModelSource:
    return ModelSource(name=str(directory), path=directory, base_name=str(directory), tokenizer_path=directory)


def planned_reader(model: BaseModel, plan: MergePlan) -> Read:
    """Return a function that computes the parameters that `plan` would write, in the dtype of the files."""
    base, groups = Base(model, plan.base), parameter_groups(model.groups)
    untied = {tensor.name: tensor for tensor in plan.tensors if _is_untied(model, tensor)}
    written = {target: tensor.dtype for tensor in plan.tensors if tensor.group for target in tensor.group.targets}
    changes: dict[str, Changes] = {
        target: tensor.changes
        for tensor in plan.tensors
        if tensor.group is not None and tensor.name not in untied
        for target in tensor.group.targets
    }

    def read(name: str) -> torch.Tensor:
        if name in untied:
            planned = untied[name]
            assert planned.group is not None, "it uses the tensors of the weight that it is tied to"
            tied_to = planned.group.targets[0]
            return merged(base.parameters(planned.group)[tied_to], planned.changes.get(tied_to, ()), planned.dtype)
        value = base.parameters(groups[name])[name]
        return merged(value, changes[name].get(name, ()), written[name])

    return _with_ties(read, groups.keys() | untied.keys(), model.model.all_tied_weights_keys or {})


def exact_reader(model: BaseModel, plan: MergePlan, in_fp32: MergePlan) -> Read:
    """Return a function that computes the exact parameters for the files of `plan`.

    A parameter that an adapter changes is the merge in fp32, cast once: a value that was rounded earlier, or twice,
    differs. Any other is that of the base.
    """
    as_planned, exact = planned_reader(model, plan), planned_reader(model, in_fp32)
    changed = {
        target: tensor.dtype
        for tensor in plan.tensors
        for target in ([tensor.name] if _is_untied(model, tensor) else tensor.changes)
        if tensor.changes
    }

    def read(name: str) -> torch.Tensor:
        return exact(name).to(changed[name]) if name in changed else as_planned(name)

    known = {target for tensor in plan.tensors if tensor.group is not None for target in tensor.group.targets}
    untied = {tensor.name for tensor in plan.tensors if _is_untied(model, tensor)}
    return _with_ties(read, known | untied, model.model.all_tied_weights_keys or {})


def _is_untied(model: BaseModel, tensor: PlannedTensor) -> bool:
    """Return whether the tensor is of a parameter for which the base has no separate tensor."""
    return tensor.name not in model.tensors.headers


def _with_ties(read: Read, known: Collection[str], tied: Mapping[str, str]) -> Read:
    """Return a function that reads a parameter by its own name or by that of a tied one."""
    ties = {**{other: one for one, other in tied.items()}, **tied}

    def read_any(name: str) -> torch.Tensor:
        return read(name if name in known else ties[name])

    return read_any
