"""Recipe: the parameters of a conversion, with their defaults.

A recipe is read from TOML (`load_recipe`). Command-line flags override it (`Recipe.override`). A method may have its own table.
This is a dataclass that is registered with the method under the method's name, and read by `Recipe.section`.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from ladimo.convert.typed import build

Section = TypeVar("Section")

AUTO = "auto"  # the method that `methods.automatic` chooses
SECTIONS: dict[str, type[Any]] = {}  # the dataclasses of the methods' own tables, by method
OUTPUT_SCALES = ("none", "experts", "fit")
LAYERS_PATTERN = re.compile(r"auto|all|\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True, slots=True)
class SplitRecipe:
    """How an FFN is split into experts.

    output_scale: a factor for `down_proj` before training. It corrects for the sum of the weights: the weights of the chosen
    experts sum to one, while in the dense FFN each expert has weight one. "none" is the literal reading of LaDiMo, and the best
    after long training. "experts" is the number of experts. "fit" is the factor with the least squared error on the first
    batch; it is better if training is short. gate_std: standard deviation of the router's random weights before training.
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
    """Regression of an expert layer on the FFN that it replaces, with AdamW, linear warm-up and cosine decay to zero.

    balance: weight of the load-balance loss beside the normalised squared error. The defaults were best on models with hidden
    sizes of 128 and 256. For LLaMA-2-7B, start with expert_lr 1e-4, gate_lr 1e-3, batch_tokens 2048 to 4096, and a few hundred
    to a few thousand steps (`ladimo/recipes/llama2-7b.toml`).
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
    """The policies that need no training. For a mass tau, each layer gets one of three rules. It gets TOP1 if at least
    `top1_share` (q_hi) of the tokens reach tau with one expert. It gets all k experts if at most `full_share` (q_lo) of the
    tokens reach tau with fewer than k. Otherwise it gets DYN(tau).

    quality, balanced, fast: tau of the named policies. With k = 2 the best weight is at least 0.5, so 0.5 means TOP1 in every
    layer. points: how many policies the solver may add, between the cheapest choice and `full`.
    """

    quality: float = 0.9
    balanced: float = 0.8
    fast: float = 0.5
    top1_share: float = 0.9
    full_share: float = 0.1
    points: int = 6

    @property
    def taus(self) -> tuple[float, ...]:
        """The values of tau of the named policies."""
        return (self.quality, self.balanced, self.fast)

    def __post_init__(self) -> None:
        order = (0.0, self.fast, self.balanced, self.quality, 1.0)
        rising = all(low <= high for low, high in zip(order, order[1:], strict=False))
        require(rising, "policies", "must satisfy 0 <= fast <= balanced <= quality <= 1", order[1:4])
        require(0 <= self.full_share < self.top1_share <= 1, "policies", "must satisfy 0 <= full_share < top1_share <= 1", "")
        require(self.points >= 0, "policies.points", "must be at least 0", self.points)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The parameters of a conversion.

    method: its name, or "auto".
    layers: the layers to convert. "auto": the least damaging ones, until `target_active` is reached. "all". Or numbers and
    ranges such as "0,3,5-9".
    tokens: calibration tokens. 90% are for fitting, 10% are held out. Another 20% on top are for evaluation.
    target_active: the share of the dense model's active parameters to reach, without embeddings. It is reached under policy
    `full`, and with method `elastic` under `balanced`.
    max_perplexity_ratio: add the cheapest policy with at most so many times the dense model's perplexity; 0: add none.
    sections: the methods' own tables, by method. given: the dotted keys that a file or flags gave a value, even the default.
    """

    method: str = AUTO
    layers: str = "auto"
    target_active: float = 0.8
    max_perplexity_ratio: float = 0.0
    tokens: int = 100_000
    seed: int = 0
    split: SplitRecipe = field(default_factory=SplitRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    policies: PolicyRecipe = field(default_factory=PolicyRecipe)
    sections: dict[str, Any] = field(default_factory=lambda: {name: kind() for name, kind in SECTIONS.items()})
    given: frozenset[str] = field(default=frozenset(), compare=False)

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
        """Raises ValueError with the name of the first unknown key or wrong value."""
        known = [item.name for item in fields(cls) if item.name not in ("sections", "given")]
        if unknown := [name for name in raw if name not in (*known, *SECTIONS)]:
            raise ValueError(f"{unknown[0]}: unknown key; known: {', '.join(sorted((*known, *SECTIONS)))}")
        sections = {name: build(kind, raw.get(name, {}), name, closed=True) for name, kind in SECTIONS.items()}
        own = build(cls, {name: value for name, value in raw.items() if name in known}, closed=True)
        return replace(own, sections=sections, given=frozenset(_dotted(raw)))

    def to_dict(self) -> dict[str, Any]:
        """The form that `from_dict` reads. The methods' tables are beside the others."""
        values = asdict(self)
        del values["given"]
        sections = values.pop("sections")
        return {**values, **sections}

    def asked(self) -> frozenset[str]:
        """The dotted keys that were given, and those whose values are not the defaults."""
        own, default = _dotted(self.to_dict()), _dotted(Recipe().to_dict())
        return self.given | {key for key, value in own.items() if value != default.get(key)}

    def section(self, kind: type[Section]) -> Section:
        """The table of a method, found by its dataclass `kind`."""
        name = next(name for name, known in SECTIONS.items() if known is kind)
        found: Section = self.sections[name] if name in self.sections else kind()
        return found

    def with_section(self, value: object) -> "Recipe":
        name = next(name for name, known in SECTIONS.items() if known is type(value))
        return replace(self, sections={**self.sections, name: value})

    def override(self, flags: Mapping[str, Any]) -> "Recipe":
        """The recipe with other values, by dotted key such as "split.top_k". None does not change a value."""
        tables: dict[str, dict[str, Any]] = {}
        for key, value in flags.items():
            table, _, name = key.rpartition(".")
            if value is not None:
                tables.setdefault(table, {})[name] = value
        given = self.given | {key for key, value in flags.items() if value is not None}
        changed = replace(self, **tables.pop("", {}), given=given)
        for table, values in tables.items():
            if table in SECTIONS:
                changed = changed.with_section(replace(changed.section(SECTIONS[table]), **values))
            else:
                changed = replace(changed, **{table: replace(getattr(changed, table), **values)})
        return changed

    def candidate_layers(self, num_layers: int) -> tuple[int, ...]:
        """The numbers of the layers that may be converted. Raises ValueError if one is out of range."""
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


def _dotted(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, from values and tables of values."""
    tables = {name: value if isinstance(value, Mapping) else None for name, value in raw.items()}
    values = {name: raw[name] for name, table in tables.items() if table is None}
    return values | {f"{name}.{key}": value for name, table in tables.items() if table for key, value in table.items()}


def load_recipe(path: Path) -> Recipe:
    """Raises ValueError with the file's name and its first error."""
    try:
        return Recipe.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:  # covers TOMLDecodeError and UnicodeDecodeError
        raise ValueError(f"{path}: {error}") from error


def require(condition: bool, name: str, rule: str, value: object) -> None:
    """Raises ValueError with the key's name unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: {rule}" + (f", got {value!r}" if value != "" else ""))
