"""A converted model as a plain LLaMA. This works for policies that run the same experts for every token.

Legend: D hidden_size, E experts, F moe_intermediate_size, W width of the written FFN.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.checkpoint import TensorReader, copy_tokenizer, read_json
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.families import find_family
from ladimo.model.nested_layers import ROUNDING, SCALES, TIED_HEAD, matrix_named, read_matrix
from ladimo.model.precision import KEY_VALUE_BITS
from ladimo.policy import LayerRule, RoutingPolicy

OURS = ("moe_layers", "attention_output_bias", "family", "nested_bits")
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class FixedExperts:
    """The experts that a layer runs for every token, and the weight of each of them."""

    experts: tuple[int, ...]
    weight: float


class DenseView:
    """The model with the configuration and tensors of transformers' LlamaForCausalLM.

    A LLaMA has one FFN width for all layers, so narrower FFNs are padded with zeros. Raises ValueError for a policy that
    chooses experts by token, and for a family whose modules are not those of LLaMA.
    """

    def __init__(self, directory: Path, config: ModelConfig, policy: RoutingPolicy) -> None:
        if not find_family(config.family).is_llama_inside:
            raise ValueError(f"{directory}: a {config.family} model is no LLaMA inside")
        self.directory, self.source, self._policy = directory, config, policy
        self._reader = TensorReader(directory)
        self._fixed = [
            None if rule is None or layer is None else fixed_experts(rule, layer, f"policy {policy.name!r}, layer {index}")
            for index, (rule, layer) in enumerate(zip(policy.layers, config.layers, strict=True))
        ]
        self.width = max(self._width(index) for index in range(config.num_hidden_layers))

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises ValueError for biases that neither LLaMA nor Qwen2 can have."""
        raw = {name: value for name, value in read_json(self.directory / "config.json").items() if name not in OURS}
        source = self.source
        if source.attention_output_bias != source.attention_bias:
            if not source.attention_bias or source.attention_output_bias:
                raise ValueError("a LLaMA has a bias on all attention projections or on none")
            # Qwen2 has biases on queries, keys and values only.
            raw |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
            del raw["attention_bias"]
        else:
            raw |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": source.attention_bias}
        if self._policy.head_bits is not None:
            raw["tie_word_embeddings"] = False  # the head is rounded, the embedding is not
        return raw | {"intermediate_size": self.width}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors with transformers' names, at the bits that the policy reads. The FFN of one layer is in memory at a
        time."""
        for name in self._reader.files:
            if ".mlp." not in name and name != HEAD and not name.endswith((ROUNDING, SCALES)):
                yield name, self._get(name)
        if self._policy.head_bits is not None or not self.source.tie_word_embeddings:
            head = TIED_HEAD if self.source.tie_word_embeddings else matrix_named(HEAD)
            yield HEAD, read_matrix(self._reader.get, head, self._policy.head_bits)
        for layer, fixed in enumerate(self._fixed):
            prefix = f"model.layers.{layer}.mlp."
            gate, up, down = self._dense_ffn(prefix) if fixed is None else self._joined_ffn(prefix, fixed)
            idle = self.width - gate.shape[0]
            yield f"{prefix}gate_proj.weight", F.pad(gate, (0, 0, 0, idle))
            yield f"{prefix}up_proj.weight", F.pad(up, (0, 0, 0, idle))
            yield f"{prefix}down_proj.weight", F.pad(down, (0, idle))

    def copy_tokenizer(self, out: Path) -> None:
        """Copy the tokenizer's files into `out`."""
        copy_tokenizer(self.directory, out)

    def _get(self, name: str) -> Tensor:
        """A layer's tensor at the bits that the policy reads."""
        parts = name.split(".")
        rule = self._policy.layers[int(parts[2])] if parts[1:2] == ["layers"] else None
        if rule is None or not parts[-2 if parts[-1] == "weight" else -1].endswith("_proj"):
            return self._reader.get(name)
        bits = rule.attention_bits if "self_attn" in parts else rule.bits
        if bits is not None and parts[-2] in ("k_proj", "v_proj"):
            bits = max(bits, KEY_VALUE_BITS)
        return read_matrix(self._reader.get, matrix_named(name), bits)

    def _width(self, layer: int) -> int:
        fixed, moe = self._fixed[layer], self.source.layers[layer]
        if fixed is None or moe is None:
            return self.source.intermediate_size
        return len(fixed.experts) * moe.moe_intermediate_size

    def _dense_ffn(self, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (self._get(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        return gate, up, down

    def _joined_ffn(self, prefix: str, fixed: FixedExperts) -> tuple[Tensor, Tensor, Tensor]:
        """Join the experts to one FFN: gate and up [W, D], down [D, W]."""
        chosen = torch.tensor(fixed.experts)
        gate_up = self._get(f"{prefix}experts.gate_up_proj")[chosen]  # [E, 2F, D]
        down = self._get(f"{prefix}experts.down_proj")[chosen]  # [E, D, F]
        gate, up = gate_up.chunk(2, dim=1)
        return gate.flatten(0, 1), up.flatten(0, 1), (down * fixed.weight).transpose(0, 1).flatten(1)


def fixed_experts(rule: LayerRule, layer: MoeLayerConfig, where: str) -> FixedExperts:
    """The experts that a rule runs for every token. Raises ValueError if they depend on the token; its message begins with
    `where`."""
    experts = tuple(range(layer.num_experts)) if rule.experts is None else rule.experts
    if rule.top_k < len(experts):
        raise ValueError(f"{where}: chooses {rule.top_k} of {len(experts)} experts by token; the target has no router")
    if len(experts) > 1 and rule.limits:
        raise ValueError(f"{where}: {' and '.join(rule.limits)} may drop experts of a token; the target has no router")
    if layer.expert_weight == "one":
        return FixedExperts(experts, 1 / len(experts) if rule.renormalize else 1.0)
    # A single expert has weight 1 if the weights of the kept experts are normalised to a sum of 1.
    if len(experts) == 1 and (rule.renormalize or (layer.score_function == "softmax" and layer.score_norm_top_k is None)):
        return FixedExperts(experts, 1.0)
    raise ValueError(f"{where}: weighs experts by token; the target has no router")
