"""A replica of PyTorch's caching allocator: what it reserves from the driver for a sequence of allocations.

Rules and constants are those of `c10/core/CachingDeviceAllocator` and `c10/cuda/CUDACachingAllocator.cpp` with the
default configuration (no expandable segments, no maximum split size), on one stream. Addresses are invented, but fall
from segment to segment as the driver's do on Linux, which maps from the top down. They matter: best fit takes the
lowest of several blocks of equal size, and the block that it splits decides which large block stays whole.
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


def round_size(num_bytes: int) -> int:
    """Return the bytes of the block for a request of `num_bytes`."""
    return max(MIN_BLOCK_BYTES, -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES)


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
        # By pool, small or large: (size, address, block) in order, so that the first large enough is the best fit.
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}

    def allocate(self, num_bytes: int) -> Block:
        """Return a block of at least `num_bytes`. The whole block counts as allocated, as it does in PyTorch."""
        size = round_size(num_bytes)
        is_small = size <= SMALL_BYTES
        free = self._free[is_small]
        index = bisect_left(free, (size, self._lowest_address))
        block = free.pop(index)[2] if index < len(free) else self._new_segment(size, is_small)
        self._split(block, size)
        block.is_free = False
        self.allocated_bytes += block.num_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        """Return a block to its pool, joined with free neighbours."""
        self.allocated_bytes -= block.num_bytes
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.is_free:
                self._take(neighbour)
                block = self._joined(neighbour, block) if neighbour is block.before else self._joined(block, neighbour)
        block.is_free = True
        insort(self._free[block.is_small], (block.num_bytes, block.address, block))

    def empty_cache(self) -> None:
        """Return entirely free segments to the driver, as `torch.cuda.empty_cache` does."""
        for is_small, free in self._free.items():
            whole = [entry for entry in free if entry[2].before is None and entry[2].after is None]
            self.reserved_bytes -= sum(size for size, _, _ in whole)
            self._free[is_small] = [entry for entry in free if entry not in whole]

    def reset_peaks(self) -> None:
        """Restart the peaks from what is allocated and reserved now."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def _new_segment(self, size: int, is_small: bool) -> Block:
        num_bytes = segment_size(size)
        self._lowest_address -= num_bytes
        block = Block(num_bytes=num_bytes, address=self._lowest_address, is_small=is_small)
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return block

    def _split(self, block: Block, size: int) -> None:
        """Split off the rest of a block; for a large block, only if the rest is more than 1 MiB."""
        rest = block.num_bytes - size
        if rest < MIN_BLOCK_BYTES or (not block.is_small and rest <= SMALL_BYTES):
            return
        after = Block(
            num_bytes=rest,
            address=block.address + size,
            is_small=block.is_small,
            is_free=True,
            before=block,
            after=block.after,
        )
        if block.after is not None:
            block.after.before = after
        block.num_bytes, block.after = size, after
        insort(self._free[block.is_small], (rest, after.address, after))

    def _take(self, block: Block) -> None:
        free = self._free[block.is_small]
        index = bisect_left(free, (block.num_bytes, block.address))
        assert free[index][2] is block, "a free block is in its pool"
        del free[index]

    @staticmethod
    def _joined(first: Block, second: Block) -> Block:
        first.num_bytes += second.num_bytes
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first
