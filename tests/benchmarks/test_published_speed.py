"""The published rows that the model of time is compared with, and the steps that they are predicted by."""

from pathlib import Path

import pytest

from benchmarks.published_speed import LONG, ROWS, compare, read_rows
from benchmarks.published_steps import GPTQ, LIGER, PEFT, UNSLOTH, PublishedRow, step_of, with_gptq
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.timing.operation import Operation, OperationKind, Pass


def test_the_rows_are_known_models_on_known_gpus_except_two_that_do_not_say_their_length() -> None:
    rows, left_out = read_rows()
    assert len(rows) == 32 - len(left_out)
    assert [sentence.split()[1] for sentence in left_out] == ["36", "37"]
    assert all("seq_len" in sentence for sentence in left_out)
    assert {GPTQ, LIGER, PEFT, UNSLOTH} < {row.algorithm for row in rows}
    assert {row.gpu.name for row in rows} >= {"A100 40GB", "A100 80GB", "L4", "RTX 4090", "H100 SXM", "H200"}
    assert sum(row.is_nf4 for row in rows) >= 15


def test_a_row_on_an_unknown_gpu_is_left_out(tmp_path: Path) -> None:
    header, first, *_ = ROWS.read_text(encoding="utf-8").splitlines()
    file = tmp_path / "rows.csv"
    file.write_text(f"{header}\n{first.replace('A100-SXM4-80GB', 'MI300X')}\n", encoding="utf-8")
    rows, (sentence,) = read_rows(file)
    assert rows == []
    assert "MI300X" in sentence


@pytest.mark.parametrize("number", ["3", "20", "24", "s1"])
def test_the_model_is_within_its_band_of_published_throughput(number: str) -> None:
    (row,) = [row for row in read_rows()[0] if row.id == number]
    assert row.rows * row.length >= LONG
    assert 0.75 < compare(row).ratio < 1.30


def test_a_gptq_layer_dequantizes_more_slowly_and_only_forward() -> None:
    forward, backward = (
        Operation(run_in, OperationKind.DEQUANTIZATION, "dequantize", 0, 2500, 3)
        for run_in in (Pass.FORWARD, Pass.BACKWARD)
    )
    product = Operation(Pass.BACKWARD, OperationKind.BASE_GEMM, "product", 10, 10, 1)
    result = with_gptq(((2, forward), (2, backward), (2, product)))
    assert (2, product) in result
    assert len(result) == 2
    (moved,) = [times * each.num_bytes for times, each in result if each.kind == OperationKind.OTHER]
    assert moved == pytest.approx(2 * 16_500, rel=1e-3)


def test_liger_replaces_elementwise_operations_of_a_traced_step() -> None:
    rows = {row.id: row for row in read_rows()[0]}
    plain, fused = (dict_of_kernels(rows[number]) for number in ("34", "35"))
    assert find_gpu("L4") == rows["35"].gpu
    assert fused[OperationKind.NORM] < plain[OperationKind.NORM] / 3
    assert fused[OperationKind.LORA] == plain[OperationKind.LORA]


def dict_of_kernels(row: PublishedRow) -> dict[OperationKind, int]:
    kernels: dict[OperationKind, int] = {}
    for times, operation in step_of(row)[0]:
        kernels[operation.kind] = kernels.get(operation.kind, 0) + times * operation.kernels
    return kernels
