"""CMoE (arXiv 2502.04416): neurons that are often activated always run. The others are clustered by the tokens that activate
them. One representative neuron of each cluster is its router. The conversion itself needs no training; `fit` may follow.

Legend: N neurons, E experts, of which S always run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.convert.distill.layerwise import CurvePoint, distill_layer
from ladimo.convert.ffn.clustering import as_partition, balanced_assignment, expert_sizes
from ladimo.convert.ffn.hidden_channels import coactivation
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.split import check_experts, split_ffn
from ladimo.convert.methods.layerwise import LayerwiseMethod
from ladimo.convert.methods.registry import register
from ladimo.convert.recipe import Recipe, require
from ladimo.model.config import MoeLayerConfig
from ladimo.model.layers import Ffn
from ladimo.model.moe import ExpertLayer
from ladimo.model.router import SELECTION_BIAS

MAX_TOKENS = 16_384  # eight sequences of 2048, as in the paper
ROUNDS = 10  # the paper makes one round; with columns as sparse as those of K_a = 10, the second round changes nothing
ALWAYS = 2.0  # a selection bias that is larger than any difference of softmax scores


@dataclass(frozen=True, slots=True)
class CmoeRecipe:
    """shared: the share of the `split.top_k` running experts that always run, rounded to a whole number of experts. With
    split.experts 8 and split.top_k 6, the default gives the paper's S3A3E8. channels: K_a, the number of a token's hidden
    channels that count as activated.
    """

    shared: float = 0.5
    channels: int = 10

    def __post_init__(self) -> None:
        require(0 <= self.shared <= 1, "cmoe.shared", "must be between 0 and 1", self.shared)
        require(self.channels >= 1, "cmoe.channels", "must be at least 1", self.channels)


@register
class Cmoe(LayerwiseMethod):
    name = "cmoe"
    options = CmoeRecipe

    def split(self, mlp: Ffn, data: LayerData, recipe: Recipe, generator: torch.Generator) -> ExpertLayer:
        """Raises ValueError if there are more experts than neurons."""
        check_experts(recipe.split.experts, mlp)
        num_experts, num_shared = recipe.split.experts, num_shared_experts(recipe)
        picked = torch.randperm(len(data.fit_inputs), generator=generator)[:MAX_TOKENS]
        counts = coactivation(mlp, data.fit_inputs[picked], recipe.section(CmoeRecipe).channels).cpu()
        labels, representatives = cluster(counts, num_experts, num_shared)
        partition = as_partition(labels, num_experts)
        layer = MoeLayerConfig(
            num_experts=num_experts,
            num_experts_per_tok=recipe.split.top_k,
            moe_intermediate_size=partition.shape[1],
            expert_weight="one",
            router="glu",
            selection_bias=True,
        )
        router = {SELECTION_BIAS: torch.zeros(num_experts)}
        router[SELECTION_BIAS][:num_shared] = ALWAYS
        for name in ("gate_proj", "up_proj"):
            rows = F.normalize(mlp.get_submodule(name).get_parameter("weight").detach().float().cpu(), dim=1)
            router[f"{name}.weight"] = F.pad(
                rows[representatives], (0, 0, num_shared, 0)
            )  # an expert that is always on needs no score
        return split_ffn(mlp, partition, layer, router)

    def fit(self, layer: ExpertLayer, data: LayerData, recipe: Recipe, generator: torch.Generator) -> list[CurvePoint]:
        return distill_layer(layer, data, recipe.train, generator)

    def describe(self, recipe: Recipe) -> str:
        split, train, shared = recipe.split, recipe.train, num_shared_experts(recipe)
        channels = recipe.section(CmoeRecipe).channels
        name = f"S{shared}A{split.top_k - shared}E{split.experts}"
        tuned = (
            f"All weights of the experts are then distilled layer by layer with k = {split.top_k} ({train.steps} steps of "
            f"{train.batch_tokens} tokens, learning rate {train.expert_lr:g}), where the paper tunes LoRA adapters and a gate "
            f"scale end to end and balances the load by the bias; the router stays as it is."
            if train.steps
            else "Training-free."
        )
        return (
            f"CMoE (arXiv 2502.04416), {name}: the neurons most often among a token's {channels} largest always "
            f"run, the rest is split by balanced k-means on their 0/1 activation columns (L1, at most {ROUNDS} rounds), and "
            f"each routed expert is scored by its representative neuron, |silu(gate x) * (up x)|. Experts count with weight "
            f"one. {tuned}"
        )


def num_shared_experts(recipe: Recipe) -> int:
    """The number of running experts that are the same for every token."""
    return round(recipe.section(CmoeRecipe).shared * recipe.split.top_k)


def cluster(counts: Tensor, num_experts: int, num_shared: int) -> tuple[Tensor, Tensor]:
    """Co-activation counts [N, N] -> labels [N], and for each routed expert the neuron that is closest to its centre, [E - S].
    The experts 0 .. S - 1 always run.

    This is balanced k-means with L1 distances on the 0/1 activation columns. The first centres are the routed neurons that are
    activated most often. Later centres are the mean columns of the clusters. All distances follow from the counts
    (`distances`).
    """
    sizes = expert_sizes(len(counts), num_experts)
    often = counts.diagonal()
    order = often.argsort(descending=True, stable=True)
    labels = torch.empty(len(counts), dtype=torch.int64)
    labels[order] = torch.arange(num_experts).repeat_interleave(sizes)
    routed = order[int(sizes[:num_shared].sum()) :]
    if num_shared == num_experts:
        return labels, routed
    products, magnitudes = counts[routed][:, routed], often[routed]
    centres = torch.eye(len(routed))[: num_experts - num_shared]  # [E - S, routed]: the neurons whose mean column a centre is
    cluster_of = torch.full((len(routed),), -1)
    for _ in range(ROUNDS):
        previous, cluster_of = cluster_of, balanced_assignment(distances(products, magnitudes, centres), sizes[num_shared:])
        members = F.one_hot(cluster_of, num_experts - num_shared).t().float()
        centres = members / members.sum(dim=1, keepdim=True)
        if torch.equal(cluster_of, previous):
            break
    labels[routed] = cluster_of + num_shared
    nearest = distances(products, magnitudes, centres).masked_fill(members.t() == 0, torch.inf).argmin(dim=0)
    return labels, routed[nearest]


def distances(products: Tensor, magnitudes: Tensor, centres: Tensor) -> Tensor:
    """L1 distances [R, C] between 0/1 columns m and centres c in [0, 1]^T, which are |m| + |c| - 2 m.c. products: the columns'
    inner products [R, R]. magnitudes: their sums [R]. centres: the weights [C, R] of the columns in each centre."""
    return magnitudes[:, None] + centres @ magnitudes - 2 * products @ centres.t()
