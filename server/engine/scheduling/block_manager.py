"""Which KV block belongs to whom, and which hold a prefix that can be used again. Integers and hashes only.

Block 0 is the null block that padding writes to and is never handed out. A full block may be published under a key that stands
for every token up to its end; sequences that begin with the same tokens then share it. Nobody writes to a full block, so
sharing needs no copy. A block that nobody holds keeps its content until the place is needed, oldest first.
"""

from collections import OrderedDict
from collections.abc import Sequence


class BlockManager:
    """Reference counts over blocks 1 .. num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2
        self.num_blocks, self.block_size = num_blocks, block_size
        self._empty = list(range(num_blocks - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, held by nobody; oldest first
        self._users = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._idle)

    @property
    def usage_ratio(self) -> float:
        """Share of blocks that some sequence holds."""
        return 1 - self.num_free / (self.num_blocks - 1)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def extend(self, block_table: list[int], num_tokens: int) -> bool:
        """Grow `block_table` until it holds `num_tokens`; False, and nothing taken, when there are too few free blocks."""
        missing = self.blocks_for(num_tokens) - len(block_table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._empty.pop() if self._empty else self._forget_oldest()
            self._users[block] = 1
            block_table.append(block)
        return True

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The published blocks of the longest run of keys from the first on. Nothing is taken yet."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of these count as free until they are held."""
        return sum(self._users[block] == 0 for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """One more user for each of these published blocks."""
        for block in blocks:
            if self._users[block] == 0:
                del self._idle[block]
            self._users[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """The block is full and stands for `key`; when another block does already, that one stays the one to share."""
        assert self._users[block] > 0
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def release(self, block_table: list[int]) -> None:
        """Give up every block of the table and empty it. Later blocks are forgotten before earlier ones."""
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
        """Assert that these tables are all that is held, and that no block is lost, or both free and held."""
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
