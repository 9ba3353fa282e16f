"""One pass forward and one back through a model: gradients of next tokens with respect to the output of every layer.

Whoever asks what a change of a layer does to the model needs only to run that layer: see `sensitivity` and `precision`.

Legend: B sequences, S positions, T = B * S tokens, D hidden_size, V vocabulary, M samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ladimo.convert.ffn.expert_layer import run_ffn
from ladimo.convert.progress import track
from ladimo.convert.streamed_model import StreamedModel, chunks
from ladimo.model.transformer import DecoderLayer

CHUNK_TOKENS = 2048  # that pass through a layer at once, with all that a gradient needs


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some sequences of the blocks, `rows`, as a layer sees them: its inputs [B, S, D], its states after attention, the FFN's
    inputs and outputs [T, D], and the gradients [M, T, D] with respect to the layer's output. All without gradients of their
    own."""

    rows: slice
    layer: DecoderLayer
    hidden_states: Tensor
    attended: Tensor
    ffn_inputs: Tensor
    ffn_outputs: Tensor
    gradients: Tensor

    def products(self, error: Tensor) -> Tensor:
        """A change of the layer's output [T, D] -> per sequence [B] the sum of its squared products with the gradients."""
        squares = (self.gradients.float() * error.float()).sum(dim=2).double().square().sum(dim=0)  # [T]
        return squares.view(self.hidden_states.shape[:2]).sum(dim=1).cpu()


Visit = Callable[[Chunk], None]


def run_backward(model: StreamedModel, blocks: Tensor, samples: int, first: int, begin: Callable[[int], Visit]) -> None:
    """Run token blocks [B, S] through the model under policy `full`, and back from the last layer to layer `first`. `begin` is
    called with each layer's number, and what it returns with each chunk. One layer is in memory at a time."""
    inputs = layer_inputs(model, blocks)
    gradients = output_gradients(model, inputs.pop(), samples)
    for index in track(list(reversed(range(first, model.config.num_hidden_layers))), "layers backward"):
        hidden_states, layer, visit = inputs.pop(), model.layer(index), begin(index)
        for rows in chunks(blocks, CHUNK_TOKENS):
            given = hidden_states[rows].to(model.device).requires_grad_()
            attended, ffn_inputs = _attend(model, layer, given)
            outputs = run_ffn(layer.mlp, ffn_inputs)
            back = gradients[:, rows].to(model.device).flatten(1, 2)  # [M, T, D]
            with torch.no_grad():
                visit(Chunk(rows, layer, given.detach(), attended.detach(), ffn_inputs.detach(), outputs.detach(), back))
            if index > first:
                out = (attended + outputs).view(given.shape)
                for sample in range(samples):
                    (found,) = torch.autograd.grad(
                        out, given, gradients[sample, rows].to(out), retain_graph=sample < samples - 1
                    )
                    gradients[sample, rows] = found.to(gradients)


@torch.no_grad()
def layer_inputs(model: StreamedModel, blocks: Tensor) -> list[Tensor]:
    """Hidden states [B, S, D] before each layer and after the last, on the host."""
    states = [model.embed(blocks)]
    for index in track(range(model.config.num_hidden_layers), "layers forward"):
        layer, after = model.layer(index), torch.empty_like(states[-1])
        for rows, attended, ffn_inputs in model.attend(layer, states[-1]):
            after[rows] = (attended + run_ffn(layer.mlp, ffn_inputs)).view(after[rows].shape).cpu()
        states.append(after)
    return states


def output_gradients(model: StreamedModel, hidden_states: Tensor, samples: int) -> Tensor:
    """Gradients [M, B, S, D] of the log-probability of a drawn next token after every position but the last, with respect to
    the last layer's output [B, S, D]; fp32 on the host."""
    generator = torch.Generator(model.device).manual_seed(0)
    gradients = torch.zeros(samples, *hidden_states.shape)
    for row, one in enumerate(track(hidden_states, "sequences", len(hidden_states))):
        given = one[:-1].to(model.device).requires_grad_()
        logits = model.ends.logits(given).float()
        probabilities = logits.detach().softmax(dim=-1)
        for sample in range(samples):
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            score = -probabilities  # the gradient of log p(drawn) with respect to the logits: one at the drawn token, less p
            score.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=score.dtype))
            (found,) = torch.autograd.grad(logits, given, score, retain_graph=sample < samples - 1)
            gradients[sample, row, :-1] = found.float().cpu()
    return gradients


def _attend(model: StreamedModel, layer: DecoderLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Whole sequences [B, S, D] on the device, with gradients: states after attention and the FFN's inputs, [T, D]."""
    ((_, attended, ffn_inputs),) = model.attend(layer, hidden_states)
    return attended, ffn_inputs
