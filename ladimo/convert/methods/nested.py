"""Method nested: one set of weights at several precisions.

1. One pass over the dense model gathers the second moments of what every matrix multiplies (`rounding.moments`).
2. Every matrix gets two planes of four bits each (`ladimo.model.nested`), both chosen with error feedback (`rounding.gptq`).
   The weights themselves stay, so that policy `full` is the dense model. With `top_bits` 8 only the planes stay.
3. The damage of reading 4 instead of 8 bits is found for each FFN, each attention and the output head alone: that of layers
   is estimated (`policies.precision`), that of the head measured. FFNs and the head have two: with and without refining what
   matters to a token (`ladimo.model.nested.refinement`). The solver takes the changes in the order of damage per byte saved.

Nothing is trained. No FFN is split: each is one expert. A policy chooses its bits, and its neurons are refined one by one.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
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
from ladimo.convert.policies.frontier import policy_cost
from ladimo.convert.policies.precision import precision_damages
from ladimo.convert.recipe import Recipe, require
from ladimo.convert.rounding.gptq import ErrorFeedback, choose_planes, choose_scales, round_nearest
from ladimo.convert.rounding.moments import LayerMoments, head_moments, layer_moments
from ladimo.convert.run import Run
from ladimo.convert.source import model_parameters
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.config import ModelConfig, MoeLayerConfig, moe_layers_to_json
from ladimo.model.nested.layers import EMBEDDING, TIED_HEAD, Matrix, matrix_named
from ladimo.model.nested.weights import codes_to_rounding, low_plane, low_rounded_down, plane_to_nibbles, rounded_down
from ladimo.model.precision import NESTED_BITS
from ladimo.policy import LayerRule, RoutingPolicy

LOW, HIGH = NESTED_BITS
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class NestedRecipe:
    """damage_tokens: held-out tokens on which the damage of each change is found. points: how many policies that refine neurons
    the solver adds between 8 bits everywhere and 4 bits everywhere; half as many do not. refine, head_refine: those of the
    policies that refine (`RoutingPolicy`). route: `balanced` and `fast` refine neurons, too. They then suit single requests,
    not batches. top_bits: of the stored weights; 16: as many as the source has. With 8, the checkpoint takes about 0.53 of
    the dense model's bytes, `full` reads 8 bits, and no policy refines neurons."""

    damage_tokens: int = 4096
    points: int = 5
    refine: float = 1.5
    head_refine: float = 8.0
    route: bool = False
    top_bits: int = 16

    def __post_init__(self) -> None:
        require(self.damage_tokens >= 1, "nested.damage_tokens", "must be at least 1", self.damage_tokens)
        require(self.points >= 0, "nested.points", "must be at least 0", self.points)
        for name in ("refine", "head_refine"):
            require(getattr(self, name) >= 0, f"nested.{name}", "must be at least 0", getattr(self, name))
        require(self.top_bits in (HIGH, 16), "nested.top_bits", f"must be {HIGH} or 16", self.top_bits)
        require(not (self.route and self.top_bits == HIGH), "nested.route", "needs nested.top_bits = 16", self.route)


@dataclass(frozen=True, slots=True)
class Change:
    """One part read at 4 bits instead of 8: the FFN or the attention of layer `index`, or the head. damage: by how much the KL
    divergence from the whole model grows, in nats per token. saved: the share of the dense model's bytes that it saves."""

    part: str
    index: int
    refined: bool
    damage: float
    saved: float


