"""Requests that wait for a row of the policy table: every row is held by requests under other policies."""

from bisect import insort
from operator import attrgetter

from server.engine.policy_table import PolicyTable
from server.engine.request import Sequence


class RowQueue:
    """Waiting sequences in order of rank. A sequence whose policy has a row already does not wait for one.

    Rows come free when the requests under their policy end. So that new requests cannot hold every row for ever, one row is
    closed while a sequence waits: sequences that rank behind the first that needs a row may not join the closed one. It
    empties, and the first takes it.
    """

    def __init__(self, table: PolicyTable) -> None:
        self._table = table
        self._waiting: list[Sequence] = []
        self._closed: int | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=attrgetter("rank"))

    def remove(self, request_id: str) -> Sequence | None:
        """Forget a request; None when it does not wait here."""
        for sequence in self._waiting:
            if sequence.request.request_id == request_id:
                self._waiting.remove(sequence)
                return sequence
        return None

    def reopen(self) -> None:
        """Which policies are resident has changed: the row to close is chosen again."""
        self._closed = None

    def take(self) -> list[Sequence]:
        """Give rows to those who can have one, in order of rank, and let them go. To be called after every change: of the
        queue, of the policies that are resident, and of the requests that hold rows."""
        taken: list[Sequence] = []
        left: list[Sequence] = []
        needed = False  # by one that ranks before
        for sequence in self._waiting:
            policy = sequence.request.policy
            known = self._table.find(policy)
            row = None if needed and known in (None, self._closed) else self._table.acquire(policy)
            if row is not None:
                if known is None:  # the first in need has what it waited for
                    self._closed = None
                sequence.policy_row = row
                taken.append(sequence)
                continue
            left.append(sequence)
            if not needed:
                needed = True
                if self._closed is None:
                    self._closed = self._table.row_to_close()
        self._waiting = left
        if not needed:
            self._closed = None
        return taken
