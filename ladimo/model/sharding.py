"""Parts of a model that several processes compute together, each with its share of every layer (tensor parallel).

A part has some of the attention heads, and some of the neurons of each FFN and of each expert. Embedding, norms, routers and
output head are in every part. The outputs of the parts' attentions and FFNs add up to those of the whole model.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ladimo.model.config import ModelConfig
from ladimo.model.families import find_family
from ladimo.model.nested.layers import PARTS
from ladimo.model.precision import GROUP
from ladimo.model.transformer import MoeTransformer

# The dimension along which a parameter, or a tensor that nested weights have beside it, is divided, by its name.
_BESIDE = f"({'|'.join(PARTS)})"
_DIVIDED = (
    (re.compile(rf"\.self_attn\.[qkv]_proj\.(weight|bias|{_BESIDE})$"), 0),
    (re.compile(rf"\.self_attn\.o_proj\.(weight|{_BESIDE})$"), 1),
    (re.compile(rf"\.mlp\.(shared_expert\.)?(gate|up)_proj\.(weight|bias|{_BESIDE})$"), 0),
    (re.compile(rf"\.mlp\.(shared_expert\.)?down_proj\.(weight|{_BESIDE})$"), 1),
    (re.compile(rf"\.mlp\.experts\.down_(proj|{_BESIDE})$"), 2),
    (re.compile(r"\.mlp\.experts\.up_bias$"), 1),
)
_GATE_UP = re.compile(rf"\.mlp\.experts\.gate_up_(proj|{_BESIDE})$")
_OUTPUT_BIAS = re.compile(r"\.(self_attn\.o_proj|mlp\.down_proj)\.bias$|\.mlp\.output_bias$")


@dataclass(frozen=True, slots=True)
class Shard:
    """Part number `rank`, from 0, of `size` parts."""

    rank: int
    size: int

    def config(self, config: ModelConfig) -> ModelConfig:
        """The configuration of the part. Raises ValueError for a model that cannot be divided into so many parts."""
        if config.qk_pairs:
            raise ValueError(self._refusal("models with pruned queries and keys are not supported"))
        if config.qk_norm == "all":
            raise ValueError(self._refusal("the model norms all heads of a token together"))
        if find_family(config.family).has_own_modules:
            raise ValueError(self._refusal(f"models of type {config.family} are not supported"))
        layers = [
            layer
            and replace(
                layer,
                moe_intermediate_size=self._share("moe_intermediate_size", layer.moe_intermediate_size),
                shared_expert_intermediate_size=self._share(
                    "shared_expert_intermediate_size", layer.shared_expert_intermediate_size
                ),
            )
            for layer in config.layers
        ]
        dense = config.intermediate_size
        part = replace(
            config,
            layers=tuple(layers),
            num_attention_heads=self._share("num_attention_heads", config.num_attention_heads),
            num_key_value_heads=self._share("num_key_value_heads", config.num_key_value_heads),
            intermediate_size=self._share("intermediate_size", dense) if None in config.layers else dense,
        )
        if config.nested_bits:
            self._check_groups(part)
        return part

    def part(self, name: str, tensor: Tensor, gated: bool) -> Tensor:
        """The part's share of the parameter `name`, in memory of its own; the tensor itself if every part has it.

        gated: whether FFNs have a gate."""
        if _OUTPUT_BIAS.search(name):
            return tensor if self.rank == 0 else tensor * 0  # it must be added once
        if _GATE_UP.search(name):  # [E, 2F, D]: first the gates of all neurons, then their ups; or [E, F, D]
            split: Tensor = tensor.unflatten(1, (2 if gated else 1, -1)).tensor_split(self.size, dim=2)[self.rank]
            return split.flatten(1, 2).contiguous()
        for pattern, dimension in _DIVIDED:
            if pattern.search(name):
                return tensor.tensor_split(self.size, dim=dimension)[self.rank].clone().contiguous()
        return tensor

    def _check_groups(self, part: ModelConfig) -> None:
        """Raises ValueError if a part's columns of a nested matrix are not whole groups, which share a scale."""
        widths = {"o_proj": part.num_attention_heads * part.head_dim}
        for layer in part.layers:
            widths["down_proj"] = part.intermediate_size if layer is None else layer.moe_intermediate_size
            for name, width in widths.items():
                if width % GROUP:
                    raise ValueError(
                        self._refusal(
                            f"a part has {width} columns of {name}, which nested weights can only divide into groups of {GROUP}"
                        )
                    )

    def _share(self, name: str, number: int) -> int:
        if number % self.size:
            raise ValueError(self._refusal(f"{name} is {number}, which cannot be divided by {self.size}"))
        return number // self.size

    def _refusal(self, reason: str) -> str:
        return f"tensor_parallel_size {self.size}: {reason}"


def add_up(model: MoeTransformer, reduce: Callable[[Tensor], None]) -> None:
    """Make the part's attentions and FFNs add their outputs to those of the other parts.

    `reduce` replaces a tensor by the sum of all parts' tensors, in place. Every part calls it in the same order.
    """

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        reduce(output[0] if isinstance(output, tuple) else output)

    for layer in model.model.layers:
        layer.get_submodule("self_attn").register_forward_hook(hook)
        layer.get_submodule("mlp").register_forward_hook(hook)
