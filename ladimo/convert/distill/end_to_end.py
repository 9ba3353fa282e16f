"""End-to-end distillation: trains the FFNs of a student on the dense model's next-token distribution and hidden states.

The trained FFNs are narrow or routed. The whole model is in memory.

Legend: B sequences, S positions, D hidden_size, L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.convert.distill.layerwise import CURVE_POINTS
from ladimo.convert.distill.muon import Muon
from ladimo.convert.ffn.expert_layer import full_rule, route, run_experts
from ladimo.convert.progress import track
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.inputs import StepInputs
from ladimo.model.layers import Ffn
from ladimo.model.moe import ExpertLayer
from ladimo.model.transformer import DecoderLayer

WARMUP = 0.1
FULL_RATE_KL = 1.0  # nats; a student with at least this KL from the dense model starts at the full learning rate
RATE_POWER = 0.3  # another student starts at the full rate times (its KL / FULL_RATE_KL) ** RATE_POWER

Student = Sequence[Ffn | ExpertLayer | None]  # one FFN per layer; None: the dense one


@dataclass(frozen=True, slots=True)
class KlPoint:
    """KL divergence from the dense model after `step` steps, in nats per token. kl: on the training batches, as a mean since
    the last point. holdout: on the holdout; None if it was not measured."""

    step: int
    kl: float
    holdout: float | None


@dataclass(frozen=True, slots=True)
class EndToEndOptions:
    """steps: for each student. batch_tokens: tokens per step, at least one block. lr: Muon's learning rate. hidden: the weight
    of the hidden states' relative squared error, beside the divergence of the next-token distributions."""

    steps: int
    batch_tokens: int
    lr: float
    hidden: float


