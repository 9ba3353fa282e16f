"""The routing rule, the batch budget, and the counting of choices, in one launch each.

References: `select_experts` and `apply_batch_budget` in `ladimo.model.routing`, and `RoutingTables.record` in
`ladimo.model.inputs`.

Legend: T tokens, E experts, K = E places per token, L layers, P policies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladimo.model.config import MoeLayerConfig
from ladimo.model.kernels.early_launch import early_launch, wait_for_inputs
from ladimo.model.rule import RuleNumber

# The columns of a row, as constants for the compiler.
TOP_K = tl.constexpr(RuleNumber.TOP_K.value)
MASS = tl.constexpr(RuleNumber.MASS.value)
FLOOR = tl.constexpr(RuleNumber.FLOOR.value)
RELATIVE_FLOOR = tl.constexpr(RuleNumber.RELATIVE_FLOOR.value)
RENORMALIZE = tl.constexpr(RuleNumber.RENORMALIZE.value)
BATCH_EXPERTS = tl.constexpr(RuleNumber.BATCH_EXPERTS.value)
# Tokens times experts in one program of `select_experts`.
SELECT_TILE = 512
# Tokens times experts in one iteration of `apply_batch_budget`.
BUDGET_TILE = 256
# Choices times experts in one iteration of `record`.
COUNT_TILE = 8192


def select_experts(
    router_logits: Tensor, rows: Tensor, allowed: Tensor, layer: MoeLayerConfig, selection_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See the reference. `rows` [T, len(RuleNumber)] and `allowed` [T, E] may be views of larger tables."""
    num_tokens, num_experts = router_logits.shape
    weights = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=router_logits.device)
    ids = torch.empty(num_tokens, num_experts, dtype=torch.int64, device=router_logits.device)
    block_e = triton.next_power_of_2(num_experts)
    block_t = max(1, min(SELECT_TILE // block_e, triton.next_power_of_2(num_tokens)))
    _select_kernel[(triton.cdiv(num_tokens, block_t),)](
        router_logits,
        rows,
        allowed.view(torch.uint8),
        router_logits if selection_bias is None else selection_bias,
        weights,
        ids,
        num_tokens,
        router_logits.stride(0),
        rows.stride(0),
        allowed.stride(0),
        E=num_experts,
        SOFTMAX=layer.score_function == "softmax",
        HAS_BIAS=selection_bias is not None,
        NORM_TOP_K=layer.score_norm_top_k or 0,
        WEIGHT_ONE=layer.expert_weight == "one",
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        num_warps=max(1, min(4, block_t * block_e // 128)),
        **early_launch(),
    )
    return weights, ids


@triton.jit(do_not_specialize=["num_tokens", "rows_stride", "allowed_stride"])
def _select_kernel(
    logits_ptr,
    rows_ptr,
    allowed_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    num_tokens,
    logits_stride,
    rows_stride,
    allowed_stride,
    E: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM_TOP_K: tl.constexpr,
    WEIGHT_ONE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    in_range = tokens < num_tokens
    live = in_range[:, None] & (experts < E)[None, :]
    tokens = tokens.to(tl.int64)
    allowed = tl.load(allowed_ptr + tokens[:, None] * allowed_stride + experts[None, :], mask=live, other=0) != 0
    logits = tl.load(logits_ptr + tokens[:, None] * logits_stride + experts[None, :], mask=live, other=0.0).to(tl.float32)

    if SOFTMAX:
        logits = tl.where(allowed, logits, float("-inf"))
        highest = tl.max(logits, axis=1)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        exponentials = tl.where(allowed, tl.exp(logits - highest[:, None]), 0.0)
        scores = exponentials / tl.maximum(tl.sum(exponentials, axis=1), 1e-30)[:, None]
    else:
        scores = tl.where(allowed, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    scores = tl.where(scores == scores, scores, 0.0)  # replace NaN, so that all ranks are different
    order = scores
    if HAS_BIAS:
        order += tl.load(bias_ptr + experts, mask=experts < E, other=0.0).to(tl.float32)[None, :]
    order = tl.where(allowed, order, float("-inf"))

    # For each expert in turn: find the experts that it ranks before, and add its score to their mass_before.
    rank = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.int32)
    mass_before = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for expert in range(E):
        its_order = tl.sum(tl.where((experts == expert)[None, :], order, 0.0), axis=1)[:, None]
        its_score = tl.sum(tl.where((experts == expert)[None, :], scores, 0.0), axis=1)[:, None]
        behind = (order < its_order) | ((order == its_order) & (experts > expert)[None, :])
        rank += behind.to(tl.int32)
        mass_before += tl.where(behind, its_score, 0.0)
    if NORM_TOP_K > 0:
        norm = tl.maximum(tl.sum(tl.where(rank < NORM_TOP_K, scores, 0.0), axis=1), 1e-20)[:, None]
        scores = scores / norm
        mass_before = mass_before / norm

    rule = rows_ptr + tokens * rows_stride
    top_k = tl.load(rule + TOP_K, mask=in_range, other=0.0)[:, None]
    mass = tl.load(rule + MASS, mask=in_range, other=0.0)[:, None]
    floor = tl.load(rule + FLOOR, mask=in_range, other=0.0)[:, None]
    relative_floor = tl.load(rule + RELATIVE_FLOOR, mask=in_range, other=0.0)[:, None]
    renormalize = tl.load(rule + RENORMALIZE, mask=in_range, other=0.0)[:, None]
    best = tl.sum(tl.where(rank == 0, scores, 0.0), axis=1)[:, None]
    floor = tl.maximum(floor, relative_floor * best)
    enough = ((mass_before < mass) & (scores >= floor)) | (rank == 0)
    kept = allowed & enough & (rank < top_k)
    weights = kept.to(tl.float32) if WEIGHT_ONE else tl.where(kept, scores, 0.0)
    total = tl.maximum(tl.sum(weights, axis=1), 1e-20)[:, None]
    weights = tl.where(renormalize > 0, weights / total, weights)

    places = tokens[:, None] * E + rank
    ids = tl.where(kept, experts[None, :].to(tl.int64), -1)
    tl.store(weights_ptr + places, weights, mask=live)
    tl.store(ids_ptr + places, ids, mask=live)


def apply_batch_budget(
    topk_weights: Tensor, topk_ids: Tensor, rows: Tensor, allowed: Tensor, num_decode: int, tile: int = BUDGET_TILE
) -> Tensor:
    """See the reference. There is only one program, so the sums over tokens always run in the same order."""
    num_tokens, num_experts = topk_ids.shape
    shared = torch.empty(num_tokens, num_experts, dtype=torch.bool, device=topk_ids.device)
    block_e = triton.next_power_of_2(num_experts)
    _apply_batch_budget_kernel[(1,)](
        topk_weights,
        topk_ids,
        rows,
        allowed.view(torch.uint8),
        shared.view(torch.uint8),
        num_tokens,
        num_decode,
        rows.stride(0),
        allowed.stride(0),
        E=num_experts,
        BLOCK_T=min(triton.next_power_of_2(num_tokens), max(1, tile // block_e)),
        BLOCK_E=block_e,
        **early_launch(),
    )
    return shared


@triton.jit(do_not_specialize=["num_tokens", "num_decode", "rows_stride", "allowed_stride"])
def _apply_batch_budget_kernel(
    weights_ptr,
    ids_ptr,
    rows_ptr,
    allowed_ptr,
    shared_ptr,
    num_tokens,
    num_decode,
    rows_stride,
    allowed_stride,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    experts = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], dtype=tl.float32)
    free = tl.zeros([BLOCK_E], dtype=tl.int32)
    for start in range(0, num_tokens, BLOCK_T):
        tokens = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        live = tokens < num_tokens
        budget = tl.load(rows_ptr + tokens * rows_stride + BATCH_EXPERTS, mask=live, other=float("inf"))
        limited = (budget < float("inf")) & (tokens < num_decode)
        for place in range(E):
            ids = tl.load(ids_ptr + tokens * E + place, mask=live, other=-1)
            weights = tl.load(weights_ptr + tokens * E + place, mask=live, other=0.0)
            chosen = ids[:, None] == experts[None, :]
            total += tl.sum(tl.where(chosen & limited[:, None], weights[:, None], 0.0), axis=0)
            free = tl.maximum(free, tl.max((chosen & (limited == 0)[:, None]).to(tl.int32), axis=0))

    for start in range(0, num_tokens, BLOCK_T):
        tokens = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        live = (tokens < num_tokens)[:, None] & (experts < E)[None, :]
        allowed = tl.load(allowed_ptr + tokens[:, None] * allowed_stride + experts[None, :], mask=live, other=0) != 0
        budget = tl.load(rows_ptr + tokens * rows_stride + BATCH_EXPERTS, mask=tokens < num_tokens, other=0.0)
        budget = tl.where(tokens < num_decode, budget, float("inf"))
        costs = (allowed & (free == 0)[None, :]).to(tl.int32)
        rank = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.int32)  # among the experts of the mask that are not free
        for expert in range(E):
            this = experts == expert
            its_total = tl.sum(tl.where(this, total, 0.0), axis=0)
            it_costs = tl.sum(tl.where(this[None, :], costs, 0), axis=1)
            behind = (total < its_total) | ((total == its_total) & (experts > expert))
            rank += tl.where(behind[None, :], it_costs[:, None], 0)
        shared = allowed & ((free > 0)[None, :] | (rank.to(tl.float32) < budget[:, None]))
        tl.store(shared_ptr + tokens[:, None] * E + experts[None, :], shared.to(tl.uint8), mask=live)


def record(
    expert_ids: Tensor, policy_ids: Tensor, expert_tokens: Tensor, distinct_experts: Tensor, tile: int = COUNT_TILE
) -> None:
    """Add the choices of one step to the counters of `RoutingTables`. One program per layer.

    expert_ids [L, T, K], policy_ids [T]; counters expert_tokens [P, L, E] and distinct_experts [L, E + 1].
    """
    num_layers, num_tokens, num_places = expert_ids.shape
    num_experts = expert_tokens.shape[2]
    block_e = triton.next_power_of_2(num_experts)
    _record_kernel[(num_layers,)](
        expert_ids.contiguous(),
        policy_ids,
        expert_tokens,
        distinct_experts,
        num_tokens * num_places,
        num_layers,
        K=num_places,
        E=num_experts,
        BLOCK=min(triton.next_power_of_2(num_tokens * num_places), max(16, tile // block_e)),
        BLOCK_E=block_e,
        **early_launch(),
    )


@triton.jit(do_not_specialize=["num_choices", "num_layers"])
def _record_kernel(
    ids_ptr,
    policies_ptr,
    expert_tokens_ptr,
    distinct_ptr,
    num_choices,
    num_layers,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_inputs(EARLY)
    layer = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    hit = tl.zeros([BLOCK_E], dtype=tl.int32)
    for start in range(0, num_choices, BLOCK):
        choices = start + tl.arange(0, BLOCK)
        live = choices < num_choices
        ids = tl.load(ids_ptr + layer * num_choices + choices, mask=live, other=-1)
        policies = tl.load(policies_ptr + choices // K, mask=live, other=0)
        chosen = (ids[:, None] == experts[None, :]).to(tl.int32)
        hit = tl.maximum(hit, tl.max(chosen, axis=0))
        # Most steps have one policy. Its choices are summed and added once. Choices under other policies are added one by one.
        common = tl.max(policies, axis=0)
        counts = tl.sum(tl.where((policies == common)[:, None], chosen, 0), axis=0)
        row = expert_tokens_ptr + (common * num_layers + layer) * E
        tl.atomic_add(row + experts, counts.to(tl.int64), mask=(experts < E) & (counts > 0))
        rows = expert_tokens_ptr + (policies * num_layers + layer) * E
        tl.atomic_add(rows + ids, tl.full([BLOCK], 1, tl.int64), mask=(ids >= 0) & (policies != common))
    counter = distinct_ptr + layer * (E + 1) + tl.sum((hit > 0).to(tl.int32), axis=0)
    tl.store(counter, tl.load(counter) + 1)
