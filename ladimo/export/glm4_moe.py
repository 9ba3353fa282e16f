"""Export to GLM4-MoE: sigmoid routers, unequal numbers of experts through null experts, and a shared expert.

Layers that do not route at the beginning of the model stay dense. GLM4-MoE has no dense layers after these. There the shared
expert is the layer's FFN, and the router chooses null experts only. The shared expert is as wide as the widest such FFN in all
layers, so the routed layers multiply with zeros: exact, but slow.
"""

import logging
from pathlib import Path
from typing import Any

from ladimo.export.hugging_face import HuggingFaceTarget, Tensors, dense_tensors, refuse_parts
from ladimo.export.null_experts import Places, fit_places, placed_experts
from ladimo.export.policy_view import PolicyView

logger = logging.getLogger(__name__)


class Glm4MoeTarget(HuggingFaceTarget):
    """The target `glm4`."""

    name = "glm4"
    help = "GLM4-MoE, for sigmoid routers; layers may run unequal numbers of experts"

    def config(self, view: PolicyView) -> dict[str, Any]:
        refuse_parts(view, "head norms", "partial rotary")
        leading, places = _leading(view), _places(view)
        layers = range(view.source.num_hidden_layers)
        shared = max(view.ffn_width(layer) for layer in layers[leading:])
        common, share = view.common_config(), view.source.rope.partial_rotary_factor
        return common | {
            "model_type": "glm4_moe",
            "architectures": ["Glm4MoeForCausalLM"],
            "intermediate_size": max((view.ffn_width(layer) for layer in layers[:leading]), default=places.width),
            "moe_intermediate_size": places.width,
            "n_routed_experts": places.num_experts,
            "num_experts_per_tok": places.top_k,
            "n_shared_experts": max(1, -(-shared // places.width)),
            "first_k_dense_replace": leading,
            "norm_topk_prob": places.normalised,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": view.source.qk_norm == "head",
            "attention_bias": view.source.attention_bias,
            "partial_rotary_factor": share,
            "rope_parameters": {**common["rope_parameters"], "partial_rotary_factor": share},
            "num_nextn_predict_layers": 0,
        }

    def write(self, view: PolicyView, out: Path) -> None:
        late = [layer for layer in range(_leading(view), view.source.num_hidden_layers) if layer not in view.routed]
        if late:
            logger.warning(
                "glm4: layers %s do not route, but layers before them do. So all routed layers get a shared expert of zeros as "
                "wide as an FFN. The result is exact, but slow; target mimo is faster where it can be used",
                ", ".join(map(str, late)),
            )
        super().write(view, out)

    def ffn_tensors(self, view: PolicyView, layer: int, config: dict[str, Any]) -> Tensors:
        prefix, leading = f"model.layers.{layer}.mlp.", _leading(view)
        if layer < leading:
            yield from dense_tensors(prefix, view.ffn(layer, config["intermediate_size"]))
            return
        shared_width = config["n_shared_experts"] * config["moe_intermediate_size"]
        yield from dense_tensors(f"{prefix}shared_experts.", view.ffn(layer, shared_width))
        yield from placed_experts(view, layer, (), _places(view), prefix)


def _leading(view: PolicyView) -> int:
    """The number of layers before the first that routes."""
    return min(view.routed, default=view.source.num_hidden_layers)


def _places(view: PolicyView) -> Places:
    """The shared expert holds the experts that always run, so they need no place."""
    return fit_places(view, lambda form: (), list(range(_leading(view), view.source.num_hidden_layers)))