def distill_end_to_end(
    dense: StreamedModel,
    students: Sequence[Student],
    fit: Tensor,
    holdout: Tensor,
    options: EndToEndOptions,
    generator: torch.Generator,
) -> list[list[KlPoint]]:
    """Train the FFNs of all students in place, on the same batches of token blocks fit [B, S]. Return a curve for each student.

    The loss is the forward KL plus options.hidden times the relative squared error of the hidden states, as a mean over layers
    (as in TinyBERT, arXiv 1909.10351, equation 8). With little text, the D values per token and layer teach more than next
    tokens alone. The optimizer is Muon with a warm-up and a cosine decay to zero. If the KL of a student on the holdout does
    not fall, it gets its old weights back. `dense` must have fp32 weights. Raises ValueError if the loss diverges.
    """
    network = Network(dense)
    sequences = max(1, options.batch_tokens // fit.shape[1])
    trained = [[mlp for mlp in student if mlp is not None] for student in students]
    before = [[{name: w.clone() for name, w in mlp.state_dict().items()} for mlp in mlps] for mlps in trained]
    optimizers = [Muon([weight for mlp in mlps for weight in _matrices(mlp)], options.lr) for mlps in trained]
    initial = network.holdout_kls(students, holdout)
    # Muon's steps do not get smaller with the gradient. So a student that is close to the dense model needs a smaller rate.
    rates = [options.lr * min(1.0, (value / FULL_RATE_KL) ** RATE_POWER) for value in initial]
    curves = [[KlPoint(0, value, value)] for value in initial]
    running: list[list[float]] = [[] for _ in students]
    order = torch.empty(0, dtype=torch.int64)
    for step in track(range(1, options.steps + 1), "end-to-end steps"):
        if len(order) < min(sequences, len(fit)):
            order = torch.randperm(len(fit), generator=generator)
        blocks, order = fit[order[:sequences]], order[sequences:]
        with torch.no_grad():
            target = network.run(blocks, None)
        for student, optimizer, losses, rate in zip(students, optimizers, running, rates, strict=True):
            found = network.run(blocks, student)
            kl = F.kl_div(found.log_probs, target.log_probs, reduction="sum", log_target=True) / len(target.log_probs)
            (kl + options.hidden * hidden_error(found, target)).backward()
            for group in optimizer.param_groups:
                group["lr"] = rate * _factor(step, options.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(kl.item())
        if not all(math.isfinite(losses[-1]) for losses in running):
            raise ValueError(f"end-to-end distillation diverged at step {step}; lower its learning rate (elastic.lr)")
        if step in {round(options.steps * (point + 1) / CURVE_POINTS) for point in range(CURVE_POINTS - 1)}:
            for curve, losses in zip(curves, running, strict=True):
                curve.append(KlPoint(step, sum(losses) / len(losses), None))
                losses.clear()
    reached = network.holdout_kls(students, holdout)
    for mlps, saved, curve, losses, final in zip(trained, before, curves, running, reached, strict=True):
        for mlp in mlps:
            mlp.requires_grad_(False)
        curve.append(KlPoint(options.steps, sum(losses) / max(1, len(losses)), final))
        if final >= (curve[0].holdout or 0.0):
            for mlp, weights_before in zip(mlps, saved, strict=True):
                mlp.load_state_dict(weights_before)
    return curves


@dataclass(frozen=True, slots=True)
class Pass:
    """The results of a forward pass. log_probs: those of the next tokens [B * S, V]. hidden_states: after each layer
    [B * S, D]."""

    log_probs: Tensor
    hidden_states: list[Tensor]


class Network:
    """The whole dense model, which can run with other FFNs in place of its own."""

    def __init__(self, dense: StreamedModel) -> None:
        self.dense = dense
        self.layers: list[DecoderLayer] = [dense.layer(index) for index in range(dense.config.num_hidden_layers)]

    def run(
        self, blocks: Tensor, student: Sequence[nn.Module | None] | None, attentions: Sequence[nn.Module] | None = None
    ) -> Pass:
        """Run token blocks [B, S]. student: the FFNs to use, each [T, D] -> [T, D]; None: those of the dense model.
        attentions: those to use, with the arguments of `Attention`; None: those of the dense model."""
        device = self.dense.device
        inputs = StepInputs.whole_sequences(blocks.to(device))
        rope = self.dense.ends.rotary(inputs.positions, self.dense.dtype, inputs.length)
        states = [self.dense.ends.model.embed_tokens(inputs.input_ids)]
        for index, layer in enumerate(self.layers):
            other = None if attentions is None else attentions[index]
            attended, ffn_inputs = layer.attend(states[-1], rope, inputs, None, attention=other)
            mlp = None if student is None else student[index]
            states.append(attended + _run(layer.mlp if mlp is None else mlp, ffn_inputs))
        return Pass(self.dense.ends.logits(states[-1]).float().log_softmax(dim=-1), states[1:])

    @torch.no_grad()
    def holdout_kls(self, students: Sequence[Student], blocks: Tensor) -> list[float]:
        """For each student, its KL divergence from the dense model on token blocks [B, S], in nats per token."""
        totals = [0.0] * len(students)
        for row in blocks.split(1):
            target = self.run(row, None).log_probs
            for number, student in enumerate(students):
                found = self.run(row, student).log_probs
                totals[number] += F.kl_div(found, target, reduction="sum", log_target=True).item()
        return [total / blocks.numel() for total in totals]


def hidden_error(found: Pass, target: Pass) -> Tensor:
    """The squared error of the hidden states, divided by their variance in the dense model, as a mean over layers."""
    variances = [(wanted - wanted.mean(dim=0)).square().sum() for wanted in target.hidden_states]
    pairs = zip(found.hidden_states, target.hidden_states, variances, strict=True)
    errors = [(own - wanted).square().sum() / variance for own, wanted, variance in pairs]
    return torch.stack(errors).mean()


def _matrices(mlp: nn.Module) -> list[nn.Parameter]:
    """The weights to train. Biases stay as they are, because Muon's steps are matrices."""
    for name, weight in mlp.named_parameters():
        weight.requires_grad_(not name.endswith("bias"))
    return [weight for weight in mlp.parameters() if weight.requires_grad]


def _run(mlp: nn.Module, inputs: Tensor) -> Tensor:
    """Run an FFN: [T, D] -> [T, D]. An expert layer runs under its rule in `full`."""
    if isinstance(mlp, ExpertLayer):
        _, topk_weights, topk_ids = route(mlp, inputs, full_rule(mlp))
        return run_experts(mlp, inputs, topk_weights, topk_ids)
    out: Tensor = mlp(inputs)
    return out


def _factor(step: int, steps: int) -> float:
    """The factor on the learning rate: linear warm-up, then cosine decay to zero."""
    warmup = max(1.0, WARMUP * steps)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
