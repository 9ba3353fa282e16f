"""Recipe: everything that decides a conversion besides the model, the text and the device. The only home of defaults.

Read from TOML (`load_recipe`); command-line flags override it (`Recipe.override`).
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self

OUTPUT_SCALES = ("none", "experts", "fit")
LAYERS_PATTERN = re.compile(r"auto|all|\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True, slots=True)
class SplitRecipe:
    """How an FFN is cut into experts.

    output_scale: what is multiplied into `down_proj` at the start, because kept weights sum to one while the dense FFN counts
    each expert with one. "none" is the literal reading of LaDiMo and the best after a full training; "experts" is the number of
    experts; "fit" is the scalar with the least squared error on the first batch of calibration tokens, which starts lower and
    pays when training is short. gate_std: standard deviation of the router's random start.
    """

    experts: int = 8
    top_k: int = 2
    output_scale: str = "none"
    gate_std: float = 0.02

    def __post_init__(self) -> None:
        _require(self.experts >= 1, "split.experts", "must be at least 1", self.experts)
        _require(self.top_k >= 1, "split.top_k", "must be at least 1", self.top_k)
        _require(self.top_k <= self.experts, "split.top_k", f"must be at most the {self.experts} experts", self.top_k)
        _require(self.output_scale in OUTPUT_SCALES, "split.output_scale", f"must be one of {OUTPUT_SCALES}", self.output_scale)
        _require(self.gate_std >= 0, "split.gate_std", "must be at least 0", self.gate_std)


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """Regression of one expert layer on the FFN it replaces: AdamW, linear warm-up, cosine decay to zero.

    balance: weight of the load-balance loss beside the normalised squared error. The defaults measured best on models of the
    demo's size (hidden size 128 and 256). The literal start point for LLaMA-2-7B is expert_lr 1e-4, gate_lr 1e-3, batch_tokens
    2048 to 4096, a few hundred to a few thousand steps (recipes/llama2-7b.toml).
    """

    steps: int = 1200
    batch_tokens: int = 512
    expert_lr: float = 5e-3
    gate_lr: float = 3e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    balance: float = 0.01

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "train.steps", "must be at least 0", self.steps)
        _require(self.batch_tokens >= 1, "train.batch_tokens", "must be at least 1", self.batch_tokens)
        for name in ("expert_lr", "gate_lr", "weight_decay", "balance"):
            _require(getattr(self, name) >= 0, f"train.{name}", "must be at least 0", getattr(self, name))
        _require(0 <= self.warmup <= 1, "train.warmup", "must be between 0 and 1", self.warmup)


@dataclass(frozen=True, slots=True)
class CmoeRecipe:
    """Method `cmoe`. shared: share of the `split.top_k` running experts that always run, rounded to a whole number
    (split.experts 8, split.top_k 6 and the default are the paper's S3A3E8). channels: K_a, how many of a token's hidden
    channels count as activated.
    """

    shared: float = 0.5
    channels: int = 10

    def __post_init__(self) -> None:
        _require(0 <= self.shared <= 1, "cmoe.shared", "must be between 0 and 1", self.shared)
        _require(self.channels >= 1, "cmoe.channels", "must be at least 1", self.channels)


@dataclass(frozen=True, slots=True)
class StaticRecipe:
    """Method `static`. kept: share of each FFN's neurons that stay, 0 for what `target_active` leaves. resolve: solve
    `down_proj` again for the neurons that stay. ridge: what pulls that solution to the original weights, in units of each
    channel's own power; 0 for the best on the holdout.
    """

    kept: float = 0.0
    resolve: bool = True
    ridge: float = 0.0

    def __post_init__(self) -> None:
        _require(0 <= self.kept <= 1, "static.kept", "must be between 0 and 1", self.kept)
        _require(self.ridge >= 0, "static.ridge", "must be at least 0", self.ridge)


@dataclass(frozen=True, slots=True)
class ElasticRecipe:
    """Method `elastic`. budgets: shares of the dense model's active parameters that are solved and trained for, most accurate
    first; at least three, the first named quality, the second balanced, the last fast, those between by their share; none for
    three around `target_active`. ridge: what pulls a repair to the original weights, in units of each channel's own power; 0
    for the best on the holdout. scan_tokens: holdout tokens that per-layer damage is measured on. uniform: the same width in
    every layer, to see what the solver's choice is worth.

    steps, batch_tokens, lr: end-to-end distillation of each budget; 0 steps leave the closed form, -1 is 320, on a CPU fewer
    the larger the model, down to 40; batch_tokens is at least one block of text; lr is Muon's, for any hidden size. hidden:
    weight of the hidden states' relative squared error beside the divergence of the logits. The stage holds the whole model in
    fp32, so models of more than max_parameters are distilled layer by layer instead, each layer in so many steps, with AdamW at
    layer_lr, which is for a hidden size of 128 and falls as one over it.

    routed: budgets of at most this share of active parameters also try routed experts, 0 for none. They are distilled layer by
    layer for routed_steps of the recipe's `train`, then end to end; larger models have none.
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

    def __post_init__(self) -> None:
        falling = all(0 < low < high < 1 for high, low in zip(self.budgets, self.budgets[1:], strict=False))
        enough = not self.budgets or len(self.budgets) >= 3
        _require(falling and enough, "elastic.budgets", "must be at least three falling shares below one", self.budgets)
        _require(self.ridge >= 0, "elastic.ridge", "must be at least 0", self.ridge)
        _require(self.scan_tokens >= 1, "elastic.scan_tokens", "must be at least 1", self.scan_tokens)
        _require(self.steps >= -1, "elastic.steps", "must be at least -1", self.steps)
        _require(self.batch_tokens >= 1, "elastic.batch_tokens", "must be at least 1", self.batch_tokens)
        _require(self.lr > 0, "elastic.lr", "must be above 0", self.lr)
        _require(self.layer_lr > 0, "elastic.layer_lr", "must be above 0", self.layer_lr)
        _require(self.hidden >= 0, "elastic.hidden", "must be at least 0", self.hidden)
        _require(0 <= self.routed <= 1, "elastic.routed", "must be between 0 and 1", self.routed)
        _require(self.routed_steps >= 0, "elastic.routed_steps", "must be at least 0", self.routed_steps)


@dataclass(frozen=True, slots=True)
class PolicyRecipe:
    """The training-free policies. A layer under mass tau runs TOP1 when at least `top1_share` of the tokens need one expert
    (q_hi), all k experts when at most `full_share` need fewer (q_lo), DYN(tau) otherwise.

    quality, balanced, fast: tau of the named policies. At k = 2 the best weight is never below 0.5, so 0.5 is TOP1 everywhere.
    points: how many more points the frontier may get, from TOP1 everywhere up to `full`.
    """

    quality: float = 0.9
    balanced: float = 0.8
    fast: float = 0.5
    top1_share: float = 0.9
    full_share: float = 0.1
    points: int = 6

    def __post_init__(self) -> None:
        order = (0.0, self.fast, self.balanced, self.quality, 1.0)
        rising = all(low <= high for low, high in zip(order, order[1:], strict=False))
        _require(rising, "policies", "must satisfy 0 <= fast <= balanced <= quality <= 1", order[1:4])
        _require(0 <= self.full_share < self.top1_share <= 1, "policies", "must satisfy 0 <= full_share < top1_share <= 1", "")
        _require(self.points >= 0, "policies.points", "must be at least 0", self.points)


@dataclass(frozen=True, slots=True)
class Recipe:
    """layers: "auto" (least damaging first until `target_active`), "all" or numbers and ranges such as "0,3,5-9".

    tokens: calibration tokens, 9 in 10 to fit and 1 in 10 held out; a fifth as many again are for evaluation. target_active:
    active / dense parameters per token, embeddings excluded, to reach under policy `full` (method `elastic`: `balanced`).
    max_perplexity_ratio: adds the cheapest policy found whose measured perplexity is at most so many times the dense one; 0
    adds none.
    """

    method: str = "elastic"
    layers: str = "auto"
    target_active: float = 0.8
    max_perplexity_ratio: float = 0.0
    tokens: int = 100_000
    seed: int = 0
    split: SplitRecipe = field(default_factory=SplitRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    policies: PolicyRecipe = field(default_factory=PolicyRecipe)
    cmoe: CmoeRecipe = field(default_factory=CmoeRecipe)
    static: StaticRecipe = field(default_factory=StaticRecipe)
    elastic: ElasticRecipe = field(default_factory=ElasticRecipe)

    def __post_init__(self) -> None:
        valid = LAYERS_PATTERN.fullmatch(self.layers) is not None
        _require(valid, "layers", "must be auto, all, or numbers and ranges such as 0,3,5-9", self.layers)
        _require(0 < self.target_active <= 1, "target_active", "must be above 0 and at most 1", self.target_active)
        guard = self.max_perplexity_ratio
        _require(guard == 0 or guard >= 1, "max_perplexity_ratio", "must be 0 (none) or at least 1", guard)
        _require(self.tokens >= 1, "tokens", "must be at least 1", self.tokens)
        _require(0 <= self.seed < 2**31, "seed", "must be at least 0 and below 2**31", self.seed)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Raises ValueError naming the first unknown key or wrong value."""
        recipe: Self = _build(cls, raw, "")
        return recipe

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def override(self, flags: Mapping[str, Any]) -> "Recipe":
        """The recipe with values by dotted key ("split.top_k"); None leaves a value as it is."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in flags.items():
            section, _, name = key.rpartition(".")
            if value is not None:
                sections.setdefault(section, {})[name] = value
        top = sections.pop("", {})
        return replace(self, **top, **{name: replace(getattr(self, name), **values) for name, values in sections.items()})

    def candidate_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers to train. Raises ValueError when one is out of range."""
        if self.layers in ("auto", "all"):
            return tuple(range(num_layers))
        chosen: set[int] = set()
        for part in self.layers.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            if not span:
                raise ValueError(f"layers: {part} is an empty range")
            if span[-1] >= num_layers:
                raise ValueError(f"layers: {part} is out of range, the model has layers 0 to {num_layers - 1}")
            chosen |= set(span)
        return tuple(sorted(chosen))


def load_recipe(path: Path) -> Recipe:
    """Raises ValueError naming the file and what is wrong in it."""
    try:
        return Recipe.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:  # covers TOMLDecodeError and UnicodeDecodeError
        raise ValueError(f"{path}: {error}") from error


def _build(cls: type[Any], raw: Mapping[str, Any], path: str) -> Any:
    defaults = cls()
    known = {item.name for item in fields(cls)}
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in known:
            raise ValueError(f"{path}{name}: unknown key; known: {', '.join(sorted(known))}")
        default = getattr(defaults, name)
        if is_dataclass(default):
            if not isinstance(value, Mapping):
                raise ValueError(f"{path}{name}: must be a table")
            values[name] = _build(type(default), value, f"{path}{name}.")
            continue
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(default, list) and isinstance(value, list):
            value = [float(item) if type(item) is int else item for item in value]
            if not all(isinstance(item, float) for item in value):
                raise ValueError(f"{path}{name}: must be a list of numbers, got {value!r}")
        if type(value) is not type(default):
            raise ValueError(f"{path}{name}: must be of type {type(default).__name__}, got {value!r}")
        values[name] = value
    return cls(**values)


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name}: {rule}" + (f", got {value!r}" if value != "" else ""))
