"""Whose turn it is among those who share the engine: the flow that has been served least.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588, algorithm 2): every
token computed or generated for a flow is added to its counter, and the waiting flow with the smallest goes first. A flow that
comes back counts at least as much as the least served one present, so that nobody saves up turns by being away.
"""

from collections import Counter

PROMPT_COST, OUTPUT_COST = 1, 2  # per token, as in the paper: prompt tokens are computed many at a time


class FairShare:
    """A flow is anybody's name; it is present while it has a sequence that waits or runs."""

    def __init__(self) -> None:
        self._present: Counter[str] = Counter()
        self._served: dict[str, int] = {}

    @property
    def num_flows(self) -> int:
        return len(self._present)

    def enter(self, flow: str) -> None:
        """One more sequence of the flow."""
        if flow not in self._present:
            self._served[flow] = max(self._served.get(flow, 0), self._least())
        self._present[flow] += 1

    def leave(self, flow: str) -> None:
        """One sequence less. What an absent flow has been served is remembered while somebody present has been served less."""
        self._present[flow] -= 1
        if not self._present[flow]:
            del self._present[flow]
            present, least = self._present, self._least()
            self._served = {
                name: count for name, count in self._served.items() if name in present or (present and count > least)
            }

    def charge(self, flow: str, cost: int) -> None:
        self._served[flow] += cost

    def served(self, flow: str) -> int:
        return self._served[flow]

    def _least(self) -> int:
        return min((self._served[flow] for flow in self._present), default=0)
