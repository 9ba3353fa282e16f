"""Method nested: one set of weights at several precisions.

1. One pass over the dense model gathers the second moments of every matrix's inputs (`ladimo.convert.rounding.moments`).
2. Each matrix gets two planes of four bits (`ladimo.model.nested`). The high plane is chosen with error feedback
   (`ladimo.convert.rounding.gptq`). The weights themselves stay, so policy `full` is the dense model.
3. The damage of reading 4 instead of 8 bits is measured for each FFN, each attention and the output head alone. Policies take
   these changes in the order of damage per saved byte.

Nothing is trained. No FFN is split. Each is one expert, and the policy chooses its bits.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ladimo.checkpoint import copy_tokenizer, moe_config_json, read_json, write_json, write_tensors
from ladimo.convert.data.calibration import Calibration
from ladimo.convert.evaluation.measure import measure
from ladimo.convert.evaluation.variants import Rules, policy_of
from ladimo.convert.methods.base import Converted, Method
from ladimo.convert.methods.registry import register
from ladimo.convert.policies.candidates import Candidates, ConvertedModel, Guard
from ladimo.convert.recipe import Recipe, require
from ladimo.convert.rounding.gptq import choose_scales, round_with_feedback
from ladimo.convert.rounding.moments import LayerMoments, head_moments, layer_moments
from ladimo.convert.run import Run
from ladimo.convert.source import model_parameters
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.config import ModelConfig, MoeLayerConfig, moe_layers_to_json
from ladimo.model.nested import codes_to_rounding
from ladimo.model.nested_layers import ROUNDING, SCALES, matrix_named
from ladimo.model.precision import NESTED_BITS
from ladimo.policy import LayerRule, RoutingPolicy

LOW, HIGH = NESTED_BITS
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class NestedRecipe:
    """damage_tokens: the number of held-out tokens on which the damage of each change is measured. points: how many policies
    are added between 8 bits everywhere and 4 bits everywhere."""

    damage_tokens: int = 4096
    points: int = 5

    def __post_init__(self) -> None:
        require(self.damage_tokens >= 1, "nested.damage_tokens", "must be at least 1", self.damage_tokens)
        require(self.points >= 0, "nested.points", "must be at least 0", self.points)


@register
class Nested(Method):
    name = "nested"
    options = NestedRecipe

    def resolve(self, recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe:
        """Raises ValueError if the recipe asks for some of the layers only."""
        if recipe.layers not in ("auto", "all"):
            raise ValueError(f"layers: is {recipe.layers}; method nested rounds every layer")
        return recipe

    def describe(self, recipe: Recipe) -> str:
        return (
            "One set of weights at three precisions: 4 bits, 8 bits (a second plane of 4 bits below the first) and whole. The "
            "4-bit integers are the weights rounded up or down with error feedback (GPTQ, arXiv 2210.17323), a scale per row "
            "and 32 columns. Nothing is trained. A policy chooses the bits of every FFN, every attention and the output head."
        )

    def convert(self, run: Run, calibration: Calibration) -> Converted:
        round_layers(run, calibration.fit)
        own = nested_model(run)
        entries = [
            {"layer": index, "converted": True, "seconds": run.workspace.finished_record(index)["seconds"]}
            for index in range(run.dense.config.num_hidden_layers)
        ]
        damages = run.workspace.stage("damages", lambda: measured_damages(own, calibration.holdout, run.recipe))
        layers = {index: layer for index, layer in enumerate(own.config.layers) if layer is not None}
        return Converted(layers, entries, lambda model: bit_candidates(model.config, damages, run.recipe), damages, own=own)

    def reprofile(
        self, recipe: Recipe, model: ConvertedModel, stored: Mapping[str, RoutingPolicy], blocks: Tensor, report: dict[str, Any]
    ) -> Candidates:
        damages = measured_damages(model.dense, blocks, recipe)
        report |= damages
        return bit_candidates(model.config, damages, recipe)


def round_layers(run: Run, blocks: Tensor) -> None:
    """Save each layer's matrices with their planes in the workspace, and then those of the output head. The second moments come
    from token blocks [B, S]. A finished layer is not rounded again."""
    workspace, config = run.workspace, run.dense.config

    def use(index: int, moments: LayerMoments) -> None:
        if workspace.layer_record(index) is not None:
            return
        started = time.monotonic()
        workspace.save_tensors(f"layers/{index}/model.safetensors", dict(_layer(run, index, moments)))
        layer = MoeLayerConfig(1, 1, config.intermediate_size, expert_weight="one", router="none")
        workspace.finish_layer(index, layer, {"seconds": time.monotonic() - started})

    def head() -> dict[str, Any]:
        hidden_states = layer_moments(run.dense, blocks, use)
        weights = run.dense.reader.get("model.embed_tokens.weight" if config.tie_word_embeddings else HEAD)
        workspace.save_tensors("head.safetensors", dict(_planes(HEAD, weights, head_moments(run.dense, hidden_states))))
        return {}

    workspace.stage("head", head)


def nested_model(run: Run) -> StreamedModel:
    """Write the nested checkpoint without policies into the workspace, if it is not there yet. Return it as a model."""
    directory, source = run.workspace.directory / "nested", run.dense
    layers = tuple(run.workspace.layer_config(index) for index in range(source.config.num_hidden_layers))
    config = dataclasses.replace(source.config, layers=layers)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        stored = [run.workspace.layer_reader(index) for index in range(len(layers))]
        kept = {name: reader for reader in stored for name in reader.files}
        for name, _ in model_parameters(config):
            yield name, kept[name].get(name) if name in kept else source.reader.get(name)
        for name in kept:
            if name.endswith((ROUNDING, SCALES)):
                yield name, kept[name].get(name)
        yield from run.workspace.load_tensors("head.safetensors").items()

    def write() -> dict[str, Any]:
        directory.mkdir(exist_ok=True)
        write_tensors(directory, tensors())
        copy_tokenizer(source.directory, directory)
        raw = moe_config_json(read_json(source.directory / "config.json"), moe_layers_to_json(layers))
        write_json(directory / "config.json", {**raw, "nested_bits": list(NESTED_BITS)})
        return {}

    run.workspace.stage("nested", write)
    return StreamedModel(directory, source.device)


def measured_damages(model: StreamedModel, blocks: Tensor, recipe: Recipe) -> dict[str, Any]:
    """The growth of the KL divergence from the whole model, in nats per token, if one part reads 4 bits and all others read 8.
    The parts are each layer's FFN, each layer's attention, and the output head. The result is a record of JSON values."""
    few = blocks[: max(1, round(recipe.section(NestedRecipe).damage_tokens / blocks.shape[1]))]
    depth = model.config.num_hidden_layers
    whole, base = _same(model.config, None), _same(model.config, HIGH)
    changed = {
        **{("ffn", index): _changed(base, index, bits=LOW) for index in range(depth)},
        **{("attention", index): _changed(base, index, attention_bits=LOW) for index in range(depth)},
        ("head", 0): _changed(base, depth, bits=LOW),
    }
    measured = measure(model, None, few, [whole, base, *changed.values()], whole)

    def damage(part: str, index: int) -> float:
        lost, least = measured[changed[part, index]].kl, measured[base].kl
        assert lost is not None and least is not None
        return max(lost - least, 0.0)

    return {
        "damage_ffn": [damage("ffn", index) for index in range(depth)],
        "damage_attention": [damage("attention", index) for index in range(depth)],
        "damage_head": damage("head", 0),
    }


def bit_candidates(config: ModelConfig, damages: Mapping[str, Any], recipe: Recipe) -> Candidates:
    """The named policies, the recipe's number of others between 8 and 4 bits, and the guard. Changes from 8 to 4 bits are made
    in the order of damage per saved byte, the least damaging first."""
    depth, queries = config.num_hidden_layers, config.attention_parameters - config.key_value_parameters
    changes = [
        *((damages["damage_ffn"][i] / config.ffn_parameters, i, "bits") for i in range(depth)),
        *((damages["damage_attention"][i] / queries, i, "attention_bits") for i in range(depth)),
        (damages["damage_head"] / config.head_parameters, depth, "bits"),
    ]
    path = [_same(config, HIGH)]
    for _, index, name in sorted(changes):
        path.append(_changed(path[-1], index, **{name: LOW}))
    costs = [_cost(rules, config) for rules in path]

    def near(share: float) -> Rules:
        """The rules whose bytes are nearest to this share of the way from the most to the fewest bytes."""
        wanted = costs[0] + share * (costs[-1] - costs[0])
        return path[min(range(len(path)), key=lambda place: abs(costs[place] - wanted))]

    full, points, ratio = _same(config, None), recipe.section(NestedRecipe).points, recipe.max_perplexity_ratio
    rules = {"full": full, "quality": path[0], "balanced": near(0.5), "fast": path[-1]}
    for point in range(1, points + 1):
        found = near(point / (points + 1))
        if found not in rules.values():
            rules[f"bytes-{100 * _cost(found, config):.1f}"] = found
    return Candidates(rules, Guard(ratio, [full, *path]) if ratio else None)


def _same(config: ModelConfig, bits: int | None) -> Rules:
    """Rules that read the same number of bits everywhere; None: all bits."""
    layers = [LayerRule.full(layer) for layer in config.layers if layer is not None]
    rules = [dataclasses.replace(rule, bits=bits, attention_bits=bits) for rule in layers]
    return (*rules, LayerRule(1, bits=bits))


def _changed(rules: Rules, index: int, **numbers: Any) -> Rules:
    rule = rules[index]
    assert rule is not None
    return (*rules[:index], dataclasses.replace(rule, **numbers), *rules[index + 1 :])


def _cost(rules: Rules, config: ModelConfig) -> float:
    ratio = policy_of("rules", "", rules, config).bytes_ratio(config, (1.0,) * config.num_hidden_layers)
    assert ratio is not None
    return ratio


def _layer(run: Run, index: int, moments: LayerMoments) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one layer that a nested checkpoint adds or changes: its expert, and the planes of its matrices."""
    get, prefix = run.dense.reader.get, f"model.layers.{index}."
    inputs = {"q_proj": moments.attention, "k_proj": moments.attention, "v_proj": moments.attention, "o_proj": moments.output}
    for projection, seen in inputs.items():
        name = f"{prefix}self_attn.{projection}.weight"
        yield from _planes(name, get(name), seen)
    gate, up, down = (get(f"{prefix}mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
    experts = {"gate_up_proj": (torch.cat((gate, up)), moments.ffn), "down_proj": (down, moments.hidden)}
    for part, (weights, seen) in experts.items():
        name = f"{prefix}mlp.experts.{part}"
        yield name, weights[None]
        for beside, tensor in _planes(name, weights, seen):
            yield beside, tensor[None]


def _planes(name: str, weights: Tensor, moments: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a checkpoint stores beside a matrix: its rounding and its scales."""
    matrix, scales = matrix_named(name), choose_scales(weights)
    codes = round_with_feedback(weights, scales, moments)
    yield matrix.rounding, codes_to_rounding(codes, weights, scales)
    yield matrix.scales, scales
