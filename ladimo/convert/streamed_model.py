"""A model that runs one layer at a time, with its hidden states on the host.

The first layers stay loaded, as far as they fit in a fixed amount of memory. Of the others, one is in memory at a time.

Legend: B sequences, S positions, T = B * S tokens, D hidden_size.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ladimo.checkpoint import TensorReader, choose_dtype, load_layer, load_without_layers, read_config, stored_dtype
from ladimo.convert.kept import Kept
from ladimo.convert.progress import track
from ladimo.model.config import MoeLayerConfig
from ladimo.model.inputs import StepInputs
from ladimo.model.layers import Ffn, GatedMLP, GeluMLP
from ladimo.model.moe import ExpertLayer
from ladimo.model.transformer import DecoderLayer

ExpertSource = Callable[[int], ExpertLayer]  # a layer's number -> its expert layer, on the model's device and in its dtype

CHUNK_TOKENS = 8192  # tokens that pass through a layer together
KEPT_BYTES = 2**30  # the most bytes of layers that stay loaded


class StreamedModel:
    """dtype: that of the weights in memory; "auto": see `choose_dtype`. stored_dtype: that of the weights in the files.

    Raises ValueError with the file's name if the checkpoint is no LLaMA or is incomplete.
    """

    def __init__(self, directory: Path, device: torch.device, dtype: str = "auto", kept_bytes: int = KEPT_BYTES) -> None:
        self.directory, self.device = directory, device
        self.config = read_config(directory)
        self.reader = TensorReader(directory)
        self.dtype = choose_dtype(dtype, directory, device)
        self.stored_dtype = stored_dtype(directory)
        self.ends = load_without_layers(self.reader, self.config, self.dtype, device)
        self._layers: Kept[DecoderLayer] = Kept(kept_bytes, num_bytes)

    def layer(self, index: int) -> DecoderLayer:
        """A layer. All callers share it, so they must not change it."""
        return self._layers.get(index, lambda: load_layer(self.reader, self.config, index, self.dtype, self.device))

    def ffn(self, index: int) -> Ffn:
        """The FFN of a layer, which must be dense."""
        ffn = self.layer(index).mlp
        assert isinstance(ffn, GatedMLP | GeluMLP)
        return ffn

    def experts(self, index: int) -> ExpertLayer:
        """The FFN of a layer, which must be an expert layer."""
        mlp = self.layer(index).mlp
        assert isinstance(mlp, ExpertLayer)
        return mlp

    def embed(self, blocks: Tensor) -> Tensor:
        """Token blocks [B, S] -> hidden states [B, S, D] on the host."""
        embed = self.ends.model.embed_tokens
        return torch.cat([embed(blocks[rows].to(self.device)).cpu() for rows in chunks(blocks)])

    def attend(
        self, layer: DecoderLayer, hidden_states: Tensor, bits: int | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Run the attention of a layer on hidden states [B, S, D], chunk by chunk. For each chunk, yield its sequences, its
        hidden states after attention [T, D], and the FFN's inputs [T, D], on the device. `bits`: how many bits are read of a
        nested layer's attention weights; None: all."""
        for rows in chunks(hidden_states):
            chunk = hidden_states[rows].to(self.device)
            inputs = StepInputs.whole_sequences(torch.zeros(chunk.shape[:2], dtype=torch.int64, device=self.device))
            rope = self.ends.rotary(inputs.positions, self.dtype, inputs.length)
            wanted = () if bits is None else (torch.full_like(inputs.positions, bits),)
            attended, ffn_inputs = layer.attend(chunk.flatten(0, 1), rope, inputs, None, *wanted)
            yield rows, attended, ffn_inputs

    def ffn_data(self, blocks: Tensor, wanted: Collection[int]) -> Iterator[tuple[int, Ffn, Tensor, Tensor]]:
        """Run the dense model. For each wanted layer, yield its number, its FFN, and the FFN's inputs and outputs [T, D] on the
        host. Layers after the last wanted one do not run."""
        hidden_states = self.embed(blocks)
        for index in track(range(max(wanted, default=-1) + 1), "layers"):
            mlp = self.ffn(index)
            kept: list[tuple[Tensor, Tensor]] = []
            for rows, attended, ffn_inputs in self.attend(self.layer(index), hidden_states):
                outputs = mlp(ffn_inputs)
                hidden_states[rows] = (attended + outputs).view(hidden_states[rows].shape).cpu()
                if index in wanted:
                    kept.append((ffn_inputs.cpu(), outputs.cpu()))
            if kept:
                inputs, targets = (torch.cat(parts) for parts in zip(*kept, strict=True))
                yield index, mlp, inputs, targets


def chunks(sequences: Tensor, tokens: int = CHUNK_TOKENS) -> Iterator[slice]:
    """Slices over the first dimension of [B, S, ...], each of about `tokens` tokens."""
    size = max(1, tokens // sequences.shape[1])
    for start in range(0, len(sequences), size):
        yield slice(start, start + size)


def load_experts(reader: TensorReader, layer: MoeLayerConfig, model: StreamedModel) -> ExpertLayer:
    """The expert layer in a reader's files, on the model's device and in its dtype."""
    with torch.device("meta"):
        experts = ExpertLayer(model.config.hidden_size, layer)
    reader.load(experts, "", model.dtype, model.device)
    return experts


def num_bytes(module: nn.Module) -> int:
    """The bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
