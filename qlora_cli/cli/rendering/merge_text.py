"""The text of `qlora merge`: what was merged into what, and how close the result is to the trained model."""

from collections.abc import Iterator, Mapping

from rich.text import Text

from qlora_cli.cli.console import Row, console, print_rows, title
from qlora_cli.merging.merge_result import (
    AppliedAdapter,
    BaseChoice,
    Divergence,
    MergeReport,
    MergeResult,
    ModuleCheck,
    Requantized,
    TensorPlan,
    Verification,
)
from qlora_cli.model_files.merge_record import MERGE_FILE
from qlora_cli.units import counted, format_bytes, format_duration

ACTION_NAMES = {
    "copy": "copied as bytes",
    "cast": "cast",
    "dequantize": "dequantized",
    "merge": "merged",
}


def render_merge(result: MergeResult, *, in_detail: bool = False) -> None:
    """Print a merge in a few lines, or with all figures of its comparison with the trained model."""
    if in_detail:
        _render_in_detail(result)
        return
    title(f"{result.output}")
    adapters = ", ".join(adapter.name for adapter in result.adapters)
    tensors = f"{result.num_merged_tensors:,} of {counted(result.num_tensors, 'tensor')} merged, in {result.dtype}"
    print_rows(
        [
            ("merged", f"{adapters} into {_describe_choice(result.base_choice)}"),
            ("written", f"{format_bytes(result.bytes_written)}: {tensors}"),
            ("verified", _verified_in_short(result.verification)),
            *_compared_in_short(result.requantized),
            _work(result),
            *(_format_rows(result) if len(result.outputs) > 1 else ()),
            *([("on the hub", result.pushed_to)] if result.pushed_to else []),
        ]
    )


def _work(result: MergeResult) -> Row:
    if result.already_merged_at is not None:
        return "before", f"{result.already_merged_at}: nothing was left to do; all figures: {MERGE_FILE}"
    took = f"{format_duration(result.total_seconds)}, {format_bytes(result.peak_host_bytes)} at most"
    return "took", f"{took}; all figures: {MERGE_FILE}"


def _verified_in_short(verification: Verification | None) -> str:
    if verification is None:
        return "no (--no-verify)"
    divergence = verification.divergence
    against = "the base with the adapter on it" if verification.ran_adapters else "their sum in fp32"
    same = f"top token the same at {divergence.top_token_agreement:.2%}"
    return f"against {against}: KL divergence {divergence.mean_kl:.2g} nats a token, {same}"


def _compared_in_short(requantized: Mapping[str, Requantized]) -> Iterator[Row]:
    for name, one in requantized.items():
        if (divergence := one.divergence) is not None:
            what = name if one.to is None else f"{name}, {one.to},"
            same = f"top token the same at {divergence.top_token_agreement:.2%}"
            yield (
                "compared",
                f"{what} with the merged model: KL divergence {divergence.mean_kl:.2g} nats a token, {same}",
            )


def _render_in_detail(result: MergeResult) -> None:
    title(f"{result.output}")
    rows = [
        ("base", _named(result.base_model, result.commit)),
        *_adapter_rows(result.adapters),
        ("merged into", _describe_choice(result.base_choice)),
        ("tensors", f"{result.num_merged_tensors:,} of {result.num_tensors:,} merged, in {result.dtype}"),
        ("written", f"{format_bytes(result.bytes_written)}, merged in {format_duration(result.merge_seconds)}"),
        ("total time", format_duration(result.total_seconds)),
        ("peak host memory", format_bytes(result.peak_host_bytes)),
        *_format_rows(result),
        *([("on the hub", result.pushed_to)] if result.pushed_to else []),
    ]
    print_rows(rows)
    choice = result.base_choice
    if choice.original is not None and choice.dequantized is not None:
        title("Distance from the model that was trained")
        print_rows([("original", _in_short(choice.original)), ("dequantized", _in_short(choice.dequantized))])
    if result.verification is not None:
        against = "the base with the adapter on it" if result.verification.ran_adapters else "their sum in fp32"
        title(f"Verified against {against}")
        print_rows(list(_verification_rows(result.verification)))
    else:
        console().print(Text("not verified (--no-verify)"), soft_wrap=True)
    for name, again in result.requantized.items():
        if again.divergence is not None:
            what = f"As {name}" if again.to is None else f"Quantized again to {again.to}"
            title(f"{what}, against the merged model")
            print_rows(list(_divergence_rows(again.divergence)))


