"""Everything one forward pass reads besides the weights. Nothing is ambient.

Legend: T tokens in the step, B sequences, N blocks per sequence, L layers, E experts (the most any layer has), P policies.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PrefillSegment:
    """A run of prompt tokens of one sequence: rows `start : start + length` of the step, sequence `row` of the block table.

    `context_len` counts the sequence's tokens up to and including the segment's last.
    """

    row: int
    start: int
    length: int
    context_len: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step: the first `num_decode` tokens continue one sequence each (rows 0 .. num_decode - 1 of the block table), the
    rest are prefill segments. With `block_table` None the step is `num_sequences` whole sequences of equal length and
    uses no cache (conversion and evaluation).

    Example, block size 4, one decoding sequence of 6 tokens and a prompt of 3:
    input_ids [17, 5, 6, 7]  positions [5, 0, 1, 2]  block_table [[3, 4], [9, 0]]  context_lens [6, 3]
    slot_mapping [17, 36, 37, 38] (= block * 4 + offset)  num_decode 1  prefill (PrefillSegment(1, 1, 3, 3),)
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    policy_ids: Tensor  # [T] int64, rows of the routing tables; 0 is the policy "none" of padded rows
    slot_mapping: Tensor | None = None  # [T] int64
    block_table: Tensor | None = None  # [B, N] int64, unused places point to the null block 0
    context_lens: Tensor | None = None  # [B] int64
    num_decode: int = 0
    prefill: tuple[PrefillSegment, ...] = ()
    num_sequences: int = 0
    logit_indices: Tensor | None = None  # [R] int64, tokens whose logits are wanted; None = all

    @classmethod
    def whole_sequences(cls, input_ids: Tensor, policy_id: int = 1) -> "StepInputs":
        """Inputs for `input_ids` [B, S] without a cache, every token under one policy row."""
        batch, length = input_ids.shape
        flat = input_ids.reshape(-1)
        return cls(
            input_ids=flat,
            positions=torch.arange(length, device=flat.device).repeat(batch),
            policy_ids=torch.full_like(flat, policy_id),
            num_sequences=batch,
        )


@dataclass(frozen=True, slots=True)
class RoutingTables:
    """The resident policies and what they have done, at fixed addresses.

    Row 0 is the policy "none": it keeps no expert and is what padded rows run under. Counters are only ever added to.
    """

    rows: Tensor  # [P, L, 4] float32: top_k, mass, floor, renormalize
    allowed: Tensor  # [P, L, E] bool
    expert_tokens: Tensor  # [P, L, E] int64: times an expert was chosen under a policy
    distinct_experts: Tensor  # [L, E + 1] int64: steps in which exactly n experts of the layer were chosen

    @classmethod
    def empty(cls, num_policies: int, num_layers: int, num_experts: int, device: torch.device | str) -> "RoutingTables":
        return cls(
            rows=torch.zeros(num_policies, num_layers, 4, device=device),
            allowed=torch.zeros(num_policies, num_layers, num_experts, dtype=torch.bool, device=device),
            expert_tokens=torch.zeros(num_policies, num_layers, num_experts, dtype=torch.int64, device=device),
            distinct_experts=torch.zeros(num_layers, num_experts + 1, dtype=torch.int64, device=device),
        )

    def write(self, row: int, rows: list[list[float]], allowed: list[list[bool]]) -> None:
        """Publish `RoutingPolicy.to_rows(E)` in one table row; steps already launched have read the old content."""
        self.rows[row].copy_(torch.tensor(rows, dtype=torch.float32))
        self.allowed[row].copy_(torch.tensor(allowed, dtype=torch.bool))

    def record(self, expert_ids: Tensor, policy_ids: Tensor) -> None:
        """Count one step's choices: expert_ids [L, T, K] (-1 = no expert), policy_ids [T]. No host synchronisation."""
        num_layers, num_tokens, num_places = expert_ids.shape
        num_experts = self.allowed.shape[2]
        kept = (expert_ids >= 0).to(torch.int64)
        layer = torch.arange(num_layers, device=expert_ids.device).view(-1, 1, 1)
        expert = expert_ids.clamp(min=0)
        flat = (policy_ids.view(1, -1, 1) * num_layers + layer) * num_experts + expert
        self.expert_tokens.view(-1).index_add_(0, flat.view(-1), kept.view(-1))
        hits = torch.zeros(num_layers * num_experts, dtype=torch.int64, device=expert_ids.device)
        hits.index_add_(0, (layer * num_experts + expert).view(-1), kept.view(-1))
        distinct = (hits.view(num_layers, num_experts) > 0).sum(dim=1, keepdim=True)
        self.distinct_experts.scatter_add_(1, distinct, torch.ones_like(distinct))
