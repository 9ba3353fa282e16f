"""The policy table: which row holds which policy version, how many requests use it, and the counters of its experts.

A policy gets a row by one small copy between two steps. Rows, masks and counters keep their addresses as long as the engine
lives, so no kernel is compiled again and no graph is captured again.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ladimo.model.config import ModelConfig
from ladimo.model.inputs import RoutingTables
from ladimo.policy import RoutingPolicy
from server.engine.messages import ExpertSnapshot, PolicyTableFull

NONE_ROW = 0


@dataclass(slots=True)
class _Row:
    policy: RoutingPolicy
    users: int = 0
    resident: bool = False
    last_used: int = 0


class PolicyTable:
    """Rows 1 .. num_rows - 1 hold policies. Row 0 is the policy "none" of padded tokens.

    A row is held while requests use it (`acquire`, `release`) or while its policy is resident (`set_resident`). A row that is
    not held keeps its policy until the row is needed for another. If all rows are resident, a request may take a resident row
    that no request uses.
    """

    def __init__(self, config: ModelConfig, num_rows: int, device: torch.device, batch_budgets: bool = False) -> None:
        assert num_rows >= 2
        self.config = config
        self.tables = RoutingTables.empty(num_rows, config.num_hidden_layers, config.max_num_experts, device, batch_budgets)
        self._rows: list[_Row | None] = [None] * num_rows
        self._by_version: dict[str, int] = {}
        self._clock = 0
        # By name: counts of rows that were reused.
        self._expert_tokens: dict[str, torch.Tensor] = {}
        self._refined: dict[str, torch.Tensor] = {}
        self._reachable: dict[str, list[set[int]]] = {}  # by name, of all versions so far: experts by layer
        self._routed_tokens: Counter[str] = Counter()

    def find(self, policy: RoutingPolicy) -> int | None:
        """The row of this policy version, if it has one."""
        return self._by_version.get(policy.version)

    def acquire(self, policies: Sequence[RoutingPolicy]) -> tuple[int, ...] | None:
        """Take a row for each of these policy versions, and write those that have none. The caller must `release` them.

        None, and nothing taken, while other policies hold too many rows. At least one row is then in use by a request.
        """
        missing = self._missing(policies)
        free = self._reusable(policies, len(missing))
        if len(free) < len(missing):
            return None
        for row, policy in zip(free, missing, strict=False):
            self._write(row, policy)
        rows = tuple(self._by_version[policy.version] for policy in policies)
        for row in set(rows):
            self._entry(row).users += 1
        return rows

    def rows_to_close(self, policies: Sequence[RoutingPolicy]) -> frozenset[int]:
        """Choose as many rows as these policies lack. When nobody uses these rows any more, `acquire` succeeds.

        It prefers rows that are not resident, then those with the fewest requests: these come free soonest.
        """
        ranked = sorted(
            (entry is not None and entry.resident, 0 if entry is None else entry.users, row)
            for row, entry in self._others(policies)
        )
        return frozenset(row for _, _, row in ranked[: len(self._missing(policies))])

    def release(self, rows: tuple[int, ...]) -> None:
        """The request that took these rows does not use them any more."""
        for row in set(rows):
            entry = self._entry(row)
            assert entry.users > 0
            entry.users -= 1
            self._clock += 1
            entry.last_used = self._clock

    def set_resident(self, policies: Sequence[RoutingPolicy]) -> None:
        """Make exactly these policies resident. Rows that requests use are kept, too.

        Raises PolicyTableFull when there are too few rows, and then changes nothing.
        """
        wanted, missing = {policy.version for policy in policies}, self._missing(policies)
        held = sum(row is not None and (row.users > 0 or row.policy.version in wanted) for row in self._rows[1:])
        if held + len(missing) > len(self._rows) - 1:
            raise PolicyTableFull(f"{held} of {len(self._rows) - 1} rows are held, {len(missing)} more are asked for")
        for row in self._rows[1:]:
            if row is not None:
                row.resident = row.policy.version in wanted
        for free, policy in zip(self._reusable(policies, len(missing)), missing, strict=False):
            self._write(free, policy)
            self._entry(free).resident = True

    def add_routed(self, num_tokens: Mapping[str, int]) -> None:
        """Count tokens that are computed, by policy name."""
        self._routed_tokens.update(num_tokens)

    def snapshot(self, call_id: int) -> ExpertSnapshot:
        """The counters since the start, read from the device. Waits for the device."""
        self.tables.settle()
        totals = self._totals(self._expert_tokens, self.tables.expert_tokens)
        distinct = self.tables.distinct_experts.tolist()
        for layer, moe in enumerate(self.config.layers):
            if moe is None:  # a dense layer counts "0 experts" in every step, which means nothing
                distinct[layer] = [0] * len(distinct[layer])
        return ExpertSnapshot(
            call_id=call_id,
            expert_tokens=totals,
            reachable={name: [sorted(layer) for layer in layers] for name, layers in self._reachable.items()},
            routed_tokens=dict(self._routed_tokens),
            distinct_experts=distinct,
            refined=self._totals(self._refined, self.tables.refined) if self.config.nested_bits else None,
        )

    def _totals(self, reused: Mapping[str, torch.Tensor], counters: torch.Tensor) -> dict[str, list[list[int]]]:
        """Counters of the table's rows by policy name, and those of the rows that were reused."""
        current, totals = counters.cpu(), {name: counts.clone() for name, counts in reused.items()}
        for row, entry in enumerate(self._rows):
            if entry is not None:
                name = entry.policy.name
                totals[name] = totals[name] + current[row] if name in totals else current[row]
        return {name: counts.tolist() for name, counts in totals.items()}

    def _entry(self, row: int) -> _Row:
        entry = self._rows[row]
        assert entry is not None
        return entry

    def _missing(self, policies: Sequence[RoutingPolicy]) -> list[RoutingPolicy]:
        """The policy versions that have no row, each once."""
        return [policy for version, policy in {p.version: p for p in policies}.items() if version not in self._by_version]

    def _others(self, policies: Sequence[RoutingPolicy]) -> list[tuple[int, _Row | None]]:
        """The rows that do not hold one of these policies."""
        kept = {NONE_ROW, *(self._by_version.get(policy.version) for policy in policies)}
        return [(row, entry) for row, entry in enumerate(self._rows) if row not in kept]

    def _reusable(self, policies: Sequence[RoutingPolicy], count: int) -> list[int]:
        """The rows that `count` further policies may get: those that hold nothing, then those that have been unused for
        longest. Resident rows are among them only if there are not enough others, whether used or not."""
        others = self._others(policies)
        too_few = sum(entry is None or not entry.resident for _, entry in others) < count
        ranked = []
        for row, entry in others:
            if entry is None:
                ranked.append((False, -1, row))
            elif entry.users == 0 and (too_few or not entry.resident):
                ranked.append((entry.resident, entry.last_used, row))
        return [row for _, _, row in sorted(ranked)]

    def _write(self, row: int, policy: RoutingPolicy) -> None:
        """Give a row that nobody uses to this policy."""
        self._clear(row)
        rows, allowed = policy.to_rows(self.config.max_num_experts)
        self.tables.write(row, rows, allowed)
        self._rows[row] = _Row(policy)
        self._by_version[policy.version] = row
        known = self._reachable.setdefault(policy.name, [set() for _ in self.config.layers])
        for before, now in zip(known, _reachable(policy, self.config), strict=True):
            before |= now

    def _clear(self, row: int) -> None:
        """Empty a row. Its counts move to the totals of its policy."""
        entry = self._rows[row]
        if entry is None:
            return
        self.tables.settle()
        name = entry.policy.name
        for kept, counters in ((self._expert_tokens, self.tables.expert_tokens), (self._refined, self.tables.refined)):
            counts = counters[row].cpu().clone()
            kept[name] = kept[name] + counts if name in kept else counts
            counters[row].zero_()
        del self._by_version[entry.policy.version]
        self._rows[row] = None


def _reachable(policy: RoutingPolicy, config: ModelConfig) -> list[set[int]]:
    """The experts that a policy may choose, by layer. Empty for dense layers."""
    found: list[set[int]] = []
    for rule, layer in zip(policy.layers, config.layers, strict=True):
        if rule is None or layer is None:
            found.append(set())
            continue
        named = range(layer.num_experts) if rule.experts is None else sorted(rule.experts)
        # Without a router every token ranks the experts by number, so only the first top_k ever run.
        found.append(set(named[: rule.top_k] if layer.router == "none" else named))
    return found
