"""A converted model under one policy, as every target reads it: what each layer computes, and the weights for it.

Legend: D hidden_size, F moe_intermediate_size, W width of an FFN, N experts asked for.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.checkpoint import TensorReader, copy_tokenizer, read_json, stored_dtype
from ladimo.export.layer_forms import FixedExperts, RoutedExperts, layer_form
from ladimo.model.config import ModelConfig
from ladimo.model.families import find_family
from ladimo.model.nested.layers import EMBEDDING, TIED_HEAD, Matrix, matrix_named, read_matrix, read_steps
from ladimo.model.precision import KEY_VALUE_BITS
from ladimo.model.router import SELECTION_BIAS
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import RoutingPolicy

HEAD = "lm_head.weight"
# Fields of config.json that say nothing of the architecture, so that every target keeps them.
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "initializer_range")

Ffn = tuple[Tensor, Tensor, Tensor]  # gate [W, D], up [W, D], down [D, W]


class PolicyView:
    """The model as it runs under the policy, which does not refine.

    All tensors have `dtype`. None: weights that are read at all bits are as they are stored. Others are rounded to that dtype.
    Raises ValueError for a family with modules of its own, and for what `layer_form` refuses.
    """

    def __init__(self, directory: Path, config: ModelConfig, policy: RoutingPolicy, dtype: torch.dtype | None = None) -> None:
        assert not policy.refines, "what a token reads at more bits is no property of the weights"
        if find_family(config.family).has_own_modules:
            raise ValueError(f"{directory}: family {config.family} has modules that no target knows")
        if config.qk_pairs:
            raise ValueError(f"{directory}: has pruned queries and keys, which no target can hold")
        self.directory, self.source, self.policy = directory, config, policy
        self.dtype, self._wanted = dtype or stored_dtype(directory), dtype
        self._reader = TensorReader(directory)
        self.forms = tuple(self._form(index) for index in range(config.num_hidden_layers))

    @property
    def routed(self) -> dict[int, RoutedExperts]:
        """The layers that choose experts by token."""
        return {index: form for index, form in enumerate(self.forms) if isinstance(form, RoutedExperts)}

    @property
    def head_is_tied(self) -> bool:
        """Whether the output head is the embedding. A head that is read at fewer bits is not."""
        read, top = self.source.bits_read(self.policy.head_bits), self.source.nested_top_bits
        return self.source.tie_word_embeddings and read == top

    @property
    def is_rounded(self) -> bool:
        """Whether the written weights are rounded, where the engine computes with more digits: to bf16 or fp16, when the policy
        reads fewer bits or divides weights by other numbers than powers of two."""
        if self.dtype == torch.float32:
            return False
        rules = [rule for rule in self.policy.layers if rule is not None]
        bits = [self.policy.head_bits, *(rule.bits for rule in rules), *(rule.attention_bits for rule in rules)]
        weights = [weight for form in self.forms if isinstance(form, FixedExperts) for weight in form.weights]
        return any(map(self.source.bits_read, bits)) or any(math.frexp(weight)[0] != 0.5 for weight in weights)

    def name(self, layer: int) -> str:
        """The layer in an error message."""
        return f"policy {self.policy.name!r}, layer {layer}"

    def raw_config(self) -> dict[str, Any]:
        """The content of the model's own config.json."""
        raw: dict[str, Any] = read_json(self.directory / "config.json")
        return raw

    def common_config(self) -> dict[str, Any]:
        """The fields that all architectures like LLaMA have."""
        source, raw = self.source, self.raw_config()
        return {
            **{name: raw[name] for name in KEPT if name in raw},
            "vocab_size": source.vocab_size,
            "hidden_size": source.hidden_size,
            "intermediate_size": max(self.ffn_width(layer) for layer in range(source.num_hidden_layers)),
            "num_hidden_layers": source.num_hidden_layers,
            "num_attention_heads": source.num_attention_heads,
            "num_key_value_heads": source.num_key_value_heads,
            "head_dim": source.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": source.max_position_embeddings,
            "rms_norm_eps": source.rms_norm_eps,
            "rope_parameters": source.rope.to_dict(),
            "tie_word_embeddings": self.head_is_tied,
            **({} if self._wanted is None else {"dtype": str(self._wanted).removeprefix("torch.")}),
        }

    def common_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors but those of FFNs and experts, with transformers' names, at the bits that the policy reads."""
        with torch.device("meta"):
            network = MoeTransformer(self.source)
        for name, _ in network.named_parameters():
            if ".mlp." not in name and name != HEAD:
                yield name, self._get(name)
        if not self.head_is_tied:
            head = TIED_HEAD if self.source.tie_word_embeddings else matrix_named(HEAD)
            yield HEAD, self._matrix(head, self.policy.head_bits)

    def ffn_width(self, layer: int) -> int:
        """The width W of `ffn`."""
        form, moe = self.forms[layer], self.source.layers[layer]
        if form is None or moe is None:
            return self.source.intermediate_size
        return len(form.experts if isinstance(form, FixedExperts) else form.always) * moe.moe_intermediate_size

    def ffn(self, layer: int, width: int) -> Ffn:
        """What the layer computes for every token, as one FFN that is padded with zeros to `width`.

        For a routed layer these are the experts that always run.
        """
        form, prefix = self.forms[layer], f"model.layers.{layer}.mlp."
        if form is None:
            gate, up, down = (self._get(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        else:
            experts = form.experts if isinstance(form, FixedExperts) else form.always
            parts = self.experts(layer, experts)
            weights = form.weights if isinstance(form, FixedExperts) else (1.0,) * len(experts)
            scales = torch.tensor(weights, dtype=parts[2].dtype)[:, None, None]
            gate, up = parts[0].flatten(0, 1), parts[1].flatten(0, 1)
            down = (parts[2] * scales).transpose(0, 1).flatten(1)
        return padded(gate, up, down, width)

    def gelu_ffn(self, layer: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of a layer without a gate, whose experts must be fixed: up [W, D] and its bias [W], down [D, W] and its bias
        [D]."""
        form, prefix = self.forms[layer], f"model.layers.{layer}.mlp."
        if form is None:
            up, up_bias, down, bias = (
                self._get(f"{prefix}{name}_proj.{kind}") for name in ("up", "down") for kind in ("weight", "bias")
            )
        else:
            assert isinstance(form, FixedExperts)
            chosen, scales = torch.tensor(form.experts), torch.tensor(form.weights, dtype=self.dtype)[:, None, None]
            parts = (self._get(f"{prefix}experts.{name}")[chosen] for name in ("gate_up_proj", "up_bias", "down_proj"))
            up, up_bias, down = next(parts).flatten(0, 1), next(parts).flatten(), next(parts)
            down, bias = (down * scales).transpose(0, 1).flatten(1), self._tensor(f"{prefix}output_bias")
        idle = width - len(up)
        return F.pad(up, (0, 0, 0, idle)), F.pad(up_bias, (0, idle)), F.pad(down, (0, idle)), bias

    def experts(self, layer: int, experts: Sequence[int]) -> Ffn:
        """Experts of a layer: gate [N, F, D], up [N, F, D], down [N, D, F]."""
        chosen, prefix = torch.tensor(experts, dtype=torch.int64), f"model.layers.{layer}.mlp.experts."
        gate, up = self._get(f"{prefix}gate_up_proj")[chosen].chunk(2, dim=1)
        return gate, up, self._get(f"{prefix}down_proj")[chosen]

    def router(self, layer: int, experts: Sequence[int]) -> Tensor:
        """The rows [N, D] of a linear router for experts of a layer."""
        moe = self.source.layers[layer]
        assert moe is not None
        rows = torch.tensor(experts, dtype=torch.int64) - moe.fixed_experts
        return self._tensor(f"model.layers.{layer}.mlp.gate.weight")[rows]

    def shared_expert(self, layer: int) -> tuple[Ffn, Tensor]:
        """A shared expert with a gate of its own, and the gate [1, D]."""
        prefix = f"model.layers.{layer}.mlp.shared_expert"
        gate, up, down = (self._get(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))
        return (gate, up, down), self._tensor(f"{prefix}_gate.weight")

    def selection_bias(self, layer: int) -> Tensor:
        """The router's bias [E] in fp32, which changes the order of all experts of a layer."""
        return self._reader.get(f"model.layers.{layer}.mlp.gate.{SELECTION_BIAS}").float()

    def copy_tokenizer(self, out: Path) -> None:
        """Copy the tokenizer's files into `out`."""
        copy_tokenizer(self.directory, out)

    def _form(self, index: int) -> FixedExperts | RoutedExperts | None:
        rule, layer = self.policy.layers[index], self.source.layers[index]
        if rule is None or layer is None:
            return None
        try:
            return layer_form(rule, layer, lambda: self.selection_bias(index))
        except ValueError as error:
            raise ValueError(f"{self.name(index)}: {error}; no target can express that") from error

    def _get(self, name: str) -> Tensor:
        """A tensor at the bits that the policy reads. The embedding is read at all that there are."""
        if name == EMBEDDING:
            embedding = TIED_HEAD if self.source.tie_word_embeddings else matrix_named(EMBEDDING)
            return self._matrix(embedding, None)
        parts = name.split(".")
        rule = self.policy.layers[int(parts[2])] if parts[1:2] == ["layers"] else None
        if rule is None or not parts[-2 if parts[-1] == "weight" else -1].endswith("_proj"):
            return self._tensor(name)
        bits = rule.attention_bits if "self_attn" in parts else rule.bits
        if bits is not None and parts[-2] in ("k_proj", "v_proj"):
            bits = max(bits, KEY_VALUE_BITS)
        return self._matrix(matrix_named(name), bits)

    def _matrix(self, matrix: Matrix, bits: int | None) -> Tensor:
        return self._cast(read_matrix(self._reader, matrix, bits, self.dtype))

    def _tensor(self, name: str) -> Tensor:
        """A tensor of one precision."""
        return self._cast(self._reader.get(name))

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor if self._wanted is None else tensor.to(self._wanted)


class StepsView(PolicyView):
    """The same model with numbers of which the weights are whole multiples, in their places (`read_steps`). They are zero where
    weights are not rounded. Targets cut and join these tensors as they do with weights, so they tell how rounded weights can be
    written as integers."""

    def _matrix(self, matrix: Matrix, bits: int | None) -> Tensor:
        read = self.source.bits_read(bits)
        return self._tensor(matrix.weight) if read is None else read_steps(self._reader, matrix, read)

    def _tensor(self, name: str) -> Tensor:
        return torch.zeros(self._reader.shape(name))


def padded(gate: Tensor, up: Tensor, down: Tensor, width: int) -> Ffn:
    """An FFN, or several of them, with zeros for neurons up to `width`: gate and up [..., W, D], down [..., D, W]."""
    idle = width - down.shape[-1]
    return F.pad(gate, (0, 0, 0, idle)), F.pad(up, (0, 0, 0, idle)), F.pad(down, (0, idle))
