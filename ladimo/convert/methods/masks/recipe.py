"""The recipe's tables [tomoe] and [disp]. Both methods are one procedure with different values."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from ladimo.convert.recipe import Recipe, require
from ladimo.model.config import ModelConfig

MIN_STEPS, MAX_STEPS = 100, 600  # training steps, if the recipe has no number
CPU_WORK = 1.6e12  # parameters x tokens: a few minutes on one core


@dataclass(frozen=True, slots=True)
class MaskRecipe:
    """The keys of both tables.

    budgets: the shares of the dense model's active parameters to train for, falling. One network learns all of them in turn,
    and a smaller budget keeps a part of what a larger one keeps. With one budget, the method is as published. Empty: three
    around `target_active`.
    steps: -1: 600; on a CPU, larger models get fewer, but at least 100.
    batch_tokens: tokens per step, at least one block of text.
    lr, weight_decay: those of AdamW. decay: the learning rate falls to zero along a cosine; false: it is constant.
    distill: the weight of the forward KL from the dense model; 0: the loss is the cross-entropy of the next token.
    start: before training, masks and routers are set from statistics of the neurons. False: the masks hold nearly all neurons
    and the routers are random, as published; then many thousands of steps are needed.
    ramp: the budget falls from one to its value in this share of the steps, so that neurons are dropped one after another.
    token_noise: each token draws its own noise for its expert's mask; false: an expert's mask is drawn once for all tokens of a
    step.
    soft: the sampled masks are numbers between 0 and 1; false: they are rounded to 0 or 1.
    mask_once: the mask multiplies the product of both branches of the FFN, so that a dropped neuron gets a gradient. False: it
    multiplies each branch, so that only the penalties can bring a neuron back.
    size: the weight of the penalty on the distance from the budget. union: of that on neurons that no expert holds; the
    published 1.5 leaves a tenth of them out after few steps. balance: of that on experts with more tokens than others.
    settle: the last share of the steps trains whole blocks instead of neurons, as the checkpoint stores them.
    qk: the share of the channels of queries and keys that every attention keeps, the same channels in all policies. Below 1,
    `full` is not the dense model any more.
    qk_train: trained gates choose these channels. False: from the first step, those with the most power in the statistics are
    kept; so `start` is needed.
    block: neurons per block; 0: a multiple of 16 that gives at most 128 blocks.
    """

    name: ClassVar[str]

    budgets: list[float] = field(default_factory=list)
    steps: int = -1
    batch_tokens: int = 512
    lr: float = 1e-2
    weight_decay: float = 0.05
    decay: bool = True
    distill: float = 2.0
    start: bool = True
    ramp: float = 0.0
    token_noise: bool = False
    soft: bool = False
    mask_once: bool = True
    size: float = 16.0
    union: float = 5.0
    balance: float = 1.0
    settle: float = 0.6
    qk: float = 1.0
    qk_train: bool = False
    block: int = 0

    def __post_init__(self) -> None:
        falling = all(0 < low < high < 1 for high, low in zip([0.999999, *self.budgets], self.budgets, strict=False))
        require(falling, f"{self.name}.budgets", "must be falling shares below one", self.budgets)
        require(self.steps >= -1, f"{self.name}.steps", "must be at least -1", self.steps)
        require(self.batch_tokens >= 1, f"{self.name}.batch_tokens", "must be at least 1", self.batch_tokens)
        require(self.lr > 0, f"{self.name}.lr", "must be above 0", self.lr)
        for key in ("weight_decay", "distill", "size", "union", "balance", "block"):
            require(getattr(self, key) >= 0, f"{self.name}.{key}", "must be at least 0", getattr(self, key))
        require(0 < self.qk <= 1, f"{self.name}.qk", "must be above 0 and at most 1", self.qk)
        chosen = self.qk == 1 or self.start or self.qk_train
        require(chosen, f"{self.name}.qk_train", "must be true if qk is below 1 and start is false", self.qk_train)
        for key in ("ramp", "settle"):
            require(0 <= getattr(self, key) <= 1, f"{self.name}.{key}", "must be between 0 and 1", getattr(self, key))


@dataclass(frozen=True, slots=True)
class TomoeRecipe(MaskRecipe):
    """The keys of the recipe's table [tomoe]; see `MaskRecipe`. The number of experts is `split.experts`."""

    name: ClassVar[str] = "tomoe"


@dataclass(frozen=True, slots=True)
class DispRecipe(MaskRecipe):
    """The keys of the recipe's table [disp]; see `MaskRecipe`. There is one expert, so nothing is balanced."""

    name: ClassVar[str] = "disp"

    distill: float = 0.0
    soft: bool = True
    union: float = 0.0
    balance: float = 0.0


def resolved(recipe: Recipe, options: MaskRecipe, config: ModelConfig, device: torch.device) -> Recipe:
    """The recipe with budgets that follow from `target_active`, and steps that follow from the model's size, if it has none."""
    target = recipe.target_active
    if not options.budgets:
        budgets = [(1 + target) / 2, target, max(target - 0.75 * (1 - target), target / 2)]
        options = replace(options, budgets=[round(budget, 4) for budget in budgets])
    if options.steps < 0:
        options = replace(options, steps=default_steps(options, config, device))
    return recipe.with_section(options)


def default_steps(options: MaskRecipe, config: ModelConfig, device: torch.device) -> int:
    """MAX_STEPS. On a CPU, as many as CPU_WORK allows, but at least MIN_STEPS."""
    if device.type != "cpu":
        return MAX_STEPS
    parameters = config.dense_parameters + config.head_parameters
    return max(MIN_STEPS, min(MAX_STEPS, int(CPU_WORK / (parameters * options.batch_tokens))))
