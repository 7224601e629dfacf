"""A replica of PyTorch's caching allocator: what it reserves from the driver for a sequence of allocations.

Rules and constants are those of `c10/core/CachingDeviceAllocator` and `c10/cuda/CUDACachingAllocator.cpp` with the
default configuration (no expandable segments, no maximum split size), on one stream or two. Addresses are invented,
but fall from segment to segment as the driver's do on Linux, which maps from the top down. They matter: best fit takes
the lowest of several blocks of equal size, and the block that it splits decides which large block stays whole.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Optional

MIN_BLOCK_BYTES = 512  # kMinBlockSize: every size is rounded up to a multiple
SMALL_BYTES = 1 << 20  # kSmallSize: up to here, blocks come from the pool of small segments
SMALL_SEGMENT_BYTES = 2 << 20  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 << 20  # kLargeBuffer: a segment for blocks of 1 to 10 MiB
MIN_LARGE_BYTES = 10 << 20  # kMinLargeAlloc: from here on, a block has a segment of its own
ROUND_LARGE_BYTES = 2 << 20  # kRoundLarge
# A free block is known by its size, shifted by more bits than an address has, plus its address: such keys are in the
# order of the best fit, and compare faster than pairs.
ADDRESS_BITS = 64


def round_size(num_bytes: int) -> int:
    """Return the bytes of the block for a request of `num_bytes`."""
    return -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES or MIN_BLOCK_BYTES


def segment_size(block_bytes: int) -> int:
    """Return the bytes to request from the driver when no free block can hold one of `block_bytes`."""
    if block_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-block_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


@dataclass(slots=True, eq=False)
class Block:
    """A part of a segment, in use or free; its neighbours are those in the same segment."""

    num_bytes: int
    address: int
    is_small: bool
    pool: list[int]
    is_free: bool = False
    before: Optional["Block"] = None
    after: Optional["Block"] = None


class CachingAllocator:
    """Hands out blocks, caches those that are freed, and counts. All figures are in bytes."""

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self._lowest_address = 0
        # The keys of free blocks in order, by pool, so that the first that is large enough is the best fit.
        self._small: list[int] = []
        self._large: list[int] = []
        self._small_apart: list[int] = []
        self._large_apart: list[int] = []
        self._blocks: dict[int, Block] = {}  # the free ones, by their keys

    def allocate(self, num_bytes: int, *, apart: bool = False) -> Block:
        """Return a block of at least `num_bytes`. The whole block counts as allocated, as it does in PyTorch.

        `apart`: for a second stream, which has pools of its own.
        """
        size = round_size(num_bytes)
        is_small = size <= SMALL_BYTES
        free = self._small if is_small else self._large
        if apart:
            free = self._small_apart if is_small else self._large_apart
        index = bisect_left(free, (size << ADDRESS_BITS) + self._lowest_address)
        block = self._blocks.pop(free.pop(index)) if index < len(free) else self._new_segment(size, is_small, free)
        rest = block.num_bytes - size
        if rest >= MIN_BLOCK_BYTES and (is_small or rest > SMALL_BYTES):
            self._split(block, size, rest)
        block.is_free = False
        self.allocated_bytes += block.num_bytes
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block

    def free(self, block: Block) -> None:
        """Return a block to its pool, joined with free neighbours."""
        self.allocated_bytes -= block.num_bytes
        before, after = block.before, block.after
        if before is not None and before.is_free:
            self._take(before)
            block = _joined(before, block)
        if after is not None and after.is_free:
            self._take(after)
            _joined(block, after)
        self._put(block)

    def empty_cache(self) -> None:
        """Return entirely free segments to the driver, as `torch.cuda.empty_cache` does."""
        for block in list(self._blocks.values()):
            if block.before is None and block.after is None:
                self._take(block)
                self.reserved_bytes -= block.num_bytes

    def reset_peaks(self) -> None:
        """Restart the peaks from what is allocated and reserved now."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def _new_segment(self, size: int, is_small: bool, pool: list[int]) -> Block:
        num_bytes = segment_size(size)
        self._lowest_address -= num_bytes
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return Block(num_bytes, self._lowest_address, is_small, pool)

    def _split(self, block: Block, size: int, rest: int) -> None:
        """Split off the `rest` of a block; of a large block, it is more than 1 MiB."""
        after = Block(rest, block.address + size, block.is_small, block.pool, False, block, block.after)
        if block.after is not None:
            block.after.before = after
        block.num_bytes, block.after = size, after
        self._put(after)

    def _put(self, block: Block) -> None:
        block.is_free = True
        key = (block.num_bytes << ADDRESS_BITS) + block.address
        self._blocks[key] = block
        insort(block.pool, key)

    def _take(self, block: Block) -> None:
        free, key = block.pool, (block.num_bytes << ADDRESS_BITS) + block.address
        del free[bisect_left(free, key)]
        assert self._blocks.pop(key) is block, "a free block is in its pool"


def _joined(first: Block, second: Block) -> Block:
    first.num_bytes += second.num_bytes
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first
