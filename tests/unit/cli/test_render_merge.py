"""The output of `qlora merge`, from frozen results: whole lines, and only measured values."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_cli.cli.rendering.merge_text import render_merge, render_merge_plan
from qlora_cli.merging.merge_result import (
    Action,
    ActionCount,
    AppliedAdapter,
    BaseChoice,
    Divergence,
    MergeReport,
    MergeResult,
    ModuleCheck,
    Requantized,
    Rounding,
    TensorPlan,
    Verification,
)

NEAR = Divergence(
    num_tokens=479,
    max_logit_difference=0.046,
    mean_logit_difference=0.0045,
    max_kl=1.1e-4,
    mean_kl=1.02e-5,
    median_kl=0.9e-5,
    top_token_agreement=0.9937,
    reference_perplexity=234.0024,
    perplexity=233.9858,
)
FAR = replace(NEAR, mean_kl=0.0293, top_token_agreement=0.8935, perplexity=244.606)
ADAPTER = AppliedAdapter(name="runs/demo", path=Path("runs/demo/adapter"), weight=1.0, kind="LoRA of rank 16")
RESULT = MergeResult(
    output=Path("runs/demo/merged"),
    outputs={"hf": Path("runs/demo/merged")},
    base_model="owner/base",
    commit="0123abc",
    adapters=(ADAPTER,),
    base="dequantized",
    base_choice=BaseChoice(base="dequantized", reason="measured", original=FAR, dequantized=NEAR),
    dtype="bfloat16",
    num_tensors=1038,
    num_merged_tensors=28,
    bytes_written=7 << 20,
    merge_seconds=0.31,
    total_seconds=4.29,
    peak_host_bytes=562 << 20,
    verification=Verification(
        passed=True,
        is_exact=True,
        ran_adapters=True,
        max_divergence=None,
        max_unexplained=1e-6,
        divergence=NEAR,
        unrounded=NEAR,
        modules=ModuleCheck(
            num_modules=28, worst="model.layers.3.mlp.down_proj", difference=2.3e-5, max_difference=0.01, floor=1e-5
        ),
        less_rounded=None,
        num_parameters=38,
        differing_parameters=(),
        num_prompts=4,
        num_rows=8,
        device="cpu",
        seconds=0.4,
    ),
    requantized={},
    pushed_to=None,
    notes=(),
)
REPORT = MergeReport(
    output=Path("out"),
    base_model="base",
    commit=None,
    adapters=(ADAPTER, replace(ADAPTER, name="other", weight=0.5)),
    base="auto",
    formats=("hf", "nf4"),
    num_tensors=3,
    num_merged_tensors=1,
    base_bytes=3 << 20,
    disk_bytes=70 << 20,
    actions=(
        ActionCount(action=Action.COPY, num_tensors=2, base_bytes=1 << 20, written_bytes=1 << 20),
        ActionCount(action=Action.MERGE, num_tensors=1, base_bytes=2 << 20, written_bytes=4 << 20),
    ),
    tensors=(
        TensorPlan(
            name="scale",
            file="a.safetensors",
            action=Action.COPY,
            base_dtype="F32",
            dtype="F32",
            shape=(),
            written_bytes=4,
        ),
        TensorPlan(
            name="q_proj.weight",
            file="b.safetensors",
            action=Action.MERGE,
            base_dtype="BF16",
            dtype="F32",
            shape=(8, 4),
            written_bytes=128,
        ),
    ),
)


def shown(result: MergeResult | MergeReport, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, str]]:
    """Return the output, and its rows by name."""
    render_merge(result, in_detail=True) if isinstance(result, MergeResult) else render_merge_plan(result)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    rows = (line.strip().split("  ", 1) for line in text.splitlines() if line.startswith("  "))
    return text, {name: value.strip() for name, value in rows}


def test_a_merge_is_shown_with_its_base_and_divergence(capsys: pytest.CaptureFixture[str]) -> None:
    text, rows = shown(RESULT, capsys)
    assert text.startswith("runs/demo/merged\n")
    assert rows["base"] == "owner/base at 0123abc"
    assert rows["merged into"] == "the dequantized base, the nearer one as measured"
    assert rows["tensors"] == "28 of 1,038 merged, in bfloat16"
    assert rows["original"].startswith("KL divergence 0.029 nats a token, top token the same at 89.35%")
    assert rows["dequantized"].startswith("KL divergence 1e-05 nats a token")
    assert rows["over"] == "479 tokens of 4 prompts and 8 rows of the data"
    assert rows["each module"] == (
        "28 adapted modules one by one, off by at most 2e-05 of what the adapter does there; "
        "1e-05 of the output passes"
    )
    assert "passed" not in rows  # no bound was set
    assert "less rounding" not in rows  # it has almost no cost
    assert rows["before rounding"].startswith("KL divergence ")
    assert rows["in the files"] == "38 parameters, to the bit as merged"
    assert rows["format"] == "hf"  # its path is in the heading
    assert "on the hub" not in rows


def test_a_sum_that_was_not_verified_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert RESULT.verification is not None
    verification = replace(RESULT.verification, ran_adapters=False, modules=None)
    render_merge(replace(RESULT, verification=verification), in_detail=True)
    text = capsys.readouterr().out
    assert "Verified against their sum in fp32" in text
    assert re.search(r"not verified +the sum itself: PEFT can't run these adapters together", text)
    assert "before rounding" not in text


def test_a_given_bound_and_a_dtype_that_rounds_less_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert RESULT.verification is not None
    less = Rounding(dtype="fp16", mean_kl=1.3e-6, num_bytes=7 << 20)
    verification = replace(RESULT.verification, max_divergence=1e-3, less_rounded=less)
    _, rows = shown(replace(RESULT, verification=verification), capsys)
    assert rows["passed"] == "KL divergence at most 0.001"
    assert rows["less rounding"] == "--dtype fp16, KL divergence 1.3e-06"


def test_values_that_were_not_measured_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    asked = BaseChoice(base="original", reason="as asked", original=None, dequantized=None)
    text, rows = shown(replace(RESULT, base="original", base_choice=asked, verification=None), capsys)
    assert rows["merged into"] == "the original base: as asked"
    assert "Distance" not in text
    assert "not verified (--no-verify)" in text
    assert "Verified" not in text
    assert RESULT.verification is not None
    text, rows = shown(replace(RESULT, verification=replace(RESULT.verification, num_rows=0)), capsys)
    assert rows["over"] == "479 tokens of 4 prompts"


def test_each_format_is_shown_with_its_path_and_nf4_with_its_divergence(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = {"hf": Path("out/hf"), "nf4": Path("out/nf4"), "gguf": Path("out/gguf")}
    again = {
        "nf4": Requantized(to="NF4 with double quantization", divergence=FAR),
        "gguf": Requantized(to="Q8_0", divergence=None),
        "other": Requantized(to=None, divergence=FAR),
    }
    text, rows = shown(replace(RESULT, outputs=outputs, requantized=again, pushed_to="https://hub/me/x"), capsys)
    assert (rows["hf"], rows["nf4"], rows["on the hub"]) == ("out/hf", "out/nf4", "https://hub/me/x")
    last = text.partition("Quantized again to NF4 with double quantization, against the merged model\n")[2]
    assert "0.029 nats a token" in last.partition("As other, against the merged model\n")[0]
    assert "0.029 nats a token" in last.partition("As other, against the merged model\n")[2]
    assert "Q8_0" not in text  # nothing ran it
    text, rows = shown(replace(RESULT, outputs={"gguf": Path("out")}), capsys)
    assert rows["format"] == "gguf"


def test_a_weight_is_shown_if_it_is_not_1(capsys: pytest.CaptureFixture[str]) -> None:
    text, _ = shown(REPORT, capsys)
    assert "runs/demo, LoRA of rank 16\n" in text
    assert "other, LoRA of rank 16, counting 0.5\n" in text


def test_a_plan_shows_what_happens_to_each_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    text, rows = shown(REPORT, capsys)
    assert text.startswith("out (not written)\n")
    assert rows["merged into"] == "whichever base is measured to be nearer"
    assert rows["free space on the disk"] == "70.00 MiB needed for hf, nf4"
    assert rows["copied as bytes"] == "2 tensors, 1.00 MiB read, 1.00 MiB written"
    assert rows["merged"] == "1 tensor, 2.00 MiB read, 4.00 MiB written"
    assert rows["scale"] == "copied as bytes, scalar, F32, in a.safetensors"
    assert rows["q_proj.weight"] == "merged, 8 x 4, BF16 to F32, in b.safetensors"


def test_a_merge_is_five_lines_unless_all_figures_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    render_merge(RESULT)
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "runs/demo/merged",
        "merged runs/demo into the dequantized base, the nearer one as measured",
        "written 7.00 MiB: 28 of 1,038 tensors merged, in bfloat16",
        "verified against the base with the adapter on it: KL divergence 1e-05 nats a token, "
        "top token the same at 99.37%",
        "took 4.29 s, 562.00 MiB at most; all figures: merge.json",
    ]
    compared = {"a": Requantized(to="Q4_K_M", divergence=FAR), "b": Requantized(to=None, divergence=NEAR)}
    render_merge(replace(RESULT, verification=None, requantized=compared))
    text = " ".join(capsys.readouterr().out.split())
    assert "verified no (--no-verify)" in text
    assert "compared a, Q4_K_M, with the merged model: KL divergence 0.029 nats a token, top token the same at" in text
    assert "compared b with the merged model: KL divergence 1e-05 nats" in text
