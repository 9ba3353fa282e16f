"""MoEfication (arXiv 2110.01786): neurons with similar weights become an expert, and a small network learns to choose experts.

The paper is about ReLU, where an expert's activation is the sum of its positive neurons. For SwiGLU we take the sum of |h|.
"""

import torch
from torch.nn import functional as F

from ladimo.convert.distill.layerwise import CurvePoint
from ladimo.convert.distill.router import activation_mass, fit_router
from ladimo.convert.ffn.clustering import as_partition, balanced_kmeans
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.split import check_experts, split_ffn
from ladimo.convert.methods.layerwise import LayerwiseMethod
from ladimo.convert.methods.registry import register
from ladimo.convert.recipe import Recipe
from ladimo.model.config import MoeLayerConfig
from ladimo.model.layers import Ffn, GeluMLP
from ladimo.model.moe import ExpertLayer


@register
class Moefication(LayerwiseMethod):
    name = "moefication"
    ffn_kinds = ("swiglu", "gelu")
    trains_experts = False

    def split(self, mlp: Ffn, data: LayerData, recipe: Recipe, generator: torch.Generator) -> ExpertLayer:
        """The experts are clusters of the rows of `gate_proj`, or of `up_proj` without a gate, scaled to length one.

        Before training, the router has the centres of the clusters, as in the released code. Raises ValueError if there are
        more experts than neurons.
        """
        check_experts(recipe.split.experts, mlp)
        num_experts = recipe.split.experts
        first = mlp.up_proj if isinstance(mlp, GeluMLP) else mlp.gate_proj
        rows = F.normalize(first.weight.detach().float(), dim=1)
        labels = balanced_kmeans(rows, num_experts, generator)
        partition = as_partition(labels, num_experts)
        layer = MoeLayerConfig(
            num_experts=num_experts,
            num_experts_per_tok=recipe.split.top_k,
            moe_intermediate_size=partition.shape[1],
            score_function="sigmoid",
            expert_weight="one",
            router="mlp",
            router_hidden_size=num_experts,
            ffn_kind=mlp.kind,
        )
        members = F.one_hot(labels, num_experts).to(rows)
        centres = (members.t() @ rows) / members.sum(dim=0).unsqueeze(1)
        # The released code divides each input by its length. After RMSNorm, lengths hardly differ, so the mean length is used.
        length = data.fit_inputs.float().norm(dim=1).mean().to(rows.device)
        router = {"fc1.weight": centres / length, "fc2.weight": torch.eye(num_experts)}
        return split_ffn(mlp, partition, layer, router)

    def fit(self, layer: ExpertLayer, data: LayerData, recipe: Recipe, generator: torch.Generator) -> list[CurvePoint]:
        masses = activation_mass(layer, data.fit_inputs)
        return fit_router(layer, data, masses, recipe.train, generator)

    def describe(self, recipe: Recipe) -> str:
        split, train = recipe.split, recipe.train
        return (
            f"MoEfication (arXiv 2110.01786), read for SwiGLU. Balanced k-means on the rows of gate_proj makes {split.experts} "
            f"experts, an exact partition: all of them with weight one are the dense FFN. A two-layer tanh router (hidden size "
            f"{split.experts}) predicts each expert's share of the sum of |h| by binary cross-entropy ({train.steps} steps of "
            f"{train.batch_tokens} tokens, learning rate {train.gate_lr:g}); the {split.top_k} best run with weight one. "
            f"Experts are not trained. Skipped experts add nothing: G-MoEfication's mean compensation is not included."
        )
