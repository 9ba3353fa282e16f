"""Export to MiMo-V2-Flash: sigmoid routers, unequal numbers of experts through null experts, dense layers anywhere.

MiMo has no shared expert, so experts that always run are pinned. config.json has the names of transformers and also those that
vLLM and SGLang read.
"""

from typing import Any

from ladimo.export.hugging_face import HuggingFaceTarget, Tensors, dense_tensors, refuse_parts
from ladimo.export.null_experts import Places, fit_places, placed_experts
from ladimo.export.policy_view import PolicyView


class MimoV2Target(HuggingFaceTarget):
    """The target `mimo`."""

    name = "mimo"
    help = "MiMo-V2-Flash, for sigmoid routers and plain RoPE; layers may run unequal numbers of experts, and any may be dense"

    def config(self, view: PolicyView) -> dict[str, Any]:
        refuse_parts(view)
        source, places, common = view.source, _places(view), view.common_config()
        if source.rope.type != "default":
            raise ValueError(f"the model has RoPE of type {source.rope.type}; vLLM and SGLang read plain RoPE for the target")
        depth = source.num_hidden_layers
        routed = [layer in view.routed for layer in range(depth)]
        widths = [view.ffn_width(layer) for layer in range(depth) if not routed[layer]]
        rope = {"rope_type": "default", "rope_theta": source.rope.theta, "partial_rotary_factor": 1.0}
        return common | {
            "model_type": "mimo_v2_flash",
            "architectures": ["MiMoV2FlashForCausalLM"],
            "intermediate_size": max(widths, default=places.width),
            "moe_intermediate_size": places.width,
            "n_routed_experts": places.num_experts,
            "num_experts_per_tok": places.top_k,
            "norm_topk_prob": places.normalised,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "layer_types": ["full_attention"] * depth,
            "hybrid_layer_pattern": [0] * depth,
            "mlp_layer_types": ["sparse" if here else "dense" for here in routed],
            "moe_layer_freq": [int(here) for here in routed],
            "attention_bias": source.attention_bias,
            "attention_value_scale": None,
            "v_head_dim": source.head_dim,
            "layernorm_epsilon": source.rms_norm_eps,
            # transformers reads the inner object, vLLM the two fields, SGLang the outer object.
            "rope_parameters": {**rope, "full_attention": rope},
            "rope_theta": source.rope.theta,
            "partial_rotary_factor": 1.0,
            # No layer has a sliding window; vLLM and SGLang want its sizes all the same.
            "sliding_window_size": source.max_position_embeddings,
            "swa_num_attention_heads": source.num_attention_heads,
            "swa_num_key_value_heads": source.num_key_value_heads,
            "swa_head_dim": source.head_dim,
            "swa_v_head_dim": source.head_dim,
            "add_swa_attention_sink_bias": False,
            "add_full_attention_sink_bias": False,
        }

    def ffn_tensors(self, view: PolicyView, layer: int, config: dict[str, Any]) -> Tensors:
        prefix = f"model.layers.{layer}.mlp."
        if layer in view.routed:
            return placed_experts(view, layer, view.routed[layer].always, _places(view), prefix)
        return dense_tensors(prefix, view.ffn(layer, config["intermediate_size"]))


def _places(view: PolicyView) -> Places:
    return fit_places(view, lambda form: form.always, [])
