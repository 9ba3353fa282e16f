"""The recipe's table [elastic]."""

from dataclasses import dataclass, field, replace

import torch

from ladimo.convert.distill.end_to_end import EndToEndOptions
from ladimo.convert.recipe import Recipe, require
from ladimo.model.config import ModelConfig

MIN_STEPS, MAX_STEPS = 40, 320  # of the end-to-end stage where the recipe names no number
CPU_WORK = 8e11  # parameters x tokens x budgets: about a minute on two cores


@dataclass(frozen=True, slots=True)
class ElasticRecipe:
    """budgets: shares of the dense model's active parameters to solve and train for, most accurate first. There are at least
    three: the first is policy quality, the second balanced, the last fast; those between are named by their share. An empty
    list stands for three around `target_active`. ridge: how strongly a repair is pulled to the original weights, in units of
    each channel's own power; 0 for the best value on the holdout. scan_tokens: holdout tokens on which damage is found.
    uniform: the same width in every layer, to see what the solver's choice is worth.

    steps, batch_tokens, lr, hidden: end-to-end distillation of each budget. 0 steps leave the closed-form solution. -1 stands
    for 320 steps, on a CPU for fewer the larger the model is, down to 40. batch_tokens is at least one block of text. lr is
    Muon's and suits any hidden size. hidden is the weight of the hidden states' relative squared error beside the divergence
    of the logits. This stage holds the whole model in fp32. Models of more than max_parameters are therefore distilled layer
    by layer, each layer in as many steps, with AdamW at layer_lr for a hidden size of 128; the rate falls as one over the
    size.

    routed: budgets of at most this share of active parameters also try routed experts; 0 for none. They are distilled layer
    by layer for routed_steps steps of the recipe's `train`, then end to end. They are kept where their divergence on the
    holdout is lower by the share routed_margin: they save less in larger batches. Models above max_parameters have none.
    """

    budgets: list[float] = field(default_factory=list)
    ridge: float = 0.0
    scan_tokens: int = 4096
    uniform: bool = False
    steps: int = -1
    batch_tokens: int = 1024
    lr: float = 8e-3
    hidden: float = 30.0
    max_parameters: int = 500_000_000
    layer_lr: float = 4e-3
    routed: float = 0.55
    routed_steps: int = 400
    routed_margin: float = 0.1

    def __post_init__(self) -> None:
        falling = all(0 < low < high < 1 for high, low in zip(self.budgets, self.budgets[1:], strict=False))
        enough = not self.budgets or len(self.budgets) >= 3
        require(falling and enough, "elastic.budgets", "must be at least three falling shares below one", self.budgets)
        require(self.ridge >= 0, "elastic.ridge", "must be at least 0", self.ridge)
        require(self.scan_tokens >= 1, "elastic.scan_tokens", "must be at least 1", self.scan_tokens)
        require(self.steps >= -1, "elastic.steps", "must be at least -1", self.steps)
        require(self.batch_tokens >= 1, "elastic.batch_tokens", "must be at least 1", self.batch_tokens)
        require(self.lr > 0, "elastic.lr", "must be above 0", self.lr)
        require(self.layer_lr > 0, "elastic.layer_lr", "must be above 0", self.layer_lr)
        require(self.hidden >= 0, "elastic.hidden", "must be at least 0", self.hidden)
        require(0 <= self.routed <= 1, "elastic.routed", "must be between 0 and 1", self.routed)
        require(self.routed_steps >= 0, "elastic.routed_steps", "must be at least 0", self.routed_steps)
        require(self.routed_margin <= 1, "elastic.routed_margin", "must be at most 1", self.routed_margin)

    @property
    def end_to_end(self) -> EndToEndOptions:
        return EndToEndOptions(self.steps, self.batch_tokens, self.lr, self.hidden)


def resolved(recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe:
    """With budgets that follow from `target_active` and steps that follow from the work, where the recipe names none."""
    elastic, target = recipe.section(ElasticRecipe), recipe.target_active
    if not elastic.budgets:
        budgets = [(1 + target) / 2, target, max(target - 0.75 * (1 - target), target / 2)]
        elastic = replace(elastic, budgets=[round(budget, 4) for budget in budgets])
    if elastic.steps < 0:
        elastic = replace(elastic, steps=default_steps(elastic, config, device))
    return recipe.with_section(elastic)


def default_steps(elastic: ElasticRecipe, config: ModelConfig, device: torch.device) -> int:
    """MAX_STEPS. On a CPU as many as CPU_WORK allows, but at least MIN_STEPS. This depends on the model's shape and never on
    the clock, so that a conversion that resumes goes on with the same number."""
    if device.type != "cpu":
        return MAX_STEPS
    parameters = config.dense_parameters + config.vocab_size * config.hidden_size
    steps = int(CPU_WORK / (parameters * elastic.batch_tokens * len(elastic.budgets)))
    return max(MIN_STEPS, min(MAX_STEPS, steps))