def render_merge_plan(report: MergeReport) -> None:
    """Print the plan of a merge, tensor by tensor."""
    title(f"{report.output} (not written)")
    print_rows(
        [
            ("base", _named(report.base_model, report.commit)),
            *_adapter_rows(report.adapters),
            ("merged into", "whichever base is measured to be nearer" if report.base == "auto" else report.base),
            ("tensors", f"{report.num_merged_tensors:,} of {report.num_tensors:,} to merge"),
            ("read", format_bytes(report.base_bytes)),
            ("free space on the disk", f"{format_bytes(report.disk_bytes)} needed for {', '.join(report.formats)}"),
        ]
    )
    title("What becomes of the tensors")
    print_rows(
        [
            (
                ACTION_NAMES[count.action.value],
                f"{counted(count.num_tensors, 'tensor')}, {format_bytes(count.base_bytes)} read, "
                f"{format_bytes(count.written_bytes)} written",
            )
            for count in report.actions
        ]
    )
    title("Tensors")
    print_rows([(tensor.name, _describe_tensor(tensor)) for tensor in report.tensors])


def _describe_tensor(tensor: TensorPlan) -> str:
    dtype = tensor.dtype if tensor.dtype == tensor.base_dtype else f"{tensor.base_dtype} to {tensor.dtype}"
    shape = " x ".join(map(str, tensor.shape)) or "scalar"
    return f"{ACTION_NAMES[tensor.action.value]}, {shape}, {dtype}, in {tensor.file}"


def _named(name: str, commit: str | None) -> str:
    return f"{name} at {commit}" if commit else name


def _adapter_rows(adapters: tuple[AppliedAdapter, ...]) -> Iterator[Row]:
    for adapter in adapters:
        weight = "" if adapter.weight == 1 else f", counting {adapter.weight:g}"
        yield "adapter", f"{adapter.name}, {adapter.kind}{weight}"


def _format_rows(result: MergeResult) -> Iterator[Row]:
    if len(result.outputs) == 1:
        yield "format", next(iter(result.outputs))
    else:
        yield from ((name, str(path)) for name, path in result.outputs.items())


def _describe_choice(choice: BaseChoice) -> str:
    if choice.original is not None:  # the figures follow
        return f"the {choice.base} base, the nearer one as measured"
    return f"the {choice.base} base: {choice.reason}"


def _verification_rows(verification: Verification) -> Iterator[Row]:
    yield from _divergence_rows(verification.divergence)
    rows = f" and {counted(verification.num_rows, 'row')} of the data" if verification.num_rows else ""
    prompts = counted(verification.num_prompts, "prompt")
    yield "over", f"{counted(verification.divergence.num_tokens, 'token')} of {prompts}{rows}"
    yield "computed", f"in fp32 on {verification.device}, in {format_duration(verification.seconds)}"
    if verification.ran_adapters:
        median = f"KL divergence {verification.unrounded.median_kl:.1g} at the median token"
        yield "before rounding", f"{median}, at most {verification.max_unexplained:g}"
    else:
        yield "not verified", "the sum itself: PEFT can't run these adapters together"
    if verification.modules is not None:
        yield "each module", _describe_modules(verification.modules)
    yield "in the files", f"{verification.num_parameters:,} parameters, to the bit as merged"
    if verification.less_rounded is not None:
        yield (
            "less rounding",
            f"--dtype {verification.less_rounded.dtype}, KL divergence {verification.less_rounded.mean_kl:.2g}",
        )
    if verification.max_divergence is not None:
        yield "passed", f"KL divergence at most {verification.max_divergence:g}"


def _describe_modules(check: ModuleCheck) -> str:
    share = f"off by at most {check.difference:.1g} of what the adapter does there"
    return f"{counted(check.num_modules, 'adapted module')} one by one, {share}; {check.floor:g} of the output passes"


def _divergence_rows(divergence: Divergence) -> Iterator[Row]:
    yield "KL divergence", f"{divergence.mean_kl:.2g} nats a token, at most {divergence.max_kl:.2g}"
    yield (
        "logits",
        f"differ by {divergence.mean_logit_difference:.2g} on average, at most {divergence.max_logit_difference:.2g}",
    )
    yield "top token", f"the same at {divergence.top_token_agreement:.2%} of the tokens"
    yield "perplexity", f"{divergence.perplexity:.4f} against {divergence.reference_perplexity:.4f}"


def _in_short(divergence: Divergence) -> str:
    return (
        f"KL divergence {divergence.mean_kl:.2g} nats a token, "
        f"top token the same at {divergence.top_token_agreement:.2%}, "
        f"perplexity {divergence.perplexity:.4f} against {divergence.reference_perplexity:.4f}"
    )
