"""LaDiMo (arXiv 2408.04278): experts are slices of the FFN. Router and experts are trained by regression on the FFN's outputs.

Some details of the paper are not public. Our reading is: equal contiguous slices; a softmax router without bias; the k largest
scores, renormalised (as in Mixtral); squared error plus the load-balance term of Switch Transformers.
"""

import torch
from torch import Tensor

from ladimo.convert.distill.layerwise import CurvePoint, distill_layer
from ladimo.convert.ffn.expert_layer import full_rule, route, run_experts
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.ffn.split import check_experts, contiguous_partition, split_ffn
from ladimo.convert.methods.layerwise import LayerwiseMethod
from ladimo.convert.methods.registry import register
from ladimo.convert.recipe import Recipe
from ladimo.model.config import MoeLayerConfig
from ladimo.model.layers import Ffn
from ladimo.model.moe import ExpertLayer


@register
class Ladimo(LayerwiseMethod):
    name = "ladimo"
    ffn_kinds = ("swiglu", "gelu")

    def split(self, mlp: Ffn, data: LayerData, recipe: Recipe, generator: torch.Generator) -> ExpertLayer:
        """Raises ValueError if there are more experts than neurons."""
        split, hidden_size, intermediate_size = recipe.split, mlp.up_proj.in_features, mlp.up_proj.out_features
        check_experts(split.experts, mlp)
        partition = contiguous_partition(intermediate_size, split.experts)
        # Scores are divided by the sum of the k largest. A rule with mass tau and without renormalisation is then DYN(tau), and
        # the best expert keeps the weight that it had in training.
        layer = MoeLayerConfig(
            num_experts=split.experts,
            num_experts_per_tok=split.top_k,
            moe_intermediate_size=partition.shape[1],
            score_norm_top_k=split.top_k,
            ffn_kind=mlp.kind,
        )
        gate = torch.randn(split.experts, hidden_size, generator=generator) * split.gate_std
        expert_layer = split_ffn(mlp, partition, layer, {"weight": gate})
        factor = {"none": 1.0, "experts": float(split.experts), "fit": 0.0}[split.output_scale]
        if split.output_scale == "fit":
            batch = recipe.train.batch_tokens
            factor = best_scale(expert_layer, data.fit_inputs[:batch], data.fit_targets[:batch])
        with torch.no_grad():
            expert_layer.experts.down_proj.mul_(factor)
        return expert_layer

    def fit(self, layer: ExpertLayer, data: LayerData, recipe: Recipe, generator: torch.Generator) -> list[CurvePoint]:
        return distill_layer(layer, data, recipe.train, generator)

    def describe(self, recipe: Recipe) -> str:
        split, train = recipe.split, recipe.train
        return (
            f"LaDiMo (arXiv 2408.04278), our reading where the paper is silent. Each FFN is cut into {split.experts} equal "
            f"contiguous experts (output scale {split.output_scale!r}); a softmax router without bias keeps the {split.top_k} "
            f"largest, renormalised. Router and experts of each layer are trained on the original model's FFN inputs with "
            f"squared error plus {train.balance:g} x the Switch load-balance loss: AdamW, {train.steps} steps of "
            f"{train.batch_tokens} tokens, learning rates {train.expert_lr:g} (experts) and {train.gate_lr:g} (router). "
            f"Policies are training-free: TOP1, TOP{split.top_k} or DYN(tau) per layer from profiled routing weights."
        )


@torch.no_grad()
def best_scale(layer: ExpertLayer, inputs: Tensor, targets: Tensor) -> float:
    """The scalar s with the least squared error between s * layer(inputs) and the targets, both [T, D], under `full`."""
    device = layer.experts.down_proj.device
    x, y = inputs.to(device, torch.float32), targets.to(device, torch.float32)
    _, topk_weights, topk_ids = route(layer, x, full_rule(layer))
    out = run_experts(layer, x, topk_weights, topk_ids)
    if layer.output_bias is not None:  # is not scaled
        out, y = out - layer.output_bias, y - layer.output_bias
    power = out.pow(2).sum().item()
    return (out * y).sum().item() / power if power > 0 else 1.0
