"""The replica of the caching allocator, compared with sequences worked out by hand from PyTorch's rules."""

import random
from itertools import pairwise

import pytest

from qlora_cli.memory.replaying.allocator import Block, CachingAllocator, round_size, segment_size

KIB, MIB = 1024, 1024**2


@pytest.mark.parametrize(
    ("asked", "rounded"), [(1, 512), (512, 512), (513, 1024), (1024, 1024), (MIB - 1, MIB), (10 * MIB + 1, 10486272)]
)
def test_sizes_are_rounded_up_to_512_bytes(asked: int, rounded: int) -> None:
    assert round_size(asked) == rounded
    allocator = CachingAllocator()
    allocator.allocate(asked)
    assert allocator.allocated_bytes == rounded


@pytest.mark.parametrize(
    ("block", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_segments_are_2_mib_for_small_blocks_20_for_large_and_exact_from_10(block: int, segment: int) -> None:
    assert segment_size(block) == segment
    allocator = CachingAllocator()
    allocator.allocate(block)
    assert allocator.reserved_bytes == allocator.peak_reserved_bytes == segment


def test_small_blocks_share_a_segment_until_it_is_full() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(512 * KIB) for _ in range(4)]
    assert allocator.reserved_bytes == 2 * MIB
    assert [after.address - before.address for before, after in pairwise(blocks)] == [512 * KIB] * 3
    allocator.allocate(512)
    assert allocator.reserved_bytes == 4 * MIB


def test_small_and_large_blocks_are_never_in_one_segment() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(5 * MIB))
    assert allocator.reserved_bytes == 20 * MIB
    allocator.allocate(MIB)  # 20 MiB are free, but of the other pool
    assert allocator.reserved_bytes == 22 * MIB
    allocator.allocate(MIB + 1)
    assert allocator.reserved_bytes == 22 * MIB


def test_the_remainder_of_a_small_block_is_split_off_down_to_512_bytes() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(MIB))  # the segment of 2 MiB is whole again
    big = allocator.allocate(MIB)
    rest = allocator.allocate(MIB - 512)
    assert (big.num_bytes, rest.num_bytes) == (MIB, MIB - 512)
    assert allocator.allocate(512).address == rest.address + rest.num_bytes
    assert allocator.reserved_bytes == 2 * MIB


@pytest.mark.parametrize(("rest", "counted"), [(MIB, 12 * MIB), (MIB + 512, 11 * MIB - 512)])
def test_a_remainder_of_at_most_1_mib_stays_with_a_large_block_and_counts_as_allocated(
    rest: int, counted: int
) -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(12 * MIB))
    block = allocator.allocate(12 * MIB - rest)
    assert block.num_bytes == allocator.allocated_bytes == counted
    assert allocator.reserved_bytes == 12 * MIB


def test_the_best_fit_is_chosen_not_the_first() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (30, 12, 20)]
    for block in blocks:
        allocator.free(block)
    assert allocator.allocate(11 * MIB).address == blocks[1].address
    assert allocator.allocate(15 * MIB).address == blocks[2].address
    assert allocator.allocate(15 * MIB).address == blocks[0].address
    assert allocator.reserved_bytes == 62 * MIB


def test_the_lowest_address_of_equal_blocks_is_chosen_and_addresses_fall() -> None:
    allocator = CachingAllocator()
    first, second = allocator.allocate(12 * MIB), allocator.allocate(12 * MIB)
    assert second.address == first.address - 12 * MIB
    allocator.free(second)
    allocator.free(first)
    assert allocator.allocate(12 * MIB).address == second.address


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_free_neighbours_are_merged_whatever_the_order_of_freeing(order: tuple[int, ...]) -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (4, 6, 5)]  # one segment of 20 MiB, 5 of it free
    for index in order:
        allocator.free(blocks[index])
    assert allocator.allocated_bytes == 0
    whole = allocator.allocate(20 * MIB)
    assert whole.num_bytes == 20 * MIB
    assert allocator.reserved_bytes == 20 * MIB


