"""Which KV block belongs to whom. Integers only; block 0 is the null block that padding writes to and is never handed out."""


class BlockManager:
    """A free list over blocks 1 .. num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage_ratio(self) -> float:
        return 1 - self.num_free / (self.num_blocks - 1)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def extend(self, block_table: list[int], num_tokens: int) -> bool:
        """Grow `block_table` until it holds `num_tokens`; False, and nothing taken, when there are too few free blocks."""
        missing = self.blocks_for(num_tokens) - len(block_table)
        if missing > len(self._free):
            return False
        block_table.extend(self._free.pop() for _ in range(missing))
        return True

    def release(self, block_table: list[int]) -> None:
        """Give every block of the table back and empty it."""
        self._free.extend(reversed(block_table))
        block_table.clear()
