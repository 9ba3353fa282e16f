"""The inputs of a forward pass besides the weights and the KV cache, and its outputs. There is no global state.

Legend: T tokens in the step, R tokens whose logits are wanted, V vocabulary, B sequences, N blocks per sequence, L layers,
E experts (of the largest layer), K places per token, P policies (rows of the policy table), G = REFINED_GROUPS.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ladimo.model.precision import REFINED_GROUPS
from ladimo.model.rule import RuleNumber

# On a CPU it takes tens of microseconds to count the choices of a decode step, and most of this is the overhead of calls. To
# count many steps together takes hardly longer. A step with many tokens is counted at once, because it holds memory.
MAX_DEFERRED_STEPS = 64
MAX_DEFERRED_TOKENS = 64


@dataclass(frozen=True, slots=True)
class PrefillSegment:
    """Consecutive prompt tokens of one sequence: the tokens `start : start + length` of the step.

    `row` is the sequence's row in the block table. `context_len` is the number of its tokens up to the end of the segment.
    """

    row: int
    start: int
    length: int
    context_len: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of one step. The first `num_decode` tokens each continue one sequence, in rows 0 .. num_decode - 1 of the
    block table. The other tokens are prefill segments.

    If `block_table` is None, the step has `num_sequences` whole sequences of equal length and uses no cache. Conversion and
    evaluation use this form.

    Example with block size 4: one decoding sequence of 6 tokens and a prompt of 3.
    input_ids [17, 5, 6, 7]  positions [5, 0, 1, 2]  block_table [[3, 4], [9, 0]]  context_lens [6, 3]
    slot_mapping [17, 36, 37, 38] (= block * 4 + offset)  num_decode 1  prefill (PrefillSegment(1, 1, 3, 3),)
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    policy_ids: Tensor  # [T] int64, rows of the routing tables; 0 is the policy "none" of padding
    slot_mapping: Tensor | None = None  # [T] int64
    block_table: Tensor | None = None  # [B, N] int64; unused places hold 0, the null block
    context_lens: Tensor | None = None  # [B] int64
    num_decode: int = 0
    prefill: tuple[PrefillSegment, ...] = ()
    num_sequences: int = 0
    logit_indices: Tensor | None = None  # [R] int64, the tokens whose logits are wanted; None = all

    @classmethod
    def whole_sequences(cls, input_ids: Tensor, policy_id: int = 1) -> "StepInputs":
        """Inputs for whole sequences `input_ids` [B, S] without a cache. All tokens run under one row of the policy table."""
        batch, length = input_ids.shape
        flat = input_ids.reshape(-1)
        return cls(
            input_ids=flat,
            positions=torch.arange(length, device=flat.device).repeat(batch),
            policy_ids=torch.full_like(flat, policy_id),
            num_sequences=batch,
        )

    @property
    def length(self) -> int:
        """The tokens of each sequence, if they are whole sequences."""
        return len(self.input_ids) // self.num_sequences


class StepOutput(NamedTuple):
    """The outputs of one step."""

    logits: Tensor  # [R, V]
    expert_ids: Tensor | None  # [L, T, E]; -1 = no expert, so a dense layer has only -1; None for a dense model
    # [L + 1, T, G]: the neurons of each layer, and the words of the output head, that were read at 8 bits instead of 4. None if
    # the weights are not nested. See `ladimo.model.nested.refinement`.
    refined: Tensor | None = None

    @property
    def refined_counts(self) -> Tensor | None:
        """How many neurons of each layer, and words, each token refined: [L + 1, T] int64."""
        return None if self.refined is None else self.refined.sum(dim=-1)


def refined_rows(refined_counts: Tensor, neuron_rows: int) -> Tensor:
    """`StepOutput.refined_counts` [L + 1, T] -> the rows of weights that each token refined, [T] int64: so many of a neuron
    (`ModelConfig.neuron_rows`), one of a word."""
    return neuron_rows * refined_counts[:-1].sum(dim=0) + refined_counts[-1]


@dataclass(frozen=True, slots=True)
class RoutingTables:
    """The rules of the policies in the table, and the counters of their experts. All tensors keep their addresses.

    Row 0 is the policy "none" for padding: it keeps no expert.
    """

    rows: Tensor  # [P, L + 1, len(RuleNumber)] float32: the numbers of each rule in the order of RuleNumber, then the head's
    allowed: Tensor  # [P, L, E] bool: the experts that may be chosen
    expert_tokens: Tensor  # [P, L, E] int64: how often the expert was chosen under the policy
    distinct_experts: Tensor  # [L, E + 1] int64: steps in which exactly n experts of the layer ran
    refined: Tensor  # [P, L + 1, G] int64: the neurons of the layers, and the words, that were refined under the policy
    batch_budgets: bool = False  # whether batch_experts has an effect; an option of the engine
    _deferred: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def empty(
        cls, num_policies: int, num_layers: int, num_experts: int, device: torch.device | str, batch_budgets: bool = False
    ) -> "RoutingTables":
        """Tables in which every row is the policy "none". See `batch_budgets` above."""
        return cls(
            rows=torch.zeros(num_policies, num_layers + 1, len(RuleNumber), device=device),
            allowed=torch.zeros(num_policies, num_layers, num_experts, dtype=torch.bool, device=device),
            expert_tokens=torch.zeros(num_policies, num_layers, num_experts, dtype=torch.int64, device=device),
            distinct_experts=torch.zeros(num_layers, num_experts + 1, dtype=torch.int64, device=device),
            refined=torch.zeros(num_policies, num_layers + 1, REFINED_GROUPS, dtype=torch.int64, device=device),
            batch_budgets=batch_budgets,
        )

    def write(self, row: int, rows: list[list[float]], allowed: list[list[bool]]) -> None:
        """Write `RoutingPolicy.to_rows(E)` into one row. Steps that were launched before still use the old content."""
        for target, values in ((self.rows[row], rows), (self.allowed[row], allowed)):
            host = torch.tensor(values, dtype=target.dtype)
            # Pinned, so that the host does not wait for the steps that are running on the device.
            target.copy_(host.pin_memory() if target.is_cuda else host, non_blocking=True)

    def rules(self, policy_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rules [T, L + 1, len(RuleNumber)] and masks [T, L, E] of each token, gathered once for all layers of a step."""
        return self.rows[policy_ids], self.allowed[policy_ids]

    def record(self, expert_ids: Tensor, policy_ids: Tensor) -> None:
        """Count the choices of one step: expert_ids [L, T, K] (-1 = no expert), policy_ids [T]. Does not wait for the
        device."""
        kept = (expert_ids >= 0).to(torch.int64)
        layer = torch.arange(expert_ids.shape[0], device=expert_ids.device).view(-1, 1, 1)
        step = torch.zeros_like(policy_ids)
        self._count(layer, expert_ids.clamp(min=0), policy_ids.view(1, -1, 1), step.view(1, -1, 1), kept, num_steps=1)

    def record_refined(self, refined: Tensor, policy_ids: Tensor) -> None:
        """Count what one step refined: `StepOutput.refined` [L + 1, T, G], policy_ids [T]. Does not wait for the device."""
        self.refined.index_add_(0, policy_ids, refined.transpose(0, 1).to(torch.int64))

    def defer(self, expert_ids: Tensor, policy_ids: Tensor) -> None:
        """Count the choices of one step later, in `settle`, together with other steps. Arguments are those of `record`.

        For tensors on the host only. They must not change until then.
        """
        self._deferred.append((expert_ids, policy_ids))
        if len(self._deferred) == MAX_DEFERRED_STEPS or expert_ids.shape[1] >= MAX_DEFERRED_TOKENS:
            self.settle()

    def settle(self) -> None:
        """Count all deferred steps. Must be called before the counters are read, and before a row gets another policy."""
        if not self._deferred:
            return
        steps = list(self._deferred)
        self._deferred.clear()
        expert_ids = torch.cat([ids for ids, _ in steps], dim=1)
        policy_ids = torch.cat([ids for _, ids in steps])
        step = torch.arange(len(steps)).repeat_interleave(torch.tensor([len(ids) for _, ids in steps]))
        layer, token, place = (expert_ids >= 0).nonzero(as_tuple=True)  # synchronises with a device, so not done for every step
        self._count(layer, expert_ids[layer, token, place], policy_ids[token], step[token], torch.ones_like(token), len(steps))

    def _count(self, layer: Tensor, expert: Tensor, policy: Tensor, step: Tensor, kept: Tensor, num_steps: int) -> None:
        """Count the choices whose `kept` is 1. All tensors have one shape, or broadcast to the shape of `kept`."""
        _, num_layers, num_experts = self.allowed.shape
        chosen = (policy * num_layers + layer) * num_experts + expert
        self.expert_tokens.view(-1).index_add_(0, chosen.view(-1), kept.view(-1))
        hits = torch.zeros(num_steps * num_layers * num_experts, dtype=torch.int64, device=kept.device)
        hits.index_add_(0, ((step * num_layers + layer) * num_experts + expert).view(-1), kept.view(-1))
        distinct = (hits.view(num_steps, num_layers, num_experts) > 0).sum(dim=2).t()
        self.distinct_experts.scatter_add_(1, distinct, torch.ones_like(distinct))
