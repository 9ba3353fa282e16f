"""Export to Mixtral: every layer routes, by softmax over the chosen experts, with the same number of experts in each."""

from typing import Any

from ladimo.export.hugging_face import HuggingFaceTarget, Tensors, expert_tensors, expert_width, plain_softmax, refuse_parts
from ladimo.export.policy_view import PolicyView, padded


class MixtralTarget(HuggingFaceTarget):
    """The target `mixtral`."""

    name = "mixtral"
    help = "Mixtral, for softmax routers with normalised weights and one top-k, in every layer"

    def config(self, view: PolicyView) -> dict[str, Any]:
        form = plain_softmax(view)
        for layer, other in enumerate(view.forms):
            if layer not in view.routed:
                raise ValueError(f"{view.name(layer)}: {'is dense' if other is None else 'does not route'}, the target routes")
        if not form.normalised:
            raise ValueError(f"policy {view.policy.name!r}: does not divide weights by their sum, the target does")
        refuse_parts(view)
        if view.source.attention_bias:
            raise ValueError("the model has biases in the attention, the target has none")
        return view.common_config() | {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "intermediate_size": expert_width(view),
            "num_local_experts": len(form.choices),
            "num_experts_per_tok": form.top_k,
            "sliding_window": None,
        }

    def ffn_tensors(self, view: PolicyView, layer: int, config: dict[str, Any]) -> Tensors:
        choices, prefix = view.routed[layer].choices, f"model.layers.{layer}.block_sparse_moe."
        yield f"{prefix}gate.weight", view.router(layer, choices)
        experts = padded(*view.experts(layer, choices), config["intermediate_size"])
        yield from expert_tensors(prefix, experts, ("w1", "w3", "w2"))
