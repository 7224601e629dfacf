"""Report a plan in plain numbers."""

from pathlib import Path

from qlora_cli.merging.merge_result import Action, ActionCount, AppliedAdapter, MergeReport, TensorPlan
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.merging.planning.merge_plan import MergePlan, PlannedTensor
from qlora_cli.model_files.pickles import NAMES
from qlora_cli.settings.choices import BaseWeights


def report_of(inputs: Inputs, plan: MergePlan, output: Path, disk_bytes: int, base: BaseWeights) -> MergeReport:
    """Return the report of a plan; `base` is the chosen one, or `auto` if it is still to be measured."""
    return MergeReport(
        output=output,
        base_model=inputs.source.base_name,
        commit=inputs.source.commit,
        adapters=applied_adapters(inputs),
        base=base.value,
        formats=tuple(one.value for one in inputs.request.merge.formats),
        num_tensors=len(plan.tensors),
        num_merged_tensors=plan.num_merged,
        base_bytes=sum(header.num_bytes for header in inputs.base.tensors.headers.values()),
        disk_bytes=disk_bytes,
        actions=tuple(_count(action, plan) for action in Action if any(one.action == action for one in plan.tensors)),
        tensors=tuple(map(_described, plan.tensors)),
    )


def applied_adapters(inputs: Inputs) -> tuple[AppliedAdapter, ...]:
    """Return the adapters with their weights in the sum."""
    request = inputs.request
    return tuple(
        AppliedAdapter(
            name=name,
            path=adapter.directory,
            weight=weight,
            kind=adapter.summary,
            step=source.adapter_step,
            run_is_done=source.run_is_done,
        )
        for name, adapter, weight, source in zip(
            request.merge.adapters, inputs.adapters, request.merge.weights, inputs.sources, strict=True
        )
    )


def _count(action: Action, plan: MergePlan) -> ActionCount:
    tensors = [one for one in plan.tensors if one.action == action]
    return ActionCount(
        action=action,
        num_tensors=len(tensors),
        base_bytes=sum(one.header.num_bytes for one in tensors if one.name == one.header.name),
        written_bytes=sum(one.num_bytes for one in tensors),
    )


def _described(planned: PlannedTensor) -> TensorPlan:
    return TensorPlan(
        name=planned.name,
        file=planned.file,
        action=planned.action,
        base_dtype=planned.header.dtype,
        dtype=planned.header.dtype if planned.action == Action.COPY else NAMES[planned.dtype],
        shape=planned.shape,
        written_bytes=planned.num_bytes,
    )
