"""Models that were trained as Mixture-of-Experts, in the place of a dense source: they are measured against themselves.

Legend: T tokens, D hidden_size.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ladimo.checkpoint import read_config
from ladimo.convert.ffn.expert_layer import full_rule, route, run_experts
from ladimo.convert.progress import track
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.moe import ExpertLayer
from ladimo.model.transformer import DecoderLayer


class Trained(nn.Module):
    """An expert layer as it was trained, in the place of an FFN."""

    def __init__(self, experts: ExpertLayer) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, inputs: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        _, topk_weights, topk_ids = route(self.experts, inputs, full_rule(self.experts))
        return run_experts(self.experts, inputs, topk_weights, topk_ids)


class StockModel(StreamedModel):
    """A streamed model in which the rule None stands for the number of experts that it was trained with."""

    def layer(self, index: int) -> DecoderLayer:
        """Shared by all who ask for it: never change it."""
        layer = super().layer(index)
        if isinstance(layer.mlp, ExpertLayer):
            layer.mlp = Trained(layer.mlp)
        return layer

    def experts(self, index: int) -> ExpertLayer:
        """The expert layer of a layer, which must have one."""
        mlp = self.layer(index).mlp
        assert isinstance(mlp, Trained)
        return mlp.experts

    @torch.no_grad()
    def expert_data(self, blocks: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Run token blocks [B, S]. For each expert layer yield its number, and its inputs and outputs [T, D] on the host."""
        hidden_states = self.embed(blocks)
        for index in track(range(self.config.num_hidden_layers), "layers"):
            layer, kept = self.layer(index), []
            for rows, attended, ffn_inputs in self.attend(layer, hidden_states):
                outputs = layer.mlp(ffn_inputs)
                hidden_states[rows] = (attended + outputs).view(hidden_states[rows].shape).cpu()
                kept.append((ffn_inputs.cpu(), outputs.cpu()))
            if self.config.layers[index] is not None:
                inputs, outputs = (torch.cat(parts) for parts in zip(*kept, strict=True))
                yield index, inputs, outputs


def open_model(directory: Path, device: torch.device) -> StreamedModel:
    """A checkpoint of any kind, to be measured. Raises ValueError if it is broken."""
    kind = StockModel if read_config(directory).trained_as_moe else StreamedModel
    return kind(directory, device)
