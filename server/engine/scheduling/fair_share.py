"""Fair queueing: the waiting flow that has been served least goes first.

This is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588, algorithm 2).
Each flow has a counter of the tokens that were computed and generated for it. The waiting flow with the smallest counter goes
first. When a flow returns, its counter is raised to the smallest counter of the flows that are present. So nobody saves up
turns by staying away.
"""

from collections import Counter

PROMPT_COST, OUTPUT_COST = 1, 2  # per token, as in the paper; prompt tokens cost less because many are computed at a time


class FairShare:
    """The counters of all flows. A flow is an API key or a user. It is present while a sequence of it waits or runs."""

    def __init__(self) -> None:
        self._present: Counter[str] = Counter()
        self._served: dict[str, int] = {}

    @property
    def num_flows(self) -> int:
        """The number of flows that are present."""
        return len(self._present)

    def enter(self, flow: str) -> None:
        """One more sequence of the flow."""
        if flow not in self._present:
            self._served[flow] = max(self._served.get(flow, 0), self._least())
        self._present[flow] += 1

    def leave(self, flow: str) -> None:
        """One sequence less. The counter of an absent flow is kept as long as a flow with a smaller counter is present."""
        self._present[flow] -= 1
        if not self._present[flow]:
            del self._present[flow]
            present, least = self._present, self._least()
            self._served = {
                name: count for name, count in self._served.items() if name in present or (present and count > least)
            }

    def charge(self, flow: str, cost: int) -> None:
        """Add to the flow's counter. The flow must be present."""
        self._served[flow] += cost

    def served(self, flow: str) -> int:
        """The flow's counter. The flow must be present."""
        return self._served[flow]

    def _least(self) -> int:
        return min((self._served[flow] for flow in self._present), default=0)
