"""Recipe: everything that decides a conversion besides the model, the text and the device. The only home of defaults.

It is read from TOML (`load_recipe`), and command-line flags override it (`Recipe.override`). A method may have a table of its
own: a dataclass that is registered with the method under the method's name, and read by `Recipe.section`.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from ladimo.convert.typed import build

Section = TypeVar("Section")

SECTIONS: dict[str, type[Any]] = {}  # the methods' own tables, by method
OUTPUT_SCALES = ("none", "experts", "fit")
LAYERS_PATTERN = re.compile(r"auto|all|\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True, slots=True)
class SplitRecipe:
    """How an FFN is cut into experts.

    output_scale: a factor for `down_proj` at the start. It is needed because the chosen experts' weights sum to one, while
    the dense FFN is the sum of all experts with weight one each. "none" is the literal reading of LaDiMo, and the best after
    a full training. "experts" is the number of experts. "fit" is the factor with the least squared error on the first batch;
    it starts better and pays when training is short. gate_std: standard deviation of the router's random start.
    """

    experts: int = 8
    top_k: int = 2
    output_scale: str = "none"
    gate_std: float = 0.02

    def __post_init__(self) -> None:
        require(self.experts >= 1, "split.experts", "must be at least 1", self.experts)
        require(self.top_k >= 1, "split.top_k", "must be at least 1", self.top_k)
        require(self.top_k <= self.experts, "split.top_k", f"must be at most the {self.experts} experts", self.top_k)
        require(self.output_scale in OUTPUT_SCALES, "split.output_scale", f"must be one of {OUTPUT_SCALES}", self.output_scale)
        require(self.gate_std >= 0, "split.gate_std", "must be at least 0", self.gate_std)


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """Regression of one expert layer on the FFN that it replaces: AdamW, linear warm-up, cosine decay to zero.

    balance: weight of the load-balance loss beside the normalised squared error. The defaults were best on models of the
    demo's size (hidden size 128 and 256). For LLaMA-2-7B start with expert_lr 1e-4, gate_lr 1e-3, batch_tokens 2048 to 4096
    and a few hundred to a few thousand steps (recipes/llama2-7b.toml).
    """

    steps: int = 1200
    batch_tokens: int = 512
    expert_lr: float = 5e-3
    gate_lr: float = 3e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    balance: float = 0.01

    def __post_init__(self) -> None:
        require(self.steps >= 0, "train.steps", "must be at least 0", self.steps)
        require(self.batch_tokens >= 1, "train.batch_tokens", "must be at least 1", self.batch_tokens)
        for name in ("expert_lr", "gate_lr", "weight_decay", "balance"):
            require(getattr(self, name) >= 0, f"train.{name}", "must be at least 0", getattr(self, name))
        require(0 <= self.warmup <= 1, "train.warmup", "must be between 0 and 1", self.warmup)


@dataclass(frozen=True, slots=True)
class PolicyRecipe:
    """The training-free policies. Under mass tau a layer runs TOP1 when at least `top1_share` (q_hi) of the tokens need one
    expert. It runs all k experts when at most `full_share` (q_lo) of the tokens need fewer, and DYN(tau) otherwise.

    quality, balanced, fast: tau of the named policies. At k = 2 the best weight is never below 0.5, so that 0.5 is TOP1
    everywhere. points: how many policies the solver may add, between the cheapest choice and `full`.
    """

    quality: float = 0.9
    balanced: float = 0.8
    fast: float = 0.5
    top1_share: float = 0.9
    full_share: float = 0.1
    points: int = 6

    @property
    def taus(self) -> tuple[float, ...]:
        """Those of the named policies."""
        return (self.quality, self.balanced, self.fast)

    def __post_init__(self) -> None:
        order = (0.0, self.fast, self.balanced, self.quality, 1.0)
        rising = all(low <= high for low, high in zip(order, order[1:], strict=False))
        require(rising, "policies", "must satisfy 0 <= fast <= balanced <= quality <= 1", order[1:4])
        require(0 <= self.full_share < self.top1_share <= 1, "policies", "must satisfy 0 <= full_share < top1_share <= 1", "")
        require(self.points >= 0, "policies.points", "must be at least 0", self.points)


@dataclass(frozen=True, slots=True)
class Recipe:
    """layers: "auto" (the least damaging ones until `target_active` is reached), "all", or numbers and ranges such as
    "0,3,5-9".

    tokens: calibration tokens, of which nine in ten are fitted and one in ten is held out; a fifth as many again are for
    evaluation. target_active: active / dense parameters per token, embeddings excluded, to reach under policy `full` (method
    `elastic`: under `balanced`). max_perplexity_ratio: add the cheapest policy whose measured perplexity is at most so many
    times the dense one; 0 adds none. sections: the methods' own tables, by method.
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
    sections: dict[str, Any] = field(default_factory=lambda: {name: kind() for name, kind in SECTIONS.items()})

    def __post_init__(self) -> None:
        valid = LAYERS_PATTERN.fullmatch(self.layers) is not None
        require(valid, "layers", "must be auto, all, or numbers and ranges such as 0,3,5-9", self.layers)
        require(0 < self.target_active <= 1, "target_active", "must be above 0 and at most 1", self.target_active)
        guard = self.max_perplexity_ratio
        require(guard == 0 or guard >= 1, "max_perplexity_ratio", "must be 0 (none) or at least 1", guard)
        require(self.tokens >= 1, "tokens", "must be at least 1", self.tokens)
        require(0 <= self.seed < 2**31, "seed", "must be at least 0 and below 2**31", self.seed)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Raises ValueError naming the first unknown key or wrong value."""
        known = [item.name for item in fields(cls) if item.name != "sections"]
        if unknown := [name for name in raw if name not in (*known, *SECTIONS)]:
            raise ValueError(f"{unknown[0]}: unknown key; known: {', '.join(sorted((*known, *SECTIONS)))}")
        sections = {name: build(kind, raw.get(name, {}), name, closed=True) for name, kind in SECTIONS.items()}
        own = build(cls, {name: value for name, value in raw.items() if name in known}, closed=True)
        return replace(own, sections=sections)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads: the methods' tables stand beside the others."""
        values = asdict(self)
        sections = values.pop("sections")
        return {**values, **sections}

    def section(self, kind: type[Section]) -> Section:
        """A method's own table."""
        name = next(name for name, known in SECTIONS.items() if known is kind)
        found: Section = self.sections[name] if name in self.sections else kind()
        return found

    def with_section(self, value: object) -> "Recipe":
        name = next(name for name, known in SECTIONS.items() if known is type(value))
        return replace(self, sections={**self.sections, name: value})

    def override(self, flags: Mapping[str, Any]) -> "Recipe":
        """The recipe with values by dotted key ("split.top_k"); None leaves a value as it is."""
        tables: dict[str, dict[str, Any]] = {}
        for key, value in flags.items():
            table, _, name = key.rpartition(".")
            if value is not None:
                tables.setdefault(table, {})[name] = value
        changed = replace(self, **tables.pop("", {}))
        for table, values in tables.items():
            if table in SECTIONS:
                changed = changed.with_section(replace(changed.section(SECTIONS[table]), **values))
            else:
                changed = replace(changed, **{table: replace(getattr(changed, table), **values)})
        return changed

    def candidate_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that may be converted. Raises ValueError when one is out of range."""
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


def require(condition: bool, name: str, rule: str, value: object) -> None:
    """Raises ValueError naming the key unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: {rule}" + (f", got {value!r}" if value != "" else ""))
