"""A checkpoint read one layer at a time, its hidden states kept on the host. The weights of one layer are in memory at once.

Legend: B sequences, S positions, T = B * S tokens, D hidden_size.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ladimo.checkpoint import TensorReader, choose_dtype, load_layer, load_without_layers, read_config
from ladimo.model.config import MoeLayerConfig
from ladimo.model.inputs import StepInputs
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer
from ladimo.model.transformer import DecoderLayer

ExpertSource = Callable[[int], ExpertLayer]  # an expert layer on the model's device by its layer's number
CHUNK_TOKENS = 8192  # tokens that pass through a layer at once


class StreamedModel:
    """Raises ValueError naming the file when the checkpoint is no LLaMA or not whole."""

    def __init__(self, directory: Path, device: torch.device, dtype: str = "auto") -> None:
        self.directory, self.device = directory, device
        self.config = read_config(directory)
        self.reader = TensorReader(directory)
        self.dtype = choose_dtype(dtype, directory, device)
        self.ends = load_without_layers(self.reader, self.config, self.dtype, device)

    def layer(self, index: int) -> DecoderLayer:
        return load_layer(self.reader, self.config, index, self.dtype, self.device)

    def embed(self, blocks: Tensor) -> Tensor:
        """Token blocks [B, S] -> hidden states [B, S, D] on the host."""
        embed = self.ends.model.embed_tokens
        return torch.cat([embed(blocks[rows].to(self.device)).cpu() for rows in chunks(blocks)])

    def attend(self, layer: DecoderLayer, hidden_states: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Chunk by chunk of hidden states [B, S, D]: the sequences it covers, its hidden states after attention [T, D] and the
        FFN's inputs [T, D], on the device."""
        for rows in chunks(hidden_states):
            chunk = hidden_states[rows].to(self.device)
            inputs = StepInputs.whole_sequences(torch.zeros(chunk.shape[:2], dtype=torch.int64, device=self.device))
            rope = self.ends.rotary(inputs.positions, self.dtype)
            attended = layer.attend(chunk.flatten(0, 1), rope, inputs, None)
            yield rows, attended, layer.post_attention_layernorm(attended)

    def ffn_data(self, blocks: Tensor, wanted: Collection[int]) -> Iterator[tuple[int, GatedMLP, Tensor, Tensor]]:
        """Run the dense model; for each wanted layer yield its number, its FFN, and the FFN's inputs and outputs [T, D]
        on the host. Layers after the last wanted one are not read."""
        hidden_states = self.embed(blocks)
        for index in range(max(wanted, default=-1) + 1):
            layer = self.layer(index)
            assert isinstance(layer.mlp, GatedMLP)
            kept: list[tuple[Tensor, Tensor]] = []
            for rows, attended, ffn_inputs in self.attend(layer, hidden_states):
                outputs = layer.mlp(ffn_inputs)
                hidden_states[rows] = (attended + outputs).view(hidden_states[rows].shape).cpu()
                if index in wanted:
                    kept.append((ffn_inputs.cpu(), outputs.cpu()))
            if kept:
                inputs, targets = (torch.cat(parts) for parts in zip(*kept, strict=True))
                yield index, layer.mlp, inputs, targets


def chunks(sequences: Tensor) -> Iterator[slice]:
    """Slices over the first dimension of [B, S, ...], each of about CHUNK_TOKENS tokens."""
    size = max(1, CHUNK_TOKENS // sequences.shape[1])
    for start in range(0, len(sequences), size):
        yield slice(start, start + size)


def load_experts(reader: TensorReader, prefix: str, layer: MoeLayerConfig, model: StreamedModel) -> ExpertLayer:
    """One expert layer on the model's device and in its dtype."""
    with torch.device("meta"):
        experts = ExpertLayer(model.config.hidden_size, layer)
    reader.load(experts, prefix, model.dtype, model.device)
    return experts


def experts_of(own: StreamedModel) -> ExpertSource:
    def experts(index: int) -> ExpertLayer:
        layer = own.config.layers[index]
        assert layer is not None
        return load_experts(own.reader, f"model.layers.{index}.mlp.", layer, own)

    return experts
