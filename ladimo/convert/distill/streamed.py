"""Streamed distillation for large models: students run beside the dense model, with one layer in memory at a time.

Legend: B sequences, S positions, T = B * S tokens, D hidden_size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ladimo.convert.progress import track
from ladimo.convert.streamed_model import CHUNK_TOKENS, StreamedModel
from ladimo.model.transformer import DecoderLayer

Substitute = Callable[[int, int, Tensor, Tensor], nn.Module | None]


def run_students(dense: StreamedModel, blocks: Tensor, num_students: int, substitute: Substitute) -> None:
    """Run token blocks [B, S] through the dense model and its students, layer by layer.

    substitute(layer, student, inputs, targets) returns the FFN of a student in a layer, in fp32; None: the dense FFN. inputs
    [T, D]: the FFN's inputs in this student, whose earlier layers have changed the hidden states. targets [T, D], fp32: the FFN
    outputs with which the student's hidden states would equal those of the dense model. Both are on the host, and so is one
    hidden state per token and student.
    """
    wanted = dense.embed(blocks)
    own = [wanted] * num_students
    for index in track(range(dense.config.num_hidden_layers), "layers"):
        layer = dense.layer(index)
        attended, inputs = _attend(dense, layer, wanted)
        wanted = _add(dense, attended, inputs, layer.mlp, dense.dtype).view_as(wanted)
        for student in track(range(num_students), "students"):
            attended, inputs = _attend(dense, layer, own[student])
            targets = wanted.view_as(attended).float() - attended.float()
            mlp = substitute(index, student, inputs, targets)
            dtype = dense.dtype if mlp is None else torch.float32
            own[student] = _add(dense, attended, inputs, layer.mlp if mlp is None else mlp, dtype).view_as(wanted)


def _attend(dense: StreamedModel, layer: DecoderLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Run attention on hidden states [B, S, D]. Returns the states after it and the FFN's inputs, [T, D] on the host."""
    parts = [(attended.cpu(), inputs.cpu()) for _, attended, inputs in dense.attend(layer, hidden_states)]
    attended, inputs = (torch.cat(part) for part in zip(*parts, strict=True))
    return attended, inputs


@torch.no_grad()
def _add(dense: StreamedModel, attended: Tensor, inputs: Tensor, mlp: nn.Module, dtype: torch.dtype) -> Tensor:
    """Run an FFN of this dtype, and return the hidden states [T, D] after it on the host."""
    pairs = zip(attended.split(CHUNK_TOKENS), inputs.split(CHUNK_TOKENS), strict=True)
    return torch.cat([before + mlp(part.to(dense.device, dtype)).to("cpu", before.dtype) for before, part in pairs])
