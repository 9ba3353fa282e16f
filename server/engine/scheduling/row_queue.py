"""Requests that wait for rows of the policy table, because other policies hold too many of them."""

from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from operator import attrgetter

from ladimo.policy import RoutingPolicy
from server.engine.policy_table import PolicyTable
from server.engine.request import Sequence


class RowQueue:
    """The waiting sequences in order of rank. A sequence needs one row, or one for each of its phases, and takes all of them
    together. A sequence whose policies already have rows normally gets these at once.

    A row comes free when all requests under its policy have ended. New requests under that policy could keep it for ever. So
    while a sequence waits, as many rows as it lacks are closed: sequences that rank behind the first waiting one may not join
    them. In time the rows come free, and the first waiting sequence takes them.
    """

    def __init__(self, table: PolicyTable) -> None:
        self._table = table
        self._waiting: list[Sequence] = []
        self._closed: frozenset[int] = frozenset()
        self._closed_for: Sequence | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

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
        """Forget the closed rows. Called when the resident policies have changed; `take` then chooses again."""
        self._closed_for = None

    def rebind(self, sequences: Sequences[Sequence], policies: tuple[RoutingPolicy, ...]) -> bool:
        """Give sequences that have not begun other policies, one for each of their phases. They wait here, or have rows
        already. `take` must be called afterwards.

        False, and nothing changed, if a sequence that has rows cannot have those of these policies now.
        """
        holders = [sequence for sequence in sequences if sequence.rows]
        if holders and self._waiting and not self._may_join(policies):
            return False
        taken = [rows for _ in holders if (rows := self._table.acquire(policies)) is not None]
        if len(taken) < len(holders):  # all of them want the same rows, so none has got them
            return False
        for sequence, rows in zip(holders, taken, strict=True):
            self._table.release(sequence.rows)
            sequence.rows = rows
        for sequence in sequences:
            sequence.request = sequence.request.under(policies)
            sequence.block_keys.clear()  # they depend on the policies
        self.reopen()  # the first waiting sequence may lack another row now
        return True

    def take(self) -> list[Sequence]:
        """Give rows to the sequences that can have one, in order of rank. Returns these sequences.

        Must be called after every change of the queue, of the resident policies, and of the requests that hold rows.
        """
        taken: list[Sequence] = []
        left: list[Sequence] = []
        needed = False  # whether a sequence of better rank still needs a row
        for sequence in self._waiting:
            policies = sequence.request.policies
            rows = self._table.acquire(policies) if not needed or self._may_join(policies) else None
            if rows is not None:
                sequence.rows = rows
                taken.append(sequence)
                continue
            left.append(sequence)
            if not needed:
                needed = True
                if self._closed_for is not sequence:
                    self._closed, self._closed_for = self._table.rows_to_close(policies), sequence
        self._waiting = left
        if not needed:
            self._closed_for = None
        return taken

    def _may_join(self, policies: tuple[RoutingPolicy, ...]) -> bool:
        """Whether all of these policies have rows, and none of these rows is closed."""
        rows = {self._table.find(policy) for policy in policies}
        return None not in rows and not rows & self._closed
