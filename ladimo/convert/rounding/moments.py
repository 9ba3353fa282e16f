"""Gathers the second moments of the inputs of all matrices of a dense model, in one pass, one layer at a time.

Legend: B sequences, S positions, T tokens, D hidden_size, F intermediate_size, H query heads, C head_dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ladimo.convert.progress import track
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.attention.layer import Attention


@dataclass(frozen=True, slots=True)
class LayerMoments:
    """Sums of x x^T over tokens, fp32. attention [D, D]: the input of q, k and v. output [H C, H C]: the input of o_proj. ffn
    [D, D]: the input of gate and up. hidden [F, F]: the input of down_proj."""

    attention: Tensor
    output: Tensor
    ffn: Tensor
    hidden: Tensor


def layer_moments(model: StreamedModel, blocks: Tensor, use: Callable[[int, LayerMoments], None]) -> Tensor:
    """Run token blocks [B, S] through a dense model. Call `use` with each layer's number and moments. Return the hidden states
    after the last layer [B, S, D]."""
    hidden_states = model.embed(blocks)
    for index in track(range(model.config.num_hidden_layers), "layers"):
        layer, mlp = model.layer(index), model.ffn(index)
        attention = layer.self_attn
        assert isinstance(attention, Attention)
        with _watched(attention.q_proj, attention.o_proj, mlp.up_proj, mlp.down_proj) as sums:
            for rows, attended, ffn_inputs in model.attend(layer, hidden_states):
                hidden_states[rows] = (attended + mlp(ffn_inputs)).view(hidden_states[rows].shape).cpu()
        use(index, LayerMoments(*sums))
    return hidden_states


def head_moments(model: StreamedModel, hidden_states: Tensor) -> Tensor:
    """The second moments [D, D] of the output head's input, from the hidden states after the last layer [B, S, D]."""
    normed: Tensor = model.ends.model.norm(hidden_states.flatten(0, 1).to(model.device))
    return (normed.t() @ normed).float().cpu()


@contextmanager
def _watched(*layers: nn.Linear) -> Iterator[list[Tensor]]:
    """Inside this context, the sums of x x^T over the inputs x of these linear layers are gathered."""
    sums = [torch.zeros(layer.in_features, layer.in_features) for layer in layers]

    def watch(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].flatten(0, -2).float()
            total.add_((x.t() @ x).cpu())

        return add

    hooks = [layer.register_forward_pre_hook(watch(total)) for layer, total in zip(layers, sums, strict=True)]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
