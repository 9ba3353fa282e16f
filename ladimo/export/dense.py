"""Export to a plain dense model, which transformers, vLLM, SGLang and llama.cpp's converter can read without our code.

It is a LLaMA, or of the family whose biases or norms the model has: Qwen2 or Qwen3.
"""

from typing import Any

from ladimo.export.hugging_face import HuggingFaceTarget, Tensors, dense_tensors, refuse_norms
from ladimo.export.policy_view import PolicyView


class DenseTarget(HuggingFaceTarget):
    """The target `dense`. The model has one FFN width for all layers, so narrower FFNs are padded with zeros."""

    name = "dense"
    help = "a plain LLaMA, Qwen2 or Qwen3 in Hugging Face layout, for policies that run the same experts for every token"

    def config(self, view: PolicyView) -> dict[str, Any]:
        for layer, form in view.routed.items():
            raise ValueError(f"{view.name(layer)}: {form}; the target has no router")
        source, config = view.source, view.common_config()
        refuse_norms(view, known=["head"])
        if source.attention_output_bias == source.attention_bias:
            normed = source.qk_norm == "head"
            return config | {
                "model_type": "qwen3" if normed else "llama",
                "architectures": ["Qwen3ForCausalLM" if normed else "LlamaForCausalLM"],
                "attention_bias": source.attention_bias,
            }
        if source.attention_output_bias:
            raise ValueError("the model has a bias on the attention's output alone, the target on all projections or on none")
        refuse_norms(view)
        # Qwen2 has biases on queries, keys and values only.
        return config | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}

    def ffn_tensors(self, view: PolicyView, layer: int, config: dict[str, Any]) -> Tensors:
        return dense_tensors(f"model.layers.{layer}.mlp.", view.ffn(layer, config["intermediate_size"]))
