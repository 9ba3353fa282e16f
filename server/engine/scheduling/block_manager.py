"""The blocks of the KV cache: which sequences hold them, and which can be shared as a prefix. Integers and hashes only.

Block 0 is the null block for padding. No sequence ever gets it. A full block can be published under a key, which is a hash of
all tokens up to the block's end. Sequences that begin with these tokens then share the block. A full block is never written
again, so sharing needs no copy. A published block that no sequence holds keeps its content until memory is needed. The block
that was released first is reused first.
"""

from collections import OrderedDict
from collections.abc import Sequence


class BlockManager:
    """Reference counts of the blocks 1 .. num_blocks - 1. `block_size`: tokens per block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2
        self.num_blocks, self.block_size = num_blocks, block_size
        self._empty = list(range(num_blocks - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # published blocks that no sequence holds; oldest first
        self._users = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds, published ones included."""
        return len(self._empty) + len(self._idle)

    @property
    def usage_ratio(self) -> float:
        """Share of the blocks that are held by sequences, 0 to 1."""
        return 1 - self.num_free / (self.num_blocks - 1)

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def extend(self, block_table: list[int], num_tokens: int) -> bool:
        """Grow `block_table` to hold `num_tokens` tokens. If there are too few free blocks, take none and return False."""
        missing = self.blocks_for(num_tokens) - len(block_table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._empty.pop() if self._empty else self._forget_oldest()
            self._users[block] = 1
            block_table.append(block)
        return True

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The published blocks of `keys`, up to the first key without a block. Does not hold them yet."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of these blocks are held by no sequence, and so still count as free."""
        return sum(self._users[block] == 0 for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Add one user to each of these published blocks."""
        for block in blocks:
            if self._users[block] == 0:
                del self._idle[block]
            self._users[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """Let others find this full block by `key`. If another block has this key already, that one stays the shared block."""
        assert self._users[block] > 0
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def release(self, block_table: list[int]) -> None:
        """Give up every block of the table, and empty the table.

        The last blocks are released first, so they are reused first: the beginning of a prefix is useful longer.
        """
        for block in reversed(block_table):
            assert self._users[block] > 0
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._empty.append(block)
        block_table.clear()

    def check(self, block_tables: Sequence[Sequence[int]]) -> None:
        """Assert that exactly the blocks of these tables are held, and that every other block is free. For tests."""
        held = [0] * self.num_blocks
        for table in block_tables:
            assert len(set(table)) == len(table)
            for block in table:
                held[block] += 1
        assert held == self._users
        assert held[0] == 0
        free = [*self._empty, *self._idle]
        assert sorted(free) == [block for block in range(1, self.num_blocks) if held[block] == 0]
        assert {key: block for block, key in self._key_of.items()} == self._block_of
        assert set(self._idle) <= set(self._key_of)
        assert not set(self._empty) & set(self._key_of)

    def _forget_oldest(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
