"""Chooses a replica that has computed the beginning of a prompt before, under the same policies.

A replica keeps the keys and values of prompts by policy version. So a prompt's key begins with the version of the policy view
and with what the request asks of routing. Then come hashes of the text's pieces, each of which includes the ones before it.
"""

import hashlib
import json
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence

PIECE = 128  # characters; the engine shares blocks of 16 tokens
MAX_PIECES = 256
MAX_KEYS = 200_000
ROUTING_FIELDS = ("routing", "model", "service_tier", "cache_salt")
ROUTING_HEADERS = ("x-routing-policy", "x-routing-accuracy")
TEXT_FIELDS = ("tools", "instructions", "prompt", "messages", "input")


def prefix_keys(path: str, headers: Mapping[str, str], body: bytes, view: int) -> tuple[bytes, ...]:
    """The keys of the beginnings of a request's prompt, shortest first. Empty if the body has no text that could be shared.

    `headers`: names in lower case. `view`: the version of the policy view.
    """
    try:
        fields = json.loads(body)
    except ValueError:  # also compressed bodies; the replica answers what is wrong
        return ()
    if not isinstance(fields, dict):
        return ()
    asked = [fields.get(name) for name in ROUTING_FIELDS] + [headers.get(name) for name in ROUTING_HEADERS]
    text = json.dumps([fields[name] for name in TEXT_FIELDS if name in fields])
    key = _hash(json.dumps([view, path, asked]).encode())
    keys = []
    for start in range(0, min(len(text), MAX_PIECES * PIECE) - PIECE + 1, PIECE):
        key = _hash(key + text[start : start + PIECE].encode())
        keys.append(key)
    return tuple(keys)


class PrefixTable:
    """Which replicas have computed which prefixes. Remembers the `max_keys` keys that were used last."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._replicas: OrderedDict[bytes, dict[str, None]] = OrderedDict()

    def record(self, keys: Sequence[bytes], replica: str) -> None:
        """The replica computes the prompt with these keys."""
        for key in reversed(keys):  # the shortest prefix is used last, so it is forgotten last
            self._replicas.setdefault(key, {})[replica] = None
            self._replicas.move_to_end(key)
        while len(self._replicas) > self._max_keys:
            self._replicas.popitem(last=False)

    def matches(self, keys: Sequence[bytes]) -> dict[str, int]:
        """For each replica that has a part of the prompt, how many of the keys."""
        found: dict[str, int] = {}
        for count, key in enumerate(keys, 1):
            if key not in self._replicas:
                break
            found |= dict.fromkeys(self._replicas[key], count)
        return found


def rank(
    lengths: Mapping[str, int], matches: Mapping[str, int], balance: int, avoid: frozenset[str] = frozenset()
) -> list[list[str]]:
    """The replicas in groups, best group first. Within a group, the shortest queue is best.

    First come those that have the longest part of the prompt, but only if their queue is at most `balance` requests longer than
    the shortest one. Those to `avoid` come last. `lengths`: the length of each replica's queue.
    """
    names = random.sample(sorted(lengths), len(lengths))  # so that equal queues are not always served by the same replica
    usable = [name for name in names if name not in avoid]
    shortest = min((lengths[name] for name in usable), default=0)
    near = {name: matches.get(name, 0) for name in usable if lengths[name] <= shortest + balance}
    longest = max(near.values(), default=0)
    best = [name for name in near if longest and near[name] == longest]
    groups = [best, [name for name in usable if name not in best], [name for name in names if name in avoid]]
    return [group for group in groups if group]


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
