"""Small experiments and outside measurements that a report shows beside the conversion itself.

Each gives the value of one key of report.json: "initialisation", "depth", "comparison", "throughput". `ladimo.convert.sections`
says them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ladimo.checkpoint import read_json
from ladimo.convert.evaluation.measure import measure
from ladimo.convert.evaluation.variants import PASS_BYTES, Rules
from ladimo.convert.ffn.expert_layer import layer_error
from ladimo.convert.ffn.layer_data import LayerData
from ladimo.convert.methods import Method
from ladimo.convert.recipe import Recipe
from ladimo.convert.streamed_model import ExpertSource, StreamedModel
from ladimo.model.config import ModelConfig
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule

COMPARISON_FIELDS = {
    "method": str,
    "tokens": int,
    "target": float,
    "active_parameters_ratio": float,
    "perplexity_ratio": float,
    "spread": float,
    "seeds": int,
}
THROUGHPUT_CONDITIONS = ("cpu", "gpu", "device", "dtype", "threads", "prompt_tokens", "generated_tokens")


def initialisation_curves(
    method: Method, mlp: GatedMLP, data: LayerData, recipe: Recipe, layer: int, steps: int = 100
) -> dict[str, Any]:
    """Short trainings of one layer from the split weights and from random ones (LaDiMo's Fig 2), alike in all else.

    Random weights are normal with the standard deviation of the split ones, tensor by tensor, so that only what the source
    has learned is lost; padded neurons stay zero. Returns {"layer", "steps", "curves": {"split", "random"}}, each curve a list
    of {"step", "holdout"} from step 0 on, holdout being the error over the variance of the FFN's outputs.
    """
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=steps))
    curves = {}
    for name in ("split", "random"):
        generator = torch.Generator().manual_seed(recipe.seed * 100_003 + layer)
        expert_layer = method.split(mlp, data, recipe, generator)
        if name == "random":
            forget(expert_layer, generator)
        points = [{"step": 0, "holdout": layer_error(expert_layer, data.holdout_inputs, data.holdout_targets)}]
        trained = method.fit(expert_layer, data, recipe, generator)
        curves[name] = points + [{"step": point.step, "holdout": point.holdout} for point in trained]
    return {"layer": layer, "steps": steps, "curves": curves}


@torch.no_grad()
def forget(layer: ExpertLayer, generator: torch.Generator) -> None:
    """Redraw the experts' weights at their own standard deviation; zeros, which pad, stay."""
    for weight in layer.experts.parameters():
        used = weight != 0
        drawn = torch.randn(weight.shape, generator=generator).to(weight) * weight[used].std()
        weight.copy_(drawn * used)


def depth_curve(
    model: StreamedModel,
    experts: ExpertSource,
    config: ModelConfig,
    order: Sequence[int],
    blocks: torch.Tensor,
    rules: Mapping[int, LayerRule] | None = None,
    points: int = 9,
) -> list[dict[str, Any]]:
    """What converting the first n layers of `order` (the least damaging first) costs and saves, for up to `points` values of n
    from none to all (LaDiMo's Fig 4), in one pass over the layers.

    config: the model with every layer of `order` converted. rules: by layer, None for `full`. blocks: tokens [B, S], as many of
    them used as the variants' hidden states may take. Entries: {"converted", "layers", "perplexity", "perplexity_ratio",
    "next_token_agreement", "active_parameters_ratio"}.
    """
    counts = sorted({round(len(order) * point / (points - 1)) for point in range(points)})
    variants: dict[int, Rules] = {}
    for count in counts:
        chosen = set(order[:count])
        variants[count] = tuple(
            None if layer is None or index not in chosen else rules[index] if rules else LayerRule.full(layer)
            for index, layer in enumerate(config.layers)
        )
    bytes_per_block = len(variants) * blocks.shape[1] * config.hidden_size * model.dtype.itemsize
    fitting = blocks[: max(1, PASS_BYTES // bytes_per_block)]
    measured = measure(model, experts, fitting, variants.values(), variants[0])
    dense = measured[variants[0]].perplexity
    entries = []
    for count, variant in variants.items():
        layers = tuple(layer if rule else None for layer, rule in zip(config.layers, variant, strict=True))
        found = measured[variant]
        entries.append(
            {
                "converted": count,
                "layers": sorted(order[:count]),
                "perplexity": found.perplexity,
                "perplexity_ratio": found.perplexity / dense,
                "next_token_agreement": found.next_token_agreement,
                "active_parameters_ratio": dataclasses.replace(config, layers=layers).active_parameters_ratio(
                    found.experts_per_token
                ),
            }
        )
    return entries


def read_comparison(path: Path) -> list[dict[str, Any]]:
    """The key "comparison" from a benchmark's JSON: a list, or an object with the list under "comparison".

    Entries have the COMPARISON_FIELDS, others are dropped: `target` and `active_parameters_ratio` are shares of the dense
    model's parameters, asked for and reached; `perplexity_ratio` is to dense, the median of `seeds` seeds; `spread` is half the
    distance between the best and the worst of them. Raises ValueError naming the file and the first wrong field.
    """
    raw = read_json(path)
    entries = raw.get("comparison") if isinstance(raw, dict) else raw
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: comparison: must be a list with at least one entry")
    return [_fields(entry, COMPARISON_FIELDS, f"{path}: comparison[{index}]") for index, entry in enumerate(entries)]


def read_throughput(path: Path) -> dict[str, Any]:
    """The key "throughput" from the JSON of `loadtests.engine_bench`, its decode rows: {"conditions": {...}, "results":
    [{"policy", "batch", "tokens_per_second"}]}. Raises ValueError naming the file and the first wrong field."""
    raw = read_json(path)
    results = raw.get("results") if isinstance(raw, dict) else None
    if not isinstance(results, list) or not results:
        raise ValueError(f"{path}: results: must be a list with at least one entry")
    wanted = {"policy": str, "batch": int, "tokens_per_second": float}
    entries = [
        _fields(entry, wanted, f"{path}: results[{index}]")
        for index, entry in enumerate(results)
        if not (isinstance(entry, Mapping) and entry.get("measure", "decode") != "decode")
    ]
    return {"conditions": {name: raw[name] for name in THROUGHPUT_CONDITIONS if raw.get(name)}, "results": entries}


def _fields(entry: object, wanted: Mapping[str, type], where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: must be an object")
    for name, kind in wanted.items():
        value: Any = entry.get(name)
        valid = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not valid:
            raise ValueError(f"{where}.{name}: must be of type {kind.__name__}, got {value!r}")
        if kind is not str and not 0 <= value < math.inf:
            raise ValueError(f"{where}.{name}: must be a number of at least 0, got {value!r}")
    return {name: entry[name] for name in wanted}
