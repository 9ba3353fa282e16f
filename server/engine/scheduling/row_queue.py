"""Requests that wait for a row of the policy table, because other policies hold every row."""

from bisect import insort
from operator import attrgetter

from server.engine.policy_table import PolicyTable
from server.engine.request import Sequence


class RowQueue:
    """The waiting sequences in order of rank. A sequence whose policy already has a row normally gets that row at once.

    A row comes free when all requests under its policy have ended. New requests under that policy could keep it for ever. So
    while a sequence waits, one row is closed: sequences that rank behind the first waiting one may not join it. In time the row
    comes free, and the first waiting sequence takes it.
    """

    def __init__(self, table: PolicyTable) -> None:
        self._table = table
        self._waiting: list[Sequence] = []
        self._closed: int | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Add a sequence. `take` must be called afterwards."""
        insort(self._waiting, sequence, key=attrgetter("rank"))

    def remove(self, request_id: str) -> Sequence | None:
        """Remove a request and return its sequence; None if it does not wait here."""
        for sequence in self._waiting:
            if sequence.request.request_id == request_id:
                self._waiting.remove(sequence)
                return sequence
        return None

    def reopen(self) -> None:
        """Forget the closed row. Called when the resident policies have changed; `take` then chooses again."""
        self._closed = None

    def take(self) -> list[Sequence]:
        """Give rows to the sequences that can have one, in order of rank. Returns these sequences.

        Must be called after every change of the queue, of the resident policies, and of the requests that hold rows.
        """
        taken: list[Sequence] = []
        left: list[Sequence] = []
        needed = False  # whether a sequence of better rank still needs a row
        for sequence in self._waiting:
            policy = sequence.request.policy
            known = self._table.find(policy)
            row = None if needed and known in (None, self._closed) else self._table.acquire(policy)
            if row is not None:
                if known is None:  # the first waiting sequence has got its row
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
