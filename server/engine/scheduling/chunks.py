"""How many prompt tokens a step may have, so that the sequences that decode beside them do not wait too long.

    a step with prompts takes: base + decoding rows * what one takes + prompt tokens * what one takes

All three are learned from the steps. This file has no clock: the engine passes in how long each step took.
"""

import logging
from collections import deque
from collections.abc import Sequence
from itertools import combinations
from statistics import median

FIRST = 128  # prompt tokens while nothing is known
MOST = 2048  # more hardly compute faster, and hold memory
# A step in which nothing decodes may take so many times as long: only requests that arrive meanwhile wait for it.
ALONE = 4
RECENT = 16  # steps with prompts that count
APART = 1.5  # two steps tell what a token takes if one has so many times the tokens of the other
PROBE = 4  # one in so many steps with prompts has half of the tokens. Steps that are all alike would tell nothing.
FADING = 0.98  # the weight of a step that only decodes after one more

logger = logging.getLogger(__name__)


class ChunkSizes:
    """Chooses the prompt tokens of a step. They are whole blocks of the KV cache, at least one.

    seconds: what a step may take while sequences decode. Where a step takes more than half of that without its prompt tokens,
    these may double its time: else a prompt would take one block per step for ever. block_size: tokens. most: tokens for which
    the step has memory.
    """

    def __init__(self, seconds: float, block_size: int, most: int) -> None:
        self.seconds, self.block_size, self.most = seconds, block_size, most
        self._prompts: deque[tuple[int, int, float]] = deque(maxlen=RECENT)  # rows, prompt tokens and seconds of a step
        self._base, self._token = 0.0, 0.0  # seconds, by these steps
        self._seen = 0
        # Sums over steps that only decode: number, rows, rows squared, seconds, rows times seconds.
        self._decode = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._said = 0  # the size that was logged last

    def tokens(self, rows: int) -> int:
        """The prompt tokens of the next step, in which so many sequences decode."""
        size = self.size(rows)
        if self._seen % PROBE < PROBE - 1:
            return size
        return self._in_blocks(size / 2 if size > self.block_size else 2 * size)

    def size(self, rows: int) -> int:
        """The prompt tokens by what is known."""
        chosen: float = FIRST
        if self._prompts:
            others = self._base + self._row_seconds * rows
            left = max(self.seconds * (1 if rows else ALONE), 2 * others) - others
            # Noise can make a token look free. So sizes grow step by step.
            most = max(FIRST, 2 * max(tokens for _, tokens, _ in self._prompts))
            chosen = min(left / max(self._token, 1e-9), most)
        return self._in_blocks(chosen)

    def _in_blocks(self, tokens: float) -> int:
        return max(int(min(tokens, self.most)) // self.block_size, 1) * self.block_size

    def observe(self, rows: int, tokens: int, seconds: float) -> None:
        """Learn from a step that decoded so many rows and computed so many prompt tokens."""
        if tokens:
            self._seen += 1
            self._prompts.append((rows, tokens, seconds))
            row = self._row_seconds
            self._base, self._token = fit_line([(count, max(taken - row * n, 0.0)) for n, count, taken in self._prompts])
            self._say()
        else:
            new = (1.0, rows, rows * rows, seconds, rows * seconds)
            number, total, squares, taken, products = (
                FADING * old + added for old, added in zip(self._decode, new, strict=True)
            )
            self._decode = (number, total, squares, taken, products)

    @property
    def _row_seconds(self) -> float:
        """What one more decoding row takes, by least squares; 0 while all steps had the same number."""
        number, total, squares, seconds, products = self._decode
        spread = number * squares - total * total
        return max((number * products - total * seconds) / spread, 0.0) if spread > 1e-6 * number * squares else 0.0

    def _say(self) -> None:
        """Log the size when it has changed by more than a factor of two."""
        size = self.size(1)
        if not self._said / 2 <= size <= self._said * 2:
            self._said = size
            logger.info(
                "prompts are now computed %d tokens at a time beside one that decodes, and %d at a time if none does",
                *(size, self.size(0)),
            )


def fit_line(steps: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """What a step takes by itself, and per token, from pairs of tokens and seconds.

    The medians of the slopes between pairs of steps and of what then remains (Theil and Sen). So a few steps that were held up
    count for nothing, such as the first ones of a GPU, which compile kernels. While the numbers of tokens are alike, the steps
    cannot tell the two apart, and all time counts as that of the tokens.
    """
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(steps, 2) if max(a[0], b[0]) >= APART * min(a[0], b[0])]
    slope = median(slopes) if slopes else 0.0
    base = median(seconds - slope * tokens for tokens, seconds in steps)
    if slope <= 0 or base < 0:
        return 0.0, median(seconds / tokens for tokens, seconds in steps)
    return base, slope
