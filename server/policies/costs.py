"""What the engine's steps cost, learned online from how long they took.

    a step that decodes:    base + weights * W + rows * row + P * priced_row
    and computes a prompt:  chunk + tokens * token + P * priced_token

A policy's price, 0 to 1, is the share of weight bytes or of active parameters that it reads. W is the sum of the prices of the
step's policies, and P the sum of the prices of its rows or prompt tokens. The coefficients are seconds. They are fitted by
least squares, are never negative, and old steps fade. The two parts are learned apart: decoding from steps that only decode,
prompts from what decoding does not explain.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

FADING = 0.999  # the weight of a step after one more step
# Among solutions that fit equally well, take the one with the smallest coefficients. While only one policy has run, this counts
# half of the cost as independent of the price.
RIDGE = 1e-6
ROWS, CHUNK = 64, 512  # units of rows and of prompt tokens: with them, all features are of similar size
BUFFER = 64  # observations that are added at once; while there are fewer in all, each is added when it is needed
REFIT = 512  # new observations that are worth a new solution; a fifth more than before is enough while there are few


class Fit:
    """Least squares with non-negative coefficients over fading observations of `size` features."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self._gram: NDArray[np.float64] = np.zeros((size, size))
        self._moments: NDArray[np.float64] = np.zeros(size)
        self._solution: NDArray[np.float64] = np.zeros(size)
        self._solved_at = 0
        self._new: list[tuple[float, ...]] = []  # features and value

    def observe(self, features: tuple[float, ...], value: float) -> None:
        self.count += 1
        self._new.append((*features, value))
        if len(self._new) >= BUFFER:
            self._absorb()

    @property
    def coefficients(self) -> NDArray[np.float64]:
        """All 0 before the first observation. The newest observations may be missing."""
        if self._new and self.count < BUFFER:
            self._absorb()
        return self._solution

    def _absorb(self) -> None:
        new = np.array(self._new)
        weights = FADING ** np.arange(len(new) - 1, -1, -1)
        features, values = new[:, :-1], new[:, -1] * weights
        fading = FADING ** len(new)
        self._gram = fading * self._gram + (features.T * weights) @ features
        self._moments = fading * self._moments + values @ features
        self._new = []
        if self.count >= min(1.2 * self._solved_at, self._solved_at + REFIT):
            self._solution, self._solved_at = self._solve(), self.count

    def _solve(self) -> NDArray[np.float64]:
        """Try every set of coefficients that are not 0. There are few."""
        size = len(self._moments)
        gram = self._gram + RIDGE * max(self._gram.trace(), 1e-12) * np.eye(size)
        best, lowest = np.zeros(size), 0.0
        for chosen in (list(some) for number in range(1, size + 1) for some in combinations(range(size), number)):
            found = np.linalg.solve(gram[np.ix_(chosen, chosen)], self._moments[chosen])
            error = -float(found @ self._moments[chosen])  # the squared error, but for a constant
            if error < lowest and (found >= 0).all():
                best, lowest = np.zeros(size), error
                best[chosen] = found
        return best


@dataclass(frozen=True, slots=True)
class Demand:
    """What clients ask for: sequences per second, and the mean lengths of a sequence in tokens. Cached prompt tokens do not
    count."""

    sequences_per_second: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0


class StepCosts:
    """The two fits, and what follows from them for sequences that all have the same price. Results are in seconds.

    chunk_tokens: how many prompt tokens one step takes at most.
    """

    def __init__(self) -> None:
        self.chunk_tokens: float = CHUNK
        self._decode, self._prefill = Fit(4), Fit(3)
        self._prices: set[float] = set()  # of the steps that decoded

    @property
    def prices_known(self) -> bool:
        """Whether steps of different prices have been seen. Until then, what another price would cost is a guess."""
        return len(self._prices) > 1

    @property
    def known(self) -> bool:
        """Whether a step that only decodes has been seen."""
        return self._decode.count > 0

    def observe(self, rows: Mapping[float, int], tokens: Mapping[float, int], seconds: float) -> None:
        """Learn from one step. `rows` and `tokens`: decoding rows and prompt tokens, by price."""
        decode = _decode_features(rows)
        self._prices |= rows.keys()
        if not tokens:
            self._decode.observe(decode, seconds)
        elif self.known or not rows:
            left = max(seconds - float(np.dot(self._decode.coefficients, decode)), 0.0) if rows else seconds
            self._prefill.observe(_prefill_features(tokens), left)

    def mixed_seconds(self, rows: Mapping[float, int], tokens: Mapping[float, int]) -> float:
        """One step with these decoding rows and prompt tokens, by price."""
        decode = float(np.dot(self._decode.coefficients, _decode_features(rows))) if rows else 0.0
        return decode + (float(np.dot(self._prefill.coefficients, _prefill_features(tokens))) if tokens else 0.0)

    def step_seconds(self, rows: int, price: float) -> float:
        """One step that decodes so many rows."""
        return float(np.dot(self._decode.coefficients, _decode_features({price: rows}))) if rows else 0.0

    def prompt_seconds(self, tokens: float, price: float) -> float:
        """The prompt part of so many prompt tokens."""
        chunk, token, priced = self._prefill.coefficients
        return float(chunk * np.ceil(tokens / self.chunk_tokens) + tokens / CHUNK * (token + priced * price))

    def sequence_seconds(self, demand: Demand, batch: int, price: float) -> float:
        """The engine's time for one sequence when `batch` sequences share every step."""
        share = self.step_seconds(batch, price) / batch
        return self.prompt_seconds(demand.prompt_tokens, price) + demand.output_tokens * share

    def utilisation(self, demand: Demand, batch: int, price: float) -> float:
        """Seconds of work that arrive per second. From 1 on, the queue grows without end."""
        return demand.sequences_per_second * self.sequence_seconds(demand, batch, price)

    def token_seconds(self, demand: Demand, batch: int, price: float) -> float:
        """The mean time between two tokens of a sequence once the batch is as large as the demand makes it.

        A step of n rows takes f + n * g, and by Little's law n = rate * output tokens * step. Prompts take their share of the
        time. So a step takes f / (1 - share of rows - share of prompts), and at most what a full batch takes.
        """
        one, full = self.step_seconds(1, price), self.step_seconds(batch, price)
        row = (full - one) / max(batch - 1, 1)
        tokens_per_second = demand.sequences_per_second * demand.output_tokens
        prompts = min(demand.sequences_per_second * self.prompt_seconds(demand.prompt_tokens, price), 0.99)
        left = 1 - tokens_per_second * row - prompts
        most = full / (1 - prompts)
        return min((one - row) / left, most) if left > 0 else most


def _decode_features(rows: Mapping[float, int]) -> tuple[float, ...]:
    total, priced = sum(rows.values()), sum(price * count for price, count in rows.items())
    return 1.0, sum(rows.keys()), total / ROWS, priced / ROWS


def _prefill_features(tokens: Mapping[float, int]) -> tuple[float, ...]:
    total, priced = sum(tokens.values()), sum(price * count for price, count in tokens.items())
    return 1.0, total / CHUNK, priced / CHUNK
