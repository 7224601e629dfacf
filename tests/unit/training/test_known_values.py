"""Masks and positions that the host knows: the same results, and no read of the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
    flash_attention_mask,
    sdpa_mask,
)

from qlora_cli.attention.blockwise import register_blockwise
from qlora_cli.data.feeding.known_values import KnownValues, host_copies, with_known_values
from tests.support.models.tiny_models import tiny_model
from tests.support.runs.host_reads import HostReads
from tests.unit.attention.test_blockwise import KINDS, batch, distance, flat, model_of, run

NUM_BATCHES = 30


def random_batch(seed: int, *, is_packed: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows, length = (
        int(torch.randint(1, 4, (), generator=generator)),
        int(torch.randint(1, 12, (), generator=generator)),
    )
    if is_packed:
        sizes = torch.randint(1, 12, (rows,), generator=generator).tolist()
        return {"position_ids": torch.cat([torch.arange(one) for one in sizes])[None]}
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    return {"attention_mask": (torch.arange(length) < lengths).long()}


def watched(values: dict[str, Any]) -> tuple[dict[str, Any], HostReads]:
    """Return the batch as if it was moved to a device, and the reads of it."""
    copies, reads = host_copies({name: value.clone() for name, value in values.items()}), HostReads()
    reads.mark(values)
    return with_known_values(values, copies), reads


def same(ours: Any, theirs: Any) -> bool:
    return ours is theirs if ours is None or theirs is None else torch.equal(ours, theirs)


def masks(config: Any, batch: dict[str, Any]) -> list[Any]:
    """Return the masks of a model for `batch`, each of which transformers makes or leaves out."""
    (tensor,) = batch.values()
    given = {"attention_mask": None, "position_ids": None, **batch}
    arguments = {"inputs_embeds": torch.zeros(*tensor.shape, 4), "past_key_values": None, **given}
    return [create_causal_mask(config, **arguments), create_sliding_window_causal_mask(config, **arguments)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_masks_are_made_or_left_out_without_a_read(attention: str, is_packed: bool) -> None:
    config = tiny_model("mistral", sliding_window=5, attn_implementation=attention).config
    left_out = 0
    for seed in range(NUM_BATCHES):
        values = random_batch(seed, is_packed=is_packed)
        expected = masks(config, {name: value.clone() for name, value in values.items()})
        known, reads = watched(values)
        with reads.counted():
            found = masks(config, known)
        assert all(map(same, found, expected))
        assert not any(isinstance(mask, KnownValues) for mask in found)
        assert not reads.counts
        left_out += found[0] is None
    assert attention == "eager" or 0 < left_out < NUM_BATCHES


@pytest.mark.parametrize(
    ("find", "is_packed"),
    [
        (lambda known: find_packed_sequence_indices(known["position_ids"]), True),
        (lambda known: flash_attention_mask(3, 9, known["attention_mask"].shape[1], **known), False),
        (
            lambda known: sdpa_mask(
                len(known["attention_mask"]),
                known["attention_mask"].shape[1],
                known["attention_mask"].shape[1],
                **known,
            ),
            False,
        ),
        (lambda known: torch.all(known["attention_mask"] == 1) or None, False),
    ],
)
def test_what_transformers_asks_of_them_is_answered_by_the_host(
    find: Callable[[dict[str, Any]], Any], is_packed: bool
) -> None:
    for seed in range(NUM_BATCHES):
        values = random_batch(seed, is_packed=is_packed)
        values = {name: value.bool() if name == "attention_mask" else value for name, value in values.items()}
        expected = find({name: value.clone() for name, value in values.items()})
        known, reads = watched(values)
        with reads.counted():
            found = find(known)
        assert same(found, expected)
        assert not reads.counts


def test_other_results_are_plain_tensors() -> None:
    known, _ = watched({"position_ids": torch.arange(6)[None]})
    positions = known["position_ids"]
    assert type(positions) is KnownValues
    for result in (
        positions.float(),
        positions[:, None, :].float(),
        positions * torch.ones(6),
        torch.ones(6)[positions],
    ):
        assert type(result) is torch.Tensor
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "blockwise"])
def test_losses_and_gradients_do_not_change(attention: str, kind: str) -> None:
    register_blockwise()
    model: Any = tiny_model("llama", max_position_embeddings=512) if attention == "sdpa" else model_of("gpt_oss")
    inputs, counts = batch(kind)
    expected, expected_gradients = run(model, attention, inputs, counts)
    logits, gradients = run(model, attention, with_known_values(inputs, host_copies(inputs)), counts)
    assert distance(logits, expected) == 0
    assert distance(flat(gradients), flat(expected_gradients)) < 1e-6
