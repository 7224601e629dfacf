"""Packed rows are trained as if each stood alone, or packing is refused."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.attention.blockwise import register_blockwise
from qlora_cli.data.feeding.collate import make_collator
from qlora_cli.data.feeding.packing import best_fit, pack
from qlora_cli.errors import ModelError
from qlora_cli.training.checks.packing_check import packing_fault
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.training.train_run import run, train
from tests.conftest import Recorder, train_settings
from tests.integration.training.test_loss_in_training import trainer_of
from tests.integration.training.test_training import gradients_of_first_step
from tests.support.models.tiny_models import FAMILIES, VOCABULARY_SIZE, save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ROWS = ([5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33, 34], [41, 40])
KERNELS = ("eager", "sdpa")
# Positions counted over the whole row, or a convolution or state that runs through it, would need kernels that take
# the starts of rows, which are not installed here.
REFUSED = {
    *("opt", "bloom", "falcon", "bamba", "falcon_h1", "mamba", "mamba2", "lfm2", "lfm2_moe", "qwen3_next"),
    *("qwen3_5_text", "recurrent_gemma", "jamba", "granitemoehybrid", "nemotron_h", "zamba2"),
}
REFUSED_IN_EAGER = {"gpt_oss"}


def logits_of(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    logits: torch.Tensor = model(
        **{name: value for name, value in batch.items() if name != "labels"}, use_cache=False
    ).logits
    return logits


def loss_and_gradients(
    model: torch.nn.Module, logits: torch.Tensor, labels: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of some labels and its gradients; those of others may be asked for after it."""
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    names, parameters = zip(*trained, strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    found = {name: each for name, each in zip(names, gradients, strict=True) if each is not None}
    return float(loss.detach()), found


def assert_packed_is_alone(model: torch.nn.Module) -> None:
    """Compare loss and gradients of every row, packed with the others and alone."""
    rows = Dataset.from_dict({"input_ids": list(ROWS), "labels": [[-100, *row[1:]] for row in ROWS]})
    (places,) = best_fit(np.array([len(row) for row in ROWS]), 32)
    packed = make_collator(0, packing=True)([pack(rows, [places])[0]])
    packed_logits = logits_of(model, packed)
    begin = 0
    for place in places:
        row = ROWS[place]
        labels = torch.full_like(packed["labels"], -100)
        labels[0, begin : begin + len(row)] = packed["labels"][0, begin : begin + len(row)]
        begin += len(row)
        alone = make_collator(0, packing=False)([rows[place]])
        loss, gradients = loss_and_gradients(model, packed_logits, labels)
        other_loss, other_gradients = loss_and_gradients(model, logits_of(model, alone), alone["labels"])
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert gradients.keys() == other_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "kernel"), [*product(FAMILIES, KERNELS), ("gemma2", "blockwise"), ("gpt_oss", "blockwise")]
)
def test_rows_that_may_be_packed_train_as_if_alone(family: str, kernel: str) -> None:
    register_blockwise()
    model = tiny_model(family)
    if kernel == "sdpa" and not model._supports_sdpa:
        pytest.skip("has no sdpa")
    model.set_attn_implementation(kernel)
    fault = packing_fault(model, num_tokens=VOCABULARY_SIZE, device=CPU, dtype=torch.float32)
    model.eval()
    assert (fault is None) == (family not in REFUSED and (family not in REFUSED_IN_EAGER or kernel == "sdpa")), fault
    if fault is None:
        assert_packed_is_alone(model)
    else:
        with pytest.raises((AssertionError, TypeError, ValueError, RuntimeError, AttributeError)):
            assert_packed_is_alone(model)


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60), capacity=st.integers(100, 150))
def test_every_row_is_in_one_packed_row_that_it_fits_into(lengths: list[int], capacity: int) -> None:
    bins = best_fit(np.array(lengths), capacity)
    assert sorted(row for places in bins for row in places) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in places) for places in bins]
    assert max(sums) <= capacity
    # Best-fit decreasing needs at most 11/9 of the optimum, plus one (Johnson 1973).
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // capacity) + 4 + sum(2 * length > capacity for length in lengths)


def test_the_fullest_row_that_fits_is_chosen() -> None:
    assert best_fit(np.array([6, 5, 4, 3, 2]), 10) == [[0, 2], [1, 3, 4]]


def test_a_step_on_packed_rows_has_the_loss_and_gradients_of_the_rows(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    steps = []
    for packing in (False, True):
        output = tmp_path / f"run-{packing}"
        settings = train_settings(
            base_model,
            rows,
            output,
            data__packing=packing,
            data__max_length=256,
            training__micro_batch_size=1 if packing else 12,
            training__gradient_accumulation_steps=4 if packing else 1,
            training__max_steps=1,
            training__max_grad_norm=1e9,  # no clipping, so that gradients compare as they are
        )
        prepared = prepare_run(settings, Recorder())
        if packing:
            assert prepared.plan.num_packed_rows == len(prepared.train_data.dataset) <= 4
        steps.append(gradients_of_first_step(prepared, output))
    (loss, gradients), (other_loss, other_gradients) = steps
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-4, atol=1e-6)


def test_a_packed_run_reports_how_full_its_rows_are_and_evaluates(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    settings = train_settings(
        base_model,
        rows,
        tmp_path / "run",
        data__packing=True,
        data__max_length=128,
        data__eval_split="3",
        training__max_steps=None,
        training__epochs=1,
    )
    recorder = Recorder()
    prepared = prepare_run(settings, recorder)
    result = run(prepared, recorder)
    assert prepared.plan.num_packed_rows is not None
    assert result.steps == -(-prepared.plan.num_packed_rows // 2)
    assert result.num_tokens == prepared.plan.num_train_tokens
    assert result.eval_loss is not None
    assert any("packed into" in getattr(event, "message", "") for event in recorder.events)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["train"]["packed_rows"] == prepared.plan.num_packed_rows


def test_a_stream_s_batches_keep_the_starts_of_all_packed_rows(base_model: Path, rows: Path, tmp_path: Path) -> None:
    flags: dict[str, object] = {"data__packing": True, "data__streaming": True, "data__max_length": 512}
    trainer = trainer_of(base_model, rows, tmp_path / "run", **flags, data__accept_lost=True)
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2
    assert batch["cu_seq_lens_q"].tolist() == [*starts, batch["input_ids"].shape[1]]


def test_a_model_that_would_mix_packed_rows_is_refused(base_model: Path, rows: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "mamba2", vocab_size=4096)
    for path in base_model.glob("*token*"):
        (model / path.name).write_bytes(path.read_bytes())
    (model / "chat_template.jinja").write_bytes((base_model / "chat_template.jinja").read_bytes())
    settings = train_settings(model, rows, tmp_path / "run", data__packing=True, quantization__method="none")
    with pytest.raises(
        ModelError, match="can't be trained on packed rows with eager attention: a row attends to"
    ) as caught:
        train(settings, Recorder())
    assert "--sampling group_by_length" in (caught.value.hint or "")
    assert not (tmp_path / "run").exists()
