"""Export to Qwen2-MoE: softmax routers in some layers, all with the same number of experts; other layers are dense.

Qwen2-MoE also has a shared expert. Where the model has none, it is small and zero. vLLM always reads biases of queries, keys
and values, so they are written as zeros where the model has none.
"""

from typing import Any

import torch

from ladimo.export.hugging_face import (
    HuggingFaceTarget,
    Tensors,
    dense_tensors,
    expert_tensors,
    expert_width,
    plain_softmax,
    refuse_parts,
)
from ladimo.export.policy_view import PolicyView, padded

SHARED_WIDTH = 64  # at most; a multiple of the sizes that kernels and tensor parallelism want


class Qwen2MoeTarget(HuggingFaceTarget):
    """The target `qwen2`."""

    name = "qwen2"
    help = "Qwen2-MoE, for softmax routers with one top-k, in some layers or all (SGLang needs all)"

    def config(self, view: PolicyView) -> dict[str, Any]:
        form = plain_softmax(view, shared=True)
        refuse_parts(view)
        source, width = view.source, expert_width(view)
        if source.head_dim * source.num_attention_heads != source.hidden_size:
            raise ValueError(f"head_dim is {source.head_dim}, the target has hidden_size / num_attention_heads")
        return view.common_config() | {
            "model_type": "qwen2_moe",
            "architectures": ["Qwen2MoeForCausalLM"],
            "num_experts": len(form.choices),
            "num_experts_per_tok": form.top_k,
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": form.shared_width or min(SHARED_WIDTH, width),
            "norm_topk_prob": form.normalised,
            "mlp_only_layers": [layer for layer in range(source.num_hidden_layers) if layer not in view.routed],
            "decoder_sparse_step": 1,
            "qkv_bias": True,
            "use_sliding_window": False,
        }

    def attention_tensors(self, view: PolicyView) -> Tensors:
        for name, tensor in view.common_tensors():
            yield name, tensor
            if not view.source.attention_bias and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                yield name.replace(".weight", ".bias"), tensor.new_zeros(len(tensor))

    def ffn_tensors(self, view: PolicyView, layer: int, config: dict[str, Any]) -> Tensors:
        prefix = f"model.layers.{layer}.mlp."
        if layer not in view.routed:
            yield from dense_tensors(prefix, view.ffn(layer, config["intermediate_size"]))
            return
        choices = view.routed[layer].choices
        experts = view.experts(layer, choices)
        yield f"{prefix}gate.weight", view.router(layer, choices)
        yield from expert_tensors(prefix, padded(*experts, config["moe_intermediate_size"]))
        if view.routed[layer].shared_width:
            shared, gate = view.shared_expert(layer)
        else:
            nothing = torch.zeros(config["shared_expert_intermediate_size"], config["hidden_size"], dtype=view.dtype)
            shared, gate = (nothing, nothing.clone(), nothing.T.clone()), nothing[:1].clone()
        yield from dense_tensors(f"{prefix}shared_expert.", shared)
        yield f"{prefix}shared_expert_gate.weight", gate
