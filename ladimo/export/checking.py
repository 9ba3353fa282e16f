"""Compares what was written with what our network computes under the policy."""

import logging
from functools import cached_property

import torch
from torch import Tensor

from ladimo.checkpoint import load_model
from ladimo.export.policy_view import PolicyView
from ladimo.model.inputs import RoutingTables, StepInputs

SEQUENCES, TOKENS = 4, 64
TOLERANCE = 1e-4  # between logits in fp32
AGREEMENT = 0.95  # of the most likely tokens, where weights are rounded
SPREAD = 0.25  # of the logits' standard deviation: the mean error allowed where activations are rounded to integers

logger = logging.getLogger(__name__)


class Check:
    """What our network computes under the view's policy for a few prompts, to compare other programs with.

    ids: random token ids [B, S], the same for every target.
    """

    def __init__(self, view: PolicyView) -> None:
        self.view = view
        length = min(TOKENS, view.source.max_position_embeddings)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(view.source.vocab_size, (SEQUENCES, length), generator=generator)

    @cached_property
    def own_logits(self) -> Tensor:
        """Logits [B * S, V] in fp32, computed on the CPU."""
        model = load_model(self.view.directory, torch.float32, torch.device("cpu"))
        config = self.view.source
        tables = RoutingTables.empty(2, config.num_hidden_layers, config.max_num_experts, "cpu")
        tables.write(1, *self.view.policy.to_rows(config.max_num_experts))
        with torch.inference_mode():
            logits: Tensor = model(StepInputs.whole_sequences(self.ids), None, tables).logits
        return logits

    def compare(self, written: Tensor, program: str, rounded: bool, integers: bool = False) -> None:
        """Compare the logits [B * S, V] of a program with our own. Raises ValueError if they differ by more than TOLERANCE. If
        weights or activations are rounded, the most likely tokens must agree instead. `integers`: activations are rounded to 8
        bits. Then logits must differ by no more than SPREAD in the mean."""
        own = self.own_logits
        difference = (own - written).abs().max().item()
        agreement = (own.argmax(dim=-1) == written.argmax(dim=-1)).float().mean().item()
        logger.info("%s: logits differ by at most %.1e, next tokens agree in %.1f%%", program, difference, 100 * agreement)
        if integers:
            error = ((own - written).square().mean() / own.var()).sqrt().item()
            if not error <= SPREAD:
                raise ValueError(f"{program}: logits differ by {error:.2f} of their spread, {SPREAD} is allowed")
            return
        if rounded and not agreement >= AGREEMENT:
            raise ValueError(f"{program}: next tokens agree in {agreement:.1%}, at least {AGREEMENT:.0%} are needed")
        if not rounded and not difference <= TOLERANCE:  # also for NaN
            raise ValueError(f"{program}: logits differ from our own by {difference:.1e}, {TOLERANCE:g} is allowed")
