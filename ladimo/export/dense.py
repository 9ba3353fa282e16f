"""Export to a plain dense model, which transformers, vLLM, SGLang and llama.cpp's converter can read without our code.

It is a LLaMA, or of the family whose parts the model has: Qwen2 (biases), Qwen3 (norms), Phi-3 (its rotary embedding) or Phi-2.
"""

import re
from typing import Any

import torch
from torch import Tensor

from ladimo.export.hugging_face import HuggingFaceTarget, Tensors, dense_tensors, refuse_parts
from ladimo.export.policy_view import PolicyView
from ladimo.model.config import ModelConfig
from ladimo.model.families.phi import PHI

PROJECTION = re.compile(r"\b[qkv]_proj\b")


class DenseTarget(HuggingFaceTarget):
    """The target `dense`. The model has one FFN width for all layers, so narrower FFNs are padded with zeros."""

    name = "dense"
    help = "a plain LLaMA, Qwen or Phi in Hugging Face layout, for policies that run the same experts for every token"

    def config(self, view: PolicyView) -> dict[str, Any]:
        for layer, form in view.routed.items():
            raise ValueError(f"{view.name(layer)}: {form}; the target has no router")
        source, config = view.source, view.common_config()
        if source.ffn_kind == "gelu":
            return config | {
                "model_type": PHI.model_type,
                "architectures": ["PhiForCausalLM"],
                "hidden_act": "gelu_new",
                "layer_norm_eps": source.rms_norm_eps,
            }
        if _rotates_like_phi3(source):
            refuse_parts(view, "partial rotary", "longrope")
            if source.attention_bias:
                raise ValueError("the model has biases in the attention, the target has none with this rotary embedding")
            return config | {
                "model_type": "phi3",
                "architectures": ["Phi3ForCausalLM"],
                "original_max_position_embeddings": source.rope.original_max_position_embeddings,
                "sliding_window": None,
            }
        if source.attention_output_bias == source.attention_bias:
            refuse_parts(view, "output bias", "head norms")
            normed = source.qk_norm == "head"
            return config | {
                "model_type": "qwen3" if normed else "llama",
                "architectures": ["Qwen3ForCausalLM" if normed else "LlamaForCausalLM"],
                "attention_bias": source.attention_bias,
            }
        if source.attention_output_bias:
            raise ValueError("the model has a bias on the attention's output alone, the target on all projections or on none")
        refuse_parts(view)
        # Qwen2 has biases on queries, keys and values only.
        return config | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}

    def attention_tensors(self, view: PolicyView) -> Tensors:
        if view.source.ffn_kind == "gelu":
            for name, tensor in view.common_tensors():
                yield PHI.locate(name, view.source).name, tensor
            return
        if not _rotates_like_phi3(view.source):
            yield from view.common_tensors()
            return
        parts: list[Tensor] = []
        for name, tensor in view.common_tensors():
            fused = PROJECTION.sub("qkv_proj", name)
            if fused == name:
                yield name, tensor
                continue
            parts.append(tensor)
            if len(parts) == 3:  # queries, keys and values come in this order
                yield fused, torch.cat(parts)
                parts.clear()

    def ffn_tensors(self, view: PolicyView, layer: int, config: dict[str, Any]) -> Tensors:
        prefix = f"model.layers.{layer}.mlp."
        if view.source.ffn_kind == "gelu":
            names = [f"{prefix}{name}_proj.{kind}" for name in ("up", "down") for kind in ("weight", "bias")]
            stored = [PHI.locate(name, view.source).name for name in names]
            return iter(tuple(zip(stored, view.gelu_ffn(layer, config["intermediate_size"]), strict=True)))
        gate, up, down = ffn = view.ffn(layer, config["intermediate_size"])
        if not _rotates_like_phi3(view.source):
            return dense_tensors(prefix, ffn)
        return iter(((f"{prefix}gate_up_proj.weight", torch.cat((gate, up))), (f"{prefix}down_proj.weight", down)))


def _rotates_like_phi3(source: ModelConfig) -> bool:
    """Whether the rotary embedding is one that only Phi-3 has. Phi-3 also has fused projections."""
    return source.rotary_dim < source.head_dim or source.rope.type == "longrope"
