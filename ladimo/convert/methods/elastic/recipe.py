"""The recipe's table [elastic]."""

from dataclasses import dataclass, field, replace

import torch

from ladimo.convert.distill.end_to_end import EndToEndOptions
from ladimo.convert.recipe import Recipe, require
from ladimo.model.config import ModelConfig

MIN_STEPS, MAX_STEPS = 40, 320  # steps of the end-to-end stage, if the recipe has no number
CPU_WORK = 8e11  # parameters x tokens x budgets: about a minute on two cores


@dataclass(frozen=True, slots=True)
class ElasticRecipe:
    """The keys of the recipe's table [elastic].

    budgets: the shares of the dense model's active parameters to solve and train for, most accurate first, at least three. The
    first is policy quality, the second balanced, the last fast. The others are named by their share. Empty: three around
    `target_active`.
    ridge: how strongly a repair is pulled to the original weights, in units of each channel's own power; 0: the best value on
    the holdout.
    scan_tokens: the holdout tokens on which damage is found.
    uniform: the same width in every layer, to measure the benefit of the solver's choice.

    End-to-end distillation of each budget:
    steps: 0: the closed-form solution stays. -1: 320 steps; on a CPU, larger models get fewer, but at least 40.
    batch_tokens: tokens per step, at least one block of text.
    lr: Muon's learning rate. One value suits any hidden size.
    hidden: the weight of the hidden states' relative squared error, beside the divergence of the logits.
    max_parameters: this stage has the whole model in memory in fp32. Larger models are distilled layer by layer instead, with
    AdamW, and with the same number of steps for each layer.
    layer_lr: AdamW's learning rate for a hidden size of 128. It is divided by the hidden size / 128.

    Routed experts, which models above max_parameters never have:
    routed: budgets of at most this share of active parameters try them; 0: none.
    routed_steps: the steps of layer-by-layer training (with the other values of the recipe's `train`), before the end-to-end
    stage.
    routed_margin: they are kept if their divergence on the holdout is lower by at least this share. A margin is needed because
    they save less in larger batches.
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
    """The recipe with budgets that follow from `target_active`, and steps that follow from the model's size, if it has none."""
    elastic, target = recipe.section(ElasticRecipe), recipe.target_active
    if not elastic.budgets:
        budgets = [(1 + target) / 2, target, max(target - 0.75 * (1 - target), target / 2)]
        elastic = replace(elastic, budgets=[round(budget, 4) for budget in budgets])
    if elastic.steps < 0:
        elastic = replace(elastic, steps=default_steps(elastic, config, device))
    return recipe.with_section(elastic)


def default_steps(elastic: ElasticRecipe, config: ModelConfig, device: torch.device) -> int:
    """MAX_STEPS. On a CPU, as many as CPU_WORK allows, but at least MIN_STEPS. The number depends on the model's shape and not
    on the clock, so a resumed conversion has the same number."""
    if device.type != "cpu":
        return MAX_STEPS
    parameters = config.dense_parameters + config.vocab_size * config.hidden_size
    steps = int(CPU_WORK / (parameters * elastic.batch_tokens * len(elastic.budgets)))
    return max(MIN_STEPS, min(MAX_STEPS, steps))