@register
class Nested(Method):
    name = "nested"
    options = NestedRecipe
    ffn_kinds = ("swiglu", "gelu")

    def resolve(self, recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe:
        """Raises ValueError if the recipe asks for some of the layers only, or if planes cannot hold the model's matrices."""
        if recipe.layers not in ("auto", "all"):
            raise ValueError(f"layers: is {recipe.layers}; method nested rounds every layer")
        if _planes_only(recipe):
            widths = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
            for name, width in (widths | {"attention width": config.num_attention_heads * config.head_dim}).items():
                if width % 2:
                    raise ValueError(f"nested.top_bits: {HIGH} needs matrices with even widths; {name} is {width}")
        return recipe

    def describe(self, recipe: Recipe) -> str:
        planes_only = _planes_only(recipe)
        precisions = "two precisions: 4 bits and 8 bits (a second plane of 4 bits below the first)"
        if not planes_only:
            precisions = "three precisions: 4 bits, 8 bits (a second plane of 4 bits below the first) and whole"
        top = "The whole weights are not stored: `full` is the dense model at 8 bits, the embedding included. "
        refined = "words" if planes_only else "neurons and words"
        return (
            f"One set of weights at {precisions}. The integers are chosen with error feedback (GPTQ, arXiv 2210.17323), with a "
            f"scale per row and 32 columns. Nothing is trained. {top if planes_only else ''}A policy chooses the bits of every "
            f"FFN, every attention and the output head. Where it refines, a token reads the {refined} that matter to it at 8 "
            "bits, and all others at 4."
        )

    def convert(self, run: Run, calibration: Calibration) -> Converted:
        round_layers(run, calibration.fit)
        own = nested_model(run)
        entries = [
            {"layer": index, "converted": True, "seconds": run.workspace.finished_record(index)["seconds"]}
            for index in range(run.dense.config.num_hidden_layers)
        ]
        measured = run.workspace.stage("damages", lambda: {"changes": estimated_changes(own, calibration.holdout, run.recipe)})
        layers = {index: layer for index, layer in enumerate(own.config.layers) if layer is not None}
        return Converted(
            layers, entries, lambda model: bit_candidates(model.config, measured["changes"], run.recipe), measured, own=own
        )

    def reprofile(
        self, recipe: Recipe, model: ConvertedModel, stored: Mapping[str, RoutingPolicy], blocks: Tensor, report: dict[str, Any]
    ) -> Candidates:
        report["changes"] = estimated_changes(model.dense, blocks, recipe)
        return bit_candidates(model.config, report["changes"], recipe)


def _planes_only(recipe: Recipe) -> bool:
    return recipe.section(NestedRecipe).top_bits == HIGH


def round_layers(run: Run, blocks: Tensor) -> None:
    """Save each layer's matrices with their planes in the workspace, and then those of the output head. The second moments come
    from token blocks [B, S]. A finished layer is not rounded again."""
    workspace, config = run.workspace, run.dense.config

    def use(index: int, moments: LayerMoments) -> None:
        if workspace.layer_record(index) is not None:
            return
        started = time.monotonic()
        workspace.save_tensors(f"layers/{index}/model.safetensors", dict(_layer(run, index, moments)))
        layer = MoeLayerConfig(1, 1, config.intermediate_size, expert_weight="one", router="none", ffn_kind=config.ffn_kind)
        workspace.finish_layer(index, layer, {"seconds": time.monotonic() - started})

    def head() -> dict[str, Any]:
        moments = head_moments(run.dense, layer_moments(run.dense, blocks, use))
        embedding = run.dense.reader.get(EMBEDDING)
        weights = embedding if config.tie_word_embeddings else run.dense.reader.get(HEAD)
        tensors = dict(_planes(run, HEAD, weights, ErrorFeedback.of(moments)))
        if _planes_only(run.recipe) and not config.tie_word_embeddings:
            tensors |= _nearest(EMBEDDING, embedding)
        workspace.save_tensors("head.safetensors", tensors)
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
        ends = run.workspace.load_tensors("head.safetensors")
        for name, _ in model_parameters(config):
            matrix = TIED_HEAD if name == EMBEDDING and config.tie_word_embeddings else matrix_named(name)
            if name not in kept and matrix.high not in kept and matrix.high not in ends:
                yield name, source.reader.get(name)
        for name, reader in kept.items():
            yield name, reader.get(name)
        yield from ends.items()

    def write() -> dict[str, Any]:
        directory.mkdir(exist_ok=True)
        write_tensors(directory, tensors())
        copy_tokenizer(source.directory, directory)
        raw = moe_config_json(read_json(source.directory / "config.json"), moe_layers_to_json(layers))
        top = {"nested_top_bits": HIGH} if _planes_only(run.recipe) else {}
        write_json(directory / "config.json", {**raw, "nested_bits": list(NESTED_BITS), **top})
        return {}

    run.workspace.stage("nested", write)
    return StreamedModel(directory, source.device)


def estimated_changes(model: StreamedModel, blocks: Tensor, recipe: Recipe) -> list[dict[str, Any]]:
    """What each change of one part costs, when all others read 8 bits: a list of `Change` as JSON values. The changes of layers
    are estimated, those of the head are measured."""
    options = recipe.section(NestedRecipe)
    few = blocks[: max(1, round(options.damage_tokens / blocks.shape[1]))]
    depth, config = model.config.num_hidden_layers, model.config
    base = _same(config, HIGH)
    whole = base if config.nested_top_bits else _same(config, None)
    heads = {
        True: _changed(base, depth, bits=LOW, refine=options.head_refine),
        False: _changed(base, depth, bits=LOW),
    }
    measured = measure(model, None, few, [whole, base, *heads.values()], whole)
    least = measured[base].kl
    assert least is not None
    changes = []
    for refined, rules in heads.items():
        kl = measured[rules].kl
        assert kl is not None
        saved = policy_cost(base, measured[base], config) - policy_cost(rules, measured[rules], config)
        changes.append(Change("head", depth, refined, max(kl - least, 0.0), saved))
    at8 = {index: _rule(base, index) for index in range(depth)}
    changed = {
        index: {
            ("ffn", True): dataclasses.replace(rule, bits=LOW, refine=options.refine),
            ("ffn", False): dataclasses.replace(rule, bits=LOW),
            ("attention", False): dataclasses.replace(rule, attention_bits=LOW),
        }
        for index, rule in at8.items()
    }
    if config.nested_top_bits:  # no neurons can be refined
        for parts in changed.values():
            del parts["ffn", True]
    damages, neurons = precision_damages(model, {index: [at8[index], *changed[index].values()] for index in at8}, few)
    experts = (1.0,) * depth
    for index, parts in changed.items():
        for (part, refined), rule in parts.items():
            rules = (*base[:index], rule, *base[index + 1 :])
            cost = policy_of("rules", "", rules, config).bytes_ratio(config, experts, config.neuron_rows * neurons[index][rule])
            assert cost is not None
            damage = max(damages[index][rule] - damages[index][at8[index]], 0.0)
            changes.append(Change(part, index, refined, damage, policy_cost(base, measured[base], config) - cost))
    return [dataclasses.asdict(change) for change in changes]


def bit_candidates(config: ModelConfig, damages: Sequence[Mapping[str, Any]], recipe: Recipe) -> Candidates:
    """The named policies, the recipe's number of others between 8 and 4 bits, and the guard.

    Unless the recipe says `route`, the named policies and the guard refine words, but no neurons: a batch would need nearly all
    of them, each for another token. The others are for batches of 1, and also refine neurons. Half as many are for larger
    batches, and do not.
    """
    options, known = recipe.section(NestedRecipe), {}
    for raw in damages:
        one = Change(**raw)
        known[one.part, one.index, one.refined] = one
    whole = {key: change for key, change in known.items() if not (change.refined and change.part == "ffn")}
    path, refined = _Path.solve(config, whole, options), _Path.solve(config, known, options)
    points, ratio = options.points, recipe.max_perplexity_ratio
    # Where the top is 8 bits, these are `full`, and `quality` has to be cheaper.
    full, better, middle = (path.rules[0], 1 / 3, 2 / 3) if config.nested_top_bits else (_same(config, None), 0.0, 0.5)
    rules = {"full": full, "quality": path.near(better), "balanced": path.near(middle), "fast": path.rules[-1]}
    if options.route:
        rules |= {"balanced": refined.near(middle), "fast": refined.near(5 / 6), "saved-100": path.rules[-1]}
    for name, some, count in (("saved", path, points // 2), ("refined", refined, points)):
        for point in range(1, count + 1):
            found = some.near(point / (count + 1))
            if found not in rules.values() and (some is path or any(rule and rule.refine for rule in found[:-1])):
                rules[f"{name}-{100 * point / (count + 1):.0f}"] = found
    return Candidates(rules, Guard(ratio, [full, *path.rules]) if ratio else None)


@dataclass(frozen=True, slots=True)
class _Path:
    """Solutions, from 8 bits everywhere to 4 bits everywhere, and the share of the dense model's bytes that each one saves."""

    rules: list[Rules]
    saved: list[float]

    @classmethod
    def solve(cls, config: ModelConfig, known: Mapping[tuple[str, int, bool], Change], options: NestedRecipe) -> "_Path":
        """Of all changes from 8 to 4 bits, those with the least damage per saved byte come first.

        A part that can be refined changes in two steps: to 4 bits refined, and to 4 bits. If the second step is the better one,
        both are taken together. The head never takes the second step alone: its words cost almost no bytes.
        """
        steps: list[tuple[float, float, Change]] = []  # damage per saved byte, saved bytes, and what it changes to
        for (part, index, is_refined), end in known.items():
            middle = known.get((part, index, True))
            if is_refined or middle is None:
                if not is_refined:
                    steps.append((end.damage / end.saved, end.saved, end))
                continue
            rest = max(end.damage - middle.damage, 0.0), end.saved - middle.saved
            if middle.saved <= 0 or rest[1] <= 0 or middle.damage / middle.saved >= rest[0] / rest[1]:
                steps.append((end.damage / end.saved, end.saved, end))
                continue
            steps.append((middle.damage / middle.saved, middle.saved, middle))
            if part != "head":
                steps.append((rest[0] / rest[1], rest[1], end))
        rules, saved = [_same(config, HIGH)], [0.0]
        for _, bytes_saved, to in sorted(steps, key=lambda step: step[:2]):
            rules.append(_apply(rules[-1], to, options))
            saved.append(saved[-1] + bytes_saved)
        return cls(rules, saved)

    def near(self, share: float) -> Rules:
        """The solution whose saved bytes are nearest to this share of all that can be saved."""
        return self.rules[min(range(len(self.rules)), key=lambda place: abs(self.saved[place] - share * self.saved[-1]))]


def _apply(rules: Rules, to: Change, options: NestedRecipe) -> Rules:
    if to.part == "attention":
        return _changed(rules, to.index, attention_bits=LOW)
    floor = options.head_refine if to.part == "head" else options.refine
    return _changed(rules, to.index, bits=LOW, refine=floor if to.refined else None)


def _same(config: ModelConfig, bits: int | None) -> Rules:
    """Rules that read the same number of bits everywhere; None: all bits."""
    layers = [LayerRule.full(layer) for layer in config.layers if layer is not None]
    rules = [dataclasses.replace(rule, bits=bits, attention_bits=bits) for rule in layers]
    return (*rules, LayerRule(1, bits=bits))


def _rule(rules: Rules, index: int) -> LayerRule:
    rule = rules[index]
    assert rule is not None
    return rule


def _changed(rules: Rules, index: int, **numbers: Any) -> Rules:
    rule = _rule(rules, index)
    return (*rules[:index], dataclasses.replace(rule, **numbers), *rules[index + 1 :])


def _layer(run: Run, index: int, moments: LayerMoments) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one layer that a nested checkpoint adds or changes: its expert, and the planes of its matrices."""
    get, prefix = run.dense.reader.get, f"model.layers.{index}."
    feedback = ErrorFeedback.of(moments.attention)
    for projection in ("q_proj", "k_proj", "v_proj"):
        name = f"{prefix}self_attn.{projection}.weight"
        yield from _planes(run, name, get(name), feedback)
    name = f"{prefix}self_attn.o_proj.weight"
    yield from _planes(run, name, get(name), ErrorFeedback.of(moments.output))
    mlp = f"{prefix}mlp."
    first = ("up",) if run.dense.config.ffn_kind == "gelu" else ("gate", "up")
    gate_up = torch.cat([get(f"{mlp}{part}_proj.weight") for part in first])
    experts = {"gate_up_proj": (gate_up, moments.ffn), "down_proj": (get(f"{mlp}down_proj.weight"), moments.hidden)}
    if run.dense.config.ffn_kind == "gelu":
        yield f"{mlp}experts.up_bias", get(f"{mlp}up_proj.bias")[None]
        yield f"{mlp}output_bias", get(f"{mlp}down_proj.bias")
    for part, (weights, seen) in experts.items():
        name = f"{mlp}experts.{part}"
        if not _planes_only(run.recipe):
            yield name, weights[None]
        for beside, tensor in _planes(run, name, weights, ErrorFeedback.of(seen)):
            yield beside, tensor[None]


def _planes(run: Run, name: str, weights: Tensor, feedback: ErrorFeedback) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a checkpoint stores beside a matrix [N, K], or in its place."""
    matrix, planes_only = matrix_named(name), _planes_only(run.recipe)
    scales = choose_scales(weights, feedback.importance)
    high, low = choose_planes(weights, scales, feedback, any_low=planes_only)
    if planes_only:
        yield from _stored_planes(matrix, high, low, scales, weights.shape[1])
        return
    yield matrix.rounding, codes_to_rounding(high, rounded_down(weights, scales))
    yield matrix.low_rounding, codes_to_rounding(low, low_rounded_down(weights, high, scales))
    yield matrix.scales, scales


def _nearest(name: str, weights: Tensor) -> dict[str, Tensor]:
    """The planes of a matrix [N, K] that multiplies nothing, in its place."""
    scales = choose_scales(weights)
    high = round_nearest(weights, scales)
    return dict(_stored_planes(matrix_named(name), high, low_plane(weights, high, scales), scales, weights.shape[1]))


def _stored_planes(matrix: Matrix, high: Tensor, low: Tensor, scales: Tensor, cols: int) -> Iterator[tuple[str, Tensor]]:
    for name, codes in ((matrix.high, high), (matrix.low, low)):
        yield name, plane_to_nibbles(codes[:, :cols])
    yield matrix.scales, scales