def test_blocks_of_neighbouring_segments_are_not_merged() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(10 * MIB), allocator.allocate(10 * MIB)]
    for block in blocks:
        allocator.free(block)
    allocator.allocate(20 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


def test_a_block_between_two_in_use_is_reused() -> None:
    allocator = CachingAllocator()
    before, middle, after = (allocator.allocate(2 * MIB) for _ in range(3))
    allocator.free(middle)
    assert allocator.allocate(2 * MIB).address == middle.address  # 2 MiB, where 14 are free as well
    assert before.address < middle.address < after.address


def test_emptying_the_cache_releases_whole_segments_only() -> None:
    allocator = CachingAllocator()
    small, large = allocator.allocate(512), allocator.allocate(3 * MIB)
    own = allocator.allocate(64 * MIB)
    allocator.free(own)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 22 * MIB
    allocator.free(large)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 2 * MIB
    assert allocator.allocated_bytes == small.num_bytes == 512
    allocator.allocate(64 * MIB)  # released memory is allocated again
    assert allocator.reserved_bytes == 66 * MIB
    assert allocator.peak_reserved_bytes == 86 * MIB


def test_peaks_restart_from_the_allocated_bytes() -> None:
    allocator = CachingAllocator()
    held, gone = allocator.allocate(16 * MIB), allocator.allocate(32 * MIB)
    allocator.free(gone)
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (48 * MIB, 48 * MIB)
    allocator.reset_peaks()
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (16 * MIB, 48 * MIB)
    allocator.free(held)
    assert allocator.peak_allocated_bytes == 16 * MIB


def test_a_layer_by_layer_sequence_worked_out_by_hand() -> None:
    """Weights of 3 and 8 MiB in 20 MiB segments, activations between them, as in a load and a forward pass."""
    allocator = CachingAllocator()
    allocator.allocate(8 * MIB)  # segment A: 8, 12 free
    allocator.allocate(8 * MIB)  # A: 8, 8, 4 free
    assert allocator.reserved_bytes == 20 * MIB
    activation = allocator.allocate(5 * MIB)  # B: 5, 15 free
    assert allocator.reserved_bytes == 40 * MIB
    allocator.allocate(3 * MIB + 512)  # the 4 MiB of A, whose remainder is less than 1 MiB
    assert allocator.allocated_bytes == (8 + 8 + 5 + 4) * MIB
    allocator.allocate(14 * MIB)  # the 15 MiB of B: the remainder of 1 MiB stays with it
    assert allocator.allocated_bytes == 40 * MIB
    assert allocator.reserved_bytes == 40 * MIB
    allocator.free(activation)
    allocator.allocate(6 * MIB)  # the hole is of 5 MiB: segment C
    assert allocator.allocated_bytes == 41 * MIB
    assert allocator.reserved_bytes == 60 * MIB


def ends(blocks: list[Block]) -> list[tuple[int, int]]:
    return sorted((block.address, block.address + block.num_bytes) for block in blocks)


@pytest.mark.parametrize("seed", range(8))
def test_blocks_add_up_and_never_overlap_in_any_sequence(seed: int) -> None:
    draw = random.Random(seed)  # noqa: S311 - a seeded sequence
    allocator = CachingAllocator()
    live: list[Block] = []
    asked: dict[int, int] = {}
    most = 0
    for _ in range(1500):
        if live and draw.random() < 0.48:
            block = live.pop(draw.randrange(len(live)))
            allocator.free(block)
        else:
            size = int(2 ** draw.uniform(0, 26))
            block = allocator.allocate(size)
            asked[id(block)] = size
            live.append(block)
        if draw.random() < 0.01:
            allocator.empty_cache()
        most = max(most, allocator.allocated_bytes)
        assert allocator.allocated_bytes == sum(block.num_bytes for block in live)
        assert allocator.reserved_bytes >= allocator.allocated_bytes
        assert allocator.peak_reserved_bytes >= allocator.reserved_bytes
    assert allocator.peak_allocated_bytes == most
    assert all(end <= start for (_, end), (start, _) in pairwise(ends(live)))
    assert all(round_size(asked[id(block)]) <= block.num_bytes for block in live)
    assert all(block.num_bytes - round_size(asked[id(block)]) <= MIB for block in live)
    for block in live:
        allocator.free(block)
    assert allocator.allocated_bytes == 0
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0  # every segment is whole again
