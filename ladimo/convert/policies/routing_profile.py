"""Profiles a layer's router on held-out tokens: its weights, and the cost and the error of each rule. Nothing is trained.

Legend: T tokens, D hidden_size, E experts, k the number of experts for which the layer was trained.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ladimo.convert.evaluation.variants import distinct_experts
from ladimo.convert.ffn.expert_layer import route, run_experts
from ladimo.convert.ffn.layer_data import target_variance
from ladimo.model.moe import ExpertLayer
from ladimo.model.routing import expert_scores
from ladimo.policy import LayerRule

HISTOGRAM_BINS = 50
TAUS = tuple(round(0.02 * step, 2) for step in range(1, 50))


@dataclass(frozen=True, slots=True)
class RuleProfile:
    """A rule and its figures on the holdout. The rule renormalises weights if this has the smaller error.

    experts_per_token: mean. one_share, full_share: shares of tokens that run one expert, and all k. distinct_experts: mean
    number of different experts in a batch of DISTINCT_BATCH tokens. error: squared error, divided by the variance of the FFN's
    outputs.
    """

    rule: LayerRule
    experts_per_token: float
    one_share: float
    full_share: float
    distinct_experts: float
    error: float


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """histogram: the number of tokens by the score of their best expert, in HISTOGRAM_BINS equal bins of [0, 1].
    mean_best_weight: the mean of this score. load: each expert's share of the choices under `full`. by_top_k: the rules with 1
    to k experts. by_tau: DYN(tau), with rising tau. by_floor: at most k experts, with rising relative_floor; empty unless
    it was asked for. kept_error, one_error: error of TOP1 with the best expert's own weight, and with weight one."""

    histogram: list[int]
    mean_best_weight: float
    load: list[float]
    by_top_k: list[RuleProfile]
    by_tau: list[RuleProfile]
    kept_error: float
    one_error: float
    by_floor: list[RuleProfile] = field(default_factory=list)

    @property
    def rules(self) -> list[RuleProfile]:
        """All of them."""
        return self.by_top_k + self.by_tau + self.by_floor

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "LayerProfile":
        rules = {
            name: [RuleProfile(**{**entry, "rule": LayerRule(**entry["rule"])}) for entry in raw.get(name, ())]
            for name in ("by_top_k", "by_tau", "by_floor")
        }
        return cls(**{**raw, **rules})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile_layer(
    layer: ExpertLayer, inputs: Tensor, targets: Tensor, taus: tuple[float, ...], floors: tuple[float, ...] = ()
) -> LayerProfile:
    """The profile on the FFN's inputs and outputs [T, D]. taus: values to add to the standard grid. floors: values of
    relative_floor.

    DYN(tau) keeps the fewest best experts whose weights sum to at least tau, and at most k (for k = 2, this is LaDiMo's
    adaptive router).
    """
    config = layer.config
    k = config.num_experts_per_tok
    device, full = layer.experts.down_proj.device, LayerRule.full(config)
    # errors[weighting, j - 1, token]: squared error with the j best experts, at original weights and renormalised.
    errors = torch.empty(2, k, len(inputs))
    scores, ids, load = [], [], torch.zeros(config.num_experts)
    main = config.num_experts - config.substitutes
    for chunk in torch.arange(len(inputs)).split(8192):
        x, target = inputs[chunk].to(device), targets[chunk].to(device).float()
        allowed = (torch.arange(config.num_experts, device=device) < main).expand(len(x), -1)
        ranked = expert_scores(layer.gate(x), layer.gate.e_score_correction_bias, allowed, config)
        scores.append(ranked[0][:, :k].cpu())
        ids.append(ranked[1][:, :k].cpu())
        for renormalize in (False, True):
            for count in range(1, k + 1):
                rule = LayerRule(top_k=count, renormalize=renormalize, experts=full.experts)
                _, topk_weights, topk_ids = route(layer, x, rule)
                out = run_experts(layer, x, topk_weights, topk_ids).float()
                errors[int(renormalize), count - 1, chunk] = (out - target).pow(2).mean(dim=1).cpu()
        load += torch.bincount(topk_ids.flatten().cpu(), minlength=config.num_experts)
    best = torch.cat(scores)  # [T, k]
    cumulative = best.cumsum(dim=1)  # a rule's mass is compared with these sums
    errors /= target_variance(targets)

    def candidate(needed: Tensor, top_k: int, mass: float | None = None, floor: float = 0.0) -> RuleProfile:
        by_weighting = errors.gather(1, (needed - 1).expand(2, 1, -1)).mean(dim=(1, 2))
        # With all k experts, the weights sum to one in both cases. Then rounding errors must not decide.
        whole = top_k == k and mass is None and not floor
        renormalize = full.renormalize if whole else bool(by_weighting[1] < by_weighting[0])
        return RuleProfile(
            rule=LayerRule(top_k, mass=mass, renormalize=renormalize, experts=full.experts, relative_floor=floor),
            experts_per_token=needed.float().mean().item(),
            one_share=(needed == 1).float().mean().item(),
            full_share=(needed == k).float().mean().item(),
            distinct_experts=distinct_experts(torch.cat(ids), needed, config.num_experts),
            error=by_weighting[int(renormalize)].item(),
        )

    tokens = len(inputs)
    return LayerProfile(
        histogram=torch.histc(cumulative[:, 0], HISTOGRAM_BINS, 0, 1).int().tolist(),
        mean_best_weight=cumulative[:, 0].mean().item(),
        load=(load / load.sum()).tolist(),
        by_top_k=[candidate(torch.full((tokens,), count), count) for count in range(1, k + 1)],
        by_tau=[
            candidate(1 + (cumulative[:, : k - 1] < tau).sum(dim=1), k, tau)
            for tau in sorted({*TAUS, *(tau for tau in taus if 0 < tau < 1)})
        ],
        kept_error=errors[0, 0].mean().item(),
        one_error=errors[1, 0].mean().item(),
        by_floor=[candidate((best >= floor * best[:, :1]).sum(dim=1), k, floor=floor) for floor in floors],
    )
