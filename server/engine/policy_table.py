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

    def acquire(self, policy: RoutingPolicy) -> int | None:
        """Take the row of this policy version, and write it first if it has none. The caller must `release` it.

        None while other policies hold every row. At least one row is then in use by a request.
        """
        row = self.find(policy)
        if row is None:
            row = self._write(policy)
        if row is not None:
            self._entry(row).users += 1
        return row

    def row_to_close(self) -> int:
        """Choose the row to close to new requests. Called only while every row is held.

        It prefers rows that are not resident, then those with the fewest requests: these come free soonest.
        """
        held = [(entry.resident, entry.users, row) for row, entry in enumerate(self._rows) if entry is not None and entry.users]
        return min(held)[2]

    def release(self, row: int) -> None:
        """One request less uses the row."""
        entry = self._entry(row)
        assert entry.users > 0
        entry.users -= 1
        self._clock += 1
        entry.last_used = self._clock

    def set_resident(self, policies: Sequence[RoutingPolicy]) -> None:
        """Make exactly these policies resident. Rows that requests use are kept, too.

        Raises PolicyTableFull when there are too few rows, and then changes nothing.
        """
        wanted = {policy.version: policy for policy in policies}
        missing = [policy for version, policy in wanted.items() if version not in self._by_version]
        held = sum(row is not None and (row.users > 0 or row.policy.version in wanted) for row in self._rows[1:])
        if held + len(missing) > len(self._rows) - 1:
            raise PolicyTableFull(f"{held} of {len(self._rows) - 1} rows are held, {len(missing)} more are asked for")
        for row in self._rows[1:]:
            if row is not None:
                row.resident = row.policy.version in wanted
        for policy in missing:
            written = self._write(policy)
            assert written is not None
            self._entry(written).resident = True

    def add_routed(self, row: int, num_tokens: int) -> None:
        """Count tokens that are computed under the policy of the row."""
        self._routed_tokens[self._entry(row).policy.name] += num_tokens

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

    def _write(self, policy: RoutingPolicy) -> int | None:
        row = self._take_row()
        if row is None:
            return None
        rows, allowed = policy.to_rows(self.config.max_num_experts)
        self.tables.write(row, rows, allowed)
        self._rows[row] = _Row(policy)
        self._by_version[policy.version] = row
        known = self._reachable.setdefault(policy.name, [set() for _ in self.config.layers])
        for before, now in zip(known, _reachable(policy, self.config), strict=True):
            before |= now
        return row

    def _take_row(self) -> int | None:
        """An empty row, or the row that has been unused for longest; None if every row is held.

        The counts of a reused row move to the totals of its policy.
        """
        rows = [(row, entry) for row, entry in enumerate(self._rows) if row != NONE_ROW]
        free = [(-1, row) for row, entry in rows if entry is None]
        all_resident = all(entry is not None and entry.resident for _, entry in rows)
        idle = [
            (entry.last_used, row)
            for row, entry in rows
            if entry is not None and entry.users == 0 and (all_resident or not entry.resident)
        ]
        if not free and not idle:
            return None
        row = min(free or idle)[1]
        entry = self._rows[row]
        if entry is not None:
            self.tables.settle()
            name = entry.policy.name
            for kept, counters in ((self._expert_tokens, self.tables.expert_tokens), (self._refined, self.tables.refined)):
                counts = counters[row].cpu().clone()
                kept[name] = kept[name] + counts if name in kept else counts
                counters[row].zero_()
            del self._by_version[entry.policy.version]
            self._rows[row] = None
        return row


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
