"""Ray Serve's request router for the replicas. It runs in the gateway."""

from typing import Any

from ray.serve.request_router import RequestRouter

from deploy.ray.affinity import PrefixTable, rank


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # ray has no types
    """Prefers the replica that has a request's prefix, within a bound on the queues. See `affinity.rank`."""

    def initialize_state(self, balance: int) -> None:
        self._balance = balance
        self._table = PrefixTable()

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        keys, avoid = _wish(pending_request)
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        # A length that is not known counts as 0. Serve asks the replica itself before it relies on that.
        lengths = {name: self.replica_queue_len_cache.get(one.replica_id) or 0 for name, one in replicas.items()}
        ranked = rank(lengths, self._table.matches(keys), self._balance, avoid)
        return [[replicas[name] for name in group] for group in ranked]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        self._table.record(_wish(pending_request)[0], replica_id.unique_id)


def _wish(pending_request: Any) -> tuple[tuple[bytes, ...], frozenset[str]]:
    """The keys of a request's prompt, and the replicas to avoid. Only HTTP requests have them."""
    call = pending_request.args[0] if pending_request is not None and pending_request.args else None
    return getattr(call, "keys", ()), getattr(call, "avoid", frozenset())
