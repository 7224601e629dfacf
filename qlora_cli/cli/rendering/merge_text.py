"""What `qlora merge` shows: what was merged into what, and how near the result is to what was trained."""

from collections.abc import Iterator

from rich.text import Text

from qlora_cli.cli.console import Row, console, print_rows, title
from qlora_cli.merging.merge_result import (
    AppliedAdapter,
    BaseChoice,
    Divergence,
    MergeReport,
    MergeResult,
    ModuleCheck,
    TensorPlan,
    Verification,
)
from qlora_cli.units import counted, format_bytes, format_duration

TOLD = {
    "copy": "copied as bytes",
    "cast": "cast",
    "dequantize": "dequantized",
    "merge": "merged",
}


def render_merge(result: MergeResult) -> None:
    """Print what was merged, and how it compares."""
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
    for again in result.requantized.values():
        if again.divergence is not None:
            title(f"Quantized again to {again.to}, against the merged model")
            print_rows(list(_divergence_rows(again.divergence)))


def render_merge_plan(report: MergeReport) -> None:
    """Print what would be merged, tensor by tensor."""
    title(f"{report.output} (not written)")
    print_rows(
        [
            ("base", _named(report.base_model, report.commit)),
            *_adapter_rows(report.adapters),
            ("merged into", "whichever base is measured to be nearer" if report.base == "auto" else report.base),
            ("tensors", f"{report.num_merged_tensors:,} of {report.num_tensors:,} to merge"),
            ("read", format_bytes(report.base_bytes)),
            ("room on the disk", f"{format_bytes(report.disk_bytes)} for {', '.join(report.formats)}"),
        ]
    )
    title("What becomes of the tensors")
    print_rows(
        [
            (
                TOLD[count.action.value],
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
    return f"{TOLD[tensor.action.value]}, {shape}, {dtype}, in {tensor.file}"


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


def _verification_rows(found: Verification) -> Iterator[Row]:
    yield from _divergence_rows(found.divergence)
    rows = f" and {counted(found.num_rows, 'row')} of the data" if found.num_rows else ""
    yield "over", f"{found.divergence.num_tokens:,} tokens of {found.num_prompts} prompts{rows}"
    yield "computed", f"in fp32 on {found.device}, in {format_duration(found.seconds)}"
    if found.ran_adapters:
        yield (
            "before rounding",
            f"KL divergence {found.unrounded.median_kl:.1g} at the median token, at most {found.max_unexplained:g}",
        )
    else:
        yield "not verified", "the sum itself: PEFT can't run these adapters together"
    if found.modules is not None:
        yield "each module", _describe_modules(found.modules)
    yield "in the files", f"{found.num_parameters:,} parameters, to the bit as merged"
    if found.less_rounded is not None:
        yield "less rounding", f"--dtype {found.less_rounded.dtype}, KL divergence {found.less_rounded.mean_kl:.2g}"
    if found.max_divergence is not None:
        yield "passed", f"KL divergence at most {found.max_divergence:g}"


def _describe_modules(found: ModuleCheck) -> str:
    share = f"off by at most {found.difference:.1g} of what the adapter does there"
    return f"{counted(found.num_modules, 'adapted module')} one by one, {share}; {found.floor:g} of the output passes"


def _divergence_rows(found: Divergence) -> Iterator[Row]:
    yield "KL divergence", f"{found.mean_kl:.2g} nats a token, at most {found.max_kl:.2g}"
    yield "logits", f"differ by {found.mean_logit_difference:.2g} on average, at most {found.max_logit_difference:.2g}"
    yield "top token", f"the same at {found.top_token_agreement:.2%} of the tokens"
    yield "perplexity", f"{found.perplexity:.4f} against {found.reference_perplexity:.4f}"


def _in_short(found: Divergence) -> str:
    return (
        f"KL divergence {found.mean_kl:.2g} nats a token, top token the same at {found.top_token_agreement:.2%}, "
        f"perplexity {found.perplexity:.4f} against {found.reference_perplexity:.4f}"
    )
