"""End-to-end distillation of narrow and of routed FFNs on the dense model's next-token distribution and hidden states, for
models that fit in memory whole.

Legend: B sequences, S positions, D hidden_size, L layers.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ladimo.convert.distill.layerwise import CURVE_POINTS
from ladimo.convert.distill.muon import Muon
from ladimo.convert.ffn.expert_layer import full_rule, route, run_experts
from ladimo.convert.recipe import ElasticRecipe
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.inputs import StepInputs
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer
from ladimo.model.transformer import DecoderLayer

logger = logging.getLogger(__name__)

WARMUP = 0.1
FULL_RATE_KL = 1.0  # nats; a student that is at least so far from its teacher is trained at the full learning rate
RATE_POWER = 0.3  # a nearer one at one that falls with this power of the distance

Student = Sequence[GatedMLP | ExpertLayer | None]  # one FFN per layer, None where the dense one stays


@dataclass(frozen=True, slots=True)
class KlPoint:
    """KL divergence from the dense model in nats per token after `step` steps. kl: mean since the last point; holdout: on held
    out text, where it was measured."""

    step: int
    kl: float
    holdout: float | None


def distill_end_to_end(
    dense: StreamedModel,
    students: Sequence[Student],
    fit: Tensor,
    holdout: Tensor,
    recipe: ElasticRecipe,
    generator: torch.Generator,
) -> list[list[KlPoint]]:
    """Train the students' FFNs in place on token blocks fit [B, S], each student as often, on the same batches; one curve each.

    The loss is the forward KL plus recipe.hidden times the hidden states' relative squared error, mean over layers (hidden
    states as in TinyBERT, arXiv 1909.10351, equation 8): from little text, D values per token and layer teach more than its
    next tokens alone. Muon, warm-up, cosine decay to zero. A student whose holdout KL this does not lower gets its weights
    back. `dense` holds fp32 weights. Raises ValueError when the loss diverges.
    """
    network = Network(dense)
    sequences = max(1, recipe.batch_tokens // fit.shape[1])
    trained = [[mlp for mlp in student if mlp is not None] for student in students]
    before = [[{name: w.clone() for name, w in mlp.state_dict().items()} for mlp in mlps] for mlps in trained]
    optimizers = [Muon([w for mlp in mlps for w in mlp.requires_grad_().parameters()], recipe.lr) for mlps in trained]
    initial = [network.holdout_kl(student, holdout) for student in students]
    # Muon's steps have the size of the learning rate whatever the gradient: a student near its teacher needs smaller ones.
    rates = [recipe.lr * min(1.0, (value / FULL_RATE_KL) ** RATE_POWER) for value in initial]
    curves = [[KlPoint(0, value, value)] for value in initial]
    running: list[list[float]] = [[] for _ in students]
    order = torch.empty(0, dtype=torch.int64)
    for step in tqdm(range(1, recipe.steps + 1), desc="  end to end", leave=False, disable=None):
        if len(order) < min(sequences, len(fit)):
            order = torch.randperm(len(fit), generator=generator)
        blocks, order = fit[order[:sequences]], order[sequences:]
        with torch.no_grad():
            target = network.run(blocks, None)
        for student, optimizer, losses, rate in zip(students, optimizers, running, rates, strict=True):
            found = network.run(blocks, student)
            kl = F.kl_div(found.log_probs, target.log_probs, reduction="sum", log_target=True) / len(target.log_probs)
            (kl + recipe.hidden * hidden_error(found, target)).backward()
            for group in optimizer.param_groups:
                group["lr"] = rate * _factor(step, recipe.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(kl.item())
        if not all(math.isfinite(losses[-1]) for losses in running):
            raise ValueError(f"end-to-end distillation diverged at step {step}; lower elastic.lr")
        if step in {round(recipe.steps * (point + 1) / CURVE_POINTS) for point in range(CURVE_POINTS - 1)}:
            for curve, losses in zip(curves, running, strict=True):
                curve.append(KlPoint(step, sum(losses) / len(losses), None))
                losses.clear()
    for student, mlps, saved, curve, losses in zip(students, trained, before, curves, running, strict=True):
        for mlp in mlps:
            mlp.requires_grad_(False)
        final = network.holdout_kl(student, holdout)
        curve.append(KlPoint(recipe.steps, sum(losses) / max(1, len(losses)), final))
        if final >= (curve[0].holdout or 0.0):
            for mlp, weights_before in zip(mlps, saved, strict=True):
                mlp.load_state_dict(weights_before)
    return curves


@dataclass(frozen=True, slots=True)
class Pass:
    """log_probs: of the next tokens [B * S, V]. hidden_states: after every layer [B * S, D]."""

    log_probs: Tensor
    hidden_states: list[Tensor]


class Network:
    """The dense model whole in memory, run with other FFNs in place of its own."""

    def __init__(self, dense: StreamedModel) -> None:
        self.dense = dense
        self.layers: list[DecoderLayer] = [dense.layer(index) for index in range(dense.config.num_hidden_layers)]

    def run(self, blocks: Tensor, student: Student | None) -> Pass:
        """Token blocks [B, S]."""
        device = self.dense.device
        inputs = StepInputs.whole_sequences(blocks.to(device))
        rope = self.dense.ends.rotary(inputs.positions, self.dense.dtype)
        states = [self.dense.ends.model.embed_tokens(inputs.input_ids)]
        for index, layer in enumerate(self.layers):
            attended = layer.attend(states[-1], rope, inputs, None)
            mlp = None if student is None else student[index]
            states.append(attended + _run(layer.mlp if mlp is None else mlp, layer.post_attention_layernorm(attended)))
        return Pass(self.dense.ends.logits(states[-1]).float().log_softmax(dim=-1), states[1:])

    @torch.no_grad()
    def holdout_kl(self, student: Student, blocks: Tensor) -> float:
        total = sum(
            F.kl_div(self.run(row, student).log_probs, self.run(row, None).log_probs, reduction="sum", log_target=True).item()
            for row in blocks.split(1)
        )
        return total / blocks.numel()


def hidden_error(found: Pass, target: Pass) -> Tensor:
    """Squared error of the hidden states over their variance in the teacher, mean over layers: 0 is the teacher itself."""
    variances = [(wanted - wanted.mean(dim=0)).square().sum() for wanted in target.hidden_states]
    pairs = zip(found.hidden_states, target.hidden_states, variances, strict=True)
    errors = [(own - wanted).square().sum() / variance for own, wanted, variance in pairs]
    return torch.stack(errors).mean()


def _run(mlp: nn.Module, inputs: Tensor) -> Tensor:
    """[T, D] -> [T, D], an expert layer under its rule in `full`."""
    if isinstance(mlp, ExpertLayer):
        _, topk_weights, topk_ids = route(mlp, inputs, full_rule(mlp))
        return run_experts(mlp, inputs, topk_weights, topk_ids)
    out: Tensor = mlp(inputs)
    return out


def _factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warmup = max(1.0, WARMUP * steps)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))
