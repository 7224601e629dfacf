"""Describe a merged model: in a record for programs, and in a model card for people."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from qlora_cli import __version__
from qlora_cli.hardware.environment import package_versions
from qlora_cli.merging.companion_files import write_json
from qlora_cli.merging.earlier_merge import requested
from qlora_cli.merging.exports.export_format import Format
from qlora_cli.merging.merge_result import AppliedAdapter, Divergence, MergeResult
from qlora_cli.merging.output_directory import result_name, sizes_of_files
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.model_files.digest import adapter_digest, base_digest
from qlora_cli.model_files.merge_record import MERGE_FILE, new_merge_record
from qlora_cli.units import counted
from qlora_cli.visible import public_name

CARD = "README.md"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def write_record(target: Path, inputs: Inputs, result: MergeResult, written: Format) -> None:
    """Write the record and the model card of `target`, a result in the format `written`.

    Both may be published with the weights, so local paths are reduced to their last part.
    """
    data, versions = _data(inputs), package_versions()
    (target / CARD).write_text("\n".join(_card(inputs, result, data, written)) + "\n", encoding="utf-8")
    content = {
        "written_by": f"qlora {__version__}",
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: versions[name] for name in LIBRARIES},
        "format": written.name,
        "base_model": public_name(result.base_model),
        "commit": result.commit,
        "adapters": [
            {
                "name": public_name(adapter.name),
                "weight": adapter.weight,
                "kind": adapter.kind,
                "sha256": adapter_digest(adapter.path),
                "step": adapter.step,
                "run_is_done": adapter.run_is_done,
            }
            for adapter in result.adapters
        ],
        "data": data,
        "base": result.base,
        "base_choice": result.base_choice,
        "dtype": result.dtype,
        "num_tensors": result.num_tensors,
        "num_merged_tensors": result.num_merged_tensors,
        "verification": result.verification,
        "requantized": result.requantized.get(written.name),
        "request": requested(inputs.request),
        "base_model_digest": base_digest(inputs.source.path),
        "files": sizes_of_files(target),
        "merge_seconds": result.merge_seconds,
        "peak_host_bytes": result.peak_host_bytes,
    }
    record = new_merge_record(content)
    write_json(target / MERGE_FILE, record.model_dump(mode="json", exclude_unset=True))


def _data(inputs: Inputs) -> list[dict[str, Any]]:
    """Return the training data of the run: name, rows, and the fingerprint of its tokens."""
    train = None if inputs.record is None else inputs.record.data.train
    if train is None:
        return []
    figures = {key: train.integer(key) for key in ("rows_trained", "supervised_tokens")}
    return [{"name": public_name(str(train.name)), **figures, "fingerprint": train.fingerprint}]


def _card(inputs: Inputs, result: MergeResult, data: list[dict[str, Any]], written: Format) -> Iterator[str]:
    yield "---"
    yield yaml.safe_dump(_front_matter(inputs, result, written), sort_keys=False).strip()
    yield "---"
    yield ""
    yield f"# {result_name(result.output)}"
    yield ""
    at = f" at commit `{result.commit}`" if result.commit else ""
    yield f"`{public_name(result.base_model)}`{at}, {written.content}."
    yield ""
    yield "| | |"
    yield "|---|---|"
    for adapter in result.adapters:
        weight = "" if adapter.weight == 1 else f", counting {adapter.weight:g}"
        yield f"| adapter | `{public_name(adapter.name)}`: {adapter.kind}{weight}{_unfinished(adapter)} |"
    for one in data:
        rows = counted(one["rows_trained"], "row")
        yield f"| trained on | `{one['name']}`, {rows}, fingerprint `{one['fingerprint']}` |"
    yield f"| merged into | the {result.base} weights of the base ({result.base_choice.reason}) |"
    tensors = counted(result.num_tensors, "tensor")
    yield f"| weights | {result.num_merged_tensors:,} of {tensors} merged, in {result.dtype} |"
    yield f"| verified | {_verified(result)} |"
    if (requantized := result.requantized.get(written.name)) is not None:
        key = "as it runs |" if requantized.to is None else f"requantized | to {requantized.to}:"
        yield f"| {key} {_from_merged(requantized.divergence)} |"
    yield ""
    yield f"Merged by qlora {__version__}; `{MERGE_FILE}` holds all figures."


def _unfinished(adapter: AppliedAdapter) -> str:
    """Describe the step of an adapter whose run has not ended; empty for others."""
    if adapter.run_is_done is not False:
        return ""
    step = "a step" if adapter.step is None else f"step {adapter.step:,}"
    return f", after {step} of a run that has not ended"


def _front_matter(inputs: Inputs, result: MergeResult, written: Format) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": written.library,
        "pipeline_tag": "text-generation",
        "tags": ["qlora", "lora"],
    }
    if inputs.source.commit is not None:  # else it is a local path
        front["base_model"] = result.base_model
    return front


def _from_merged(divergence: Divergence | None) -> str:
    return "not compared" if divergence is None else f"from the merged model, {_summary(divergence)}"


def _verified(result: MergeResult) -> str:
    verification = result.verification
    if verification is None:
        return "no"
    passed = "" if verification.passed else "**failed**: "
    exact = "exactly" if verification.is_exact else "not exactly"
    over = f"over {counted(verification.divergence.num_tokens, 'token')}"
    model = "base with the adapter on it"
    if not verification.ran_adapters:
        model = "sum in fp32 of adapters that can't run together, which is not verified itself"
    cost = f"which costs, {over}: {_summary(verification.divergence)}"
    return f"{passed}{exact} the {model}, rounded to {result.dtype}, {cost}"


def _summary(divergence: Divergence) -> str:
    return (
        f"mean KL divergence {divergence.mean_kl:.2g} nats a token, "
        f"top token the same at {divergence.top_token_agreement:.1%}, "
        f"perplexity {divergence.perplexity:.4g} against {divergence.reference_perplexity:.4g}"
    )
