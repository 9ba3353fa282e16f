"""Methods tomoe and disp: experts by structural pruning. Weights are not changed and not copied.

1. One network makes masks over the neurons of all FFNs, and is trained end to end while the model's weights are frozen
   (`hypernetwork`, `training`).
2. The neurons of each FFN are sorted by which experts hold them, and cut into blocks (`blocks`). The last steps of the
   training keep or drop whole blocks.
3. If the recipe asks for it, gates choose which channels of queries and keys are kept (`gates`), and the others are cut out.
4. A block is an expert of the stored layer. With tomoe, a token chooses one of N rankings of the blocks; with disp, there is
   one ranking. A policy is the number of blocks that run in each layer. Policy `full` runs all of them, which is the dense
   model.

ToMoE is arXiv 2501.15316, DISP-LLM is arXiv 2410.11988.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ladimo.checkpoint import copy_tokenizer, moe_config_json, read_json, write_json, write_tensors
from ladimo.convert.data.calibration import Calibration
from ladimo.convert.distill.end_to_end import Network
from ladimo.convert.evaluation.variants import Rules
from ladimo.convert.methods.base import Converted, Method
from ladimo.convert.methods.masks.blocks import choose_widths, layer_from_blocks, masks, ranking
from ladimo.convert.methods.masks.gates import find_pairs, kept_pairs, kept_rows, with_pairs
from ladimo.convert.methods.masks.recipe import DispRecipe, MaskRecipe, TomoeRecipe, resolved
from ladimo.convert.methods.masks.report import masks_view
from ladimo.convert.methods.masks.start import find_start
from ladimo.convert.methods.masks.training import Cost, MaskTraining
from ladimo.convert.methods.registry import register
from ladimo.convert.policies.candidates import Candidates, ConvertedModel, budget_candidates
from ladimo.convert.policies.choose import NAMED
from ladimo.convert.recipe import Recipe
from ladimo.convert.report.document import MethodView
from ladimo.convert.report.record import Report
from ladimo.convert.run import Run
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.config import ModelConfig, MoeLayerConfig, moe_layers_to_json
from ladimo.policy import LayerRule, RoutingPolicy

SNAPSHOT = "training.safetensors"  # the state of an unfinished training
START_TOKENS = 65_536  # on which the statistics before training are gathered
DAMAGE_TOKENS = 8192  # on which the damage of each width is found, for policies between the budgets
MASKS = "masks.safetensors"  # partitions, routers and logits of a finished one

logger = logging.getLogger(__name__)


class MaskMethod(Method):
    """What both methods share. `kind`: the dataclass of the method's table."""

    kind: ClassVar[type[MaskRecipe]]
    ffn_kinds = ("swiglu", "gelu")

    def experts(self, recipe: Recipe) -> int:
        """The number of masks of a layer."""
        return 1

    def resolve(self, recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe:
        """Raises ValueError if a budget cannot be reached."""
        recipe = resolved(recipe, recipe.section(self.kind), config, device)
        options = recipe.section(self.kind)
        if options.qk < 1 and (config.qk_norm != "none" or config.rotary_dim != config.head_dim):
            raise ValueError(f"{self.name}.qk: heads with norms, or that are rotated in part, cannot be pruned; leave it at 1")
        budgets, fixed = options.budgets, layer_cost(config, recipe, self.experts(recipe), options.qk).fixed
        if budgets[-1] <= fixed:
            raise ValueError(f"{self.name}.budgets: is {budgets}, masks of these layers cannot go below {fixed:.3f}")
        return recipe

    def convert(self, run: Run, calibration: Calibration) -> Converted:
        options = run.recipe.section(self.kind)
        record = run.workspace.stage("masks", lambda: self.train(run, calibration))
        tensors = run.workspace.load_tensors(MASKS)
        for index in run.candidates:
            if run.workspace.layer_record(index) is None:
                partition, order = tensors[f"{index}.partition"], ranking(tensors[f"{index}.logits.0"])
                layer = layer_from_blocks(run.dense.ffn(index), partition, order, tensors.get(f"{index}.router"))
                run.workspace.save_layer(index, layer, run.dense.stored_dtype)
                run.workspace.finish_layer(index, layer.config, {"seconds": 0.0})
        layers = {index: run.workspace.layer_config(index) for index in run.candidates}
        own: StreamedModel | None = None
        config = run.config(layers)
        if options.qk < 1:
            config = with_pairs(config, tensors["pairs"])
            own = pruned_model(run, config, tensors["pairs"])
        budgets: list[dict[str, Any]] = []
        policies = {"full": widths_policy(config, {})}
        for place, target in enumerate(options.budgets):
            logits = {index: tensors[f"{index}.logits.{place}"] for index in run.candidates}
            masked, widths = choose_widths(logits, target, partial(policy_cost, config))
            name, shares = f"budget-{100 * target:g}", (policy_cost(config, masked), policy_cost(config, widths))
            union = coverage(tensors, widths)
            policies[name] = widths_policy(config, widths)
            budgets.append(
                {
                    "policy": name,
                    "target": target,
                    "widths": [widths.get(index) for index in range(config.num_hidden_layers)],
                    "masked_ratio": shares[0],
                    "ratio": shares[1],
                    "union": union,
                }
            )
            logger.info(
                "budget %.1f%%: masks keep %.1f%%, the policy %.1f%%; experts together hold %.1f%% of the neurons",
                100 * target, 100 * shares[0], 100 * shares[1], 100 * union,
            )  # fmt: skip
        named = {**with_names(policies), **policies}
        return Converted(
            layers=layers,
            entries=[{"layer": index, "converted": True, "seconds": 0.0} for index in run.candidates],
            candidates=lambda model: budget_candidates(model, named, first(calibration.holdout, DAMAGE_TOKENS), run.recipe),
            report={"masks": {"budgets": budgets, "experts": self.experts(run.recipe), "curve": record["curve"]}},
            seconds=record["seconds"],
            own=own,
        )

    def train(self, run: Run, calibration: Calibration) -> dict[str, Any]:
        """Train, and save what follows from it in the workspace. A training that was stopped goes on from its last snapshot."""
        started, options = time.monotonic(), run.recipe.section(self.kind)
        cost = layer_cost(run.dense.config, run.recipe, self.experts(run.recipe), options.qk)
        training = MaskTraining(
            Network(trainable(run.dense)), run.candidates, self.experts(run.recipe), options, cost, run.recipe.seed
        )
        earlier, known = 0.0, (run.workspace.directory / SNAPSHOT).exists()
        if known:
            state = run.workspace.load_tensors(SNAPSHOT)
            earlier = float(state["seconds"])
            training.load_state(state)
            logger.info("resuming after step %d of %d", training.step, options.steps)

        elif options.start:
            blocks = first(calibration.fit, START_TOKENS)
            for index, mlp, inputs, _ in run.dense.ffn_data(blocks, run.candidates):
                start = find_start(mlp, inputs, self.experts(run.recipe), run.generator(index))
                training.begin(run.candidates.index(index), start)
            if options.qk < 1:
                training.begin_gates(find_pairs(run.dense, first(calibration.fit, DAMAGE_TOKENS)))

        def save(training: MaskTraining) -> None:
            seconds = torch.tensor(earlier + time.monotonic() - started)
            run.workspace.save_tensors(SNAPSHOT, {**training.state(), "seconds": seconds})
            last = training.curve[-1] if training.curve else None
            if last is not None:
                logger.info(
                    "step %d: loss %.4f, %.3f times the budget, experts hold %.1f%%",
                    last.step, last.loss, last.ratio, 100 * last.union,
                )  # fmt: skip

        training.run(calibration.fit, save)
        tensors: dict[str, Tensor] = {}
        for place, (index, router) in enumerate(zip(run.candidates, training.routers(), strict=True)):
            tensors[f"{index}.partition"] = training.partitions[place]
            if router is not None:
                tensors[f"{index}.router"] = router
        for place, target in enumerate(options.budgets):
            found = zip(run.candidates, training.logits(target), strict=True)
            tensors |= {f"{index}.logits.{place}": logits for index, logits in found}
        if options.qk < 1:
            tensors["pairs"] = training.pairs()
        run.workspace.save_tensors(MASKS, tensors)
        seconds = earlier + time.monotonic() - started
        return {"curve": [asdict(point) for point in training.curve], "seconds": seconds}

    def reprofile(
        self, recipe: Recipe, model: ConvertedModel, stored: Mapping[str, RoutingPolicy], blocks: Tensor, report: dict[str, Any]
    ) -> Candidates:
        """The policies of the budgets stay. The mixtures between them are chosen again."""
        names = [*NAMED, *(budget["policy"] for budget in report["masks"]["budgets"])]
        if missing := [name for name in names if name not in stored]:
            raise ValueError(f"policy {missing[0]!r} is missing; it was made with the checkpoint and is needed")
        return budget_candidates(model, {name: stored[name].layers for name in names}, blocks, recipe)

    def view(self, report: Report) -> MethodView:
        return masks_view(report)

    def training_words(self, options: MaskRecipe) -> str:
        """How the network is trained, for `describe`."""
        goal = (
            f"{options.distill:g} x the forward KL from the dense model"
            if options.distill
            else "the next token's cross-entropy"
        )
        kind = "soft" if options.soft else "rounded"
        start = (
            "Masks and routers start from statistics of the neurons. "
            if options.start
            else "Masks start with nearly all neurons, and routers at random. "
        )
        factor = "multiply the FFN's inner activations" if options.mask_once else "multiply both branches of the FFN"
        return (
            f"A bidirectional GRU over the layers, whose input is trained too, and a head per layer make the masks. The "
            f"model's weights stay frozen. {start}{options.steps} steps of {options.batch_tokens} tokens, AdamW, learning rate "
            f"{options.lr:g} ({'falling' if options.decay else 'constant'}), weight decay {options.weight_decay:g}. The loss "
            f"is {goal}, plus {options.size:g} x the log-distance from the budget. Sampled masks are {kind} and {factor}. The "
            f"last {options.settle:.0%} of the steps keep or drop whole blocks of neurons, as they are stored. Each neuron is "
            f"stored once, and all blocks together are the dense model. {attention_words(options)}"
        )


@register
class Tomoe(MaskMethod):
    name = "tomoe"
    options = kind = TomoeRecipe

    def experts(self, recipe: Recipe) -> int:
        return recipe.split.experts

    def describe(self, recipe: Recipe) -> str:
        options = recipe.section(TomoeRecipe)
        budgets = ", ".join(f"{budget:.0%}" for budget in options.budgets)
        return (
            f"ToMoE (arXiv 2501.15316), without its masks over values. {recipe.split.experts} overlapping masks per FFN are "
            f"its experts, and a linear router chooses one per token (Gumbel, straight-through). Budgets: {budgets}. "
            f"{self.training_words(options)} Further penalties: {options.union:g} x the log-distance of the experts' union "
            f"from all neurons, {options.balance:g} x the imbalance of the router."
        )


@register
class Disp(MaskMethod):
    name = "disp"
    options = kind = DispRecipe

    def describe(self, recipe: Recipe) -> str:
        options = recipe.section(DispRecipe)
        budgets = ", ".join(f"{budget:.0%}" for budget in options.budgets)
        return (
            f"DISP-LLM (arXiv 2410.11988), its mask over the FFN's neurons only. Its masks over the residual stream leave "
            f"gathers at run time, so they are left out. One mask per FFN, the same for every token. Budgets: {budgets}. "
            f"{self.training_words(options)}"
        )


def trainable(dense: StreamedModel) -> StreamedModel:
    """The model as it is trained: on a CPU in fp32, on a GPU in its own dtype."""
    if dense.device.type != "cpu" or dense.dtype == torch.float32:
        return dense
    return StreamedModel(dense.directory, dense.device, "float32")


def attention_words(options: MaskRecipe) -> str:
    if options.qk == 1:
        return "Attention stays whole."
    chosen = "trained gates" if options.qk_train else "the power of queries and keys before training"
    return (
        f"Queries and keys keep {options.qk:.0%} of their channels, chosen by {chosen} in pairs that rotate together. The "
        "others are cut out for every policy."
    )


def pruned_model(run: Run, config: ModelConfig, pairs: Tensor) -> StreamedModel:
    """Write the checkpoint without policies into the workspace, if it is not there yet. Return it as a model. pairs: the kept
    pairs of channels [L, G, K]."""
    directory, source = run.workspace.directory / "pruned", run.dense

    def write() -> dict[str, Any]:
        directory.mkdir(exist_ok=True)
        write_tensors(directory, ((name, kept_rows(config, pairs, name, tensor)) for name, tensor in run.tensors(config)))
        copy_tokenizer(source.directory, directory)
        raw = moe_config_json(read_json(source.directory / "config.json"), moe_layers_to_json(config.layers))
        write_json(directory / "config.json", {**raw, "qk_pairs": pairs.tolist()})
        return {}

    run.workspace.stage("pruned", write)
    return StreamedModel(directory, source.device)


def first(blocks: Tensor, tokens: int) -> Tensor:
    """The first so many tokens of blocks [B, S], as whole blocks, at least one."""
    return blocks[: max(1, tokens // blocks.shape[1])]


def layer_cost(config: ModelConfig, recipe: Recipe, experts: int, qk: float = 1.0) -> Cost:
    """What the masked FFNs cost, with routers of `experts` experts, where queries and keys keep the share `qk` of their
    channels."""
    some = torch.arange(kept_pairs(config, qk)).expand(config.num_hidden_layers, config.num_key_value_heads, -1)
    attention = config.num_hidden_layers * with_pairs(config, some).pruned_parameters / config.dense_parameters
    candidates = recipe.candidate_layers(config.num_hidden_layers)
    of_neuron = 3 * config.hidden_size if config.ffn_kind == "swiglu" else 2 * config.hidden_size + 1
    per_neuron = of_neuron / config.dense_parameters
    routers = config.hidden_size * experts * (experts > 1) / config.dense_parameters
    return Cost(1 - attention + len(candidates) * (routers - per_neuron * config.intermediate_size), per_neuron)


def widths_policy(config: ModelConfig, widths: Mapping[int, int]) -> Rules:
    """So many blocks in each layer, all of them in layers without a width."""

    def rule(index: int, layer: MoeLayerConfig) -> LayerRule:
        return LayerRule(widths.get(index, layer.num_experts), renormalize=False)

    return tuple(None if layer is None else rule(index, layer) for index, layer in enumerate(config.layers))


def policy_cost(config: ModelConfig, widths: Mapping[int, int]) -> float:
    """The share of active parameters with so many blocks in each layer."""
    return config.active_parameters_ratio(
        tuple(None if rule is None else float(rule.top_k) for rule in widths_policy(config, widths))
    )


def with_names(policies: Mapping[str, Rules]) -> dict[str, Rules]:
    """The named policies: full, then the first, the middle and the last budget."""
    budgets = [rules for name, rules in policies.items() if name != "full"]
    chosen = (policies["full"], budgets[0], budgets[len(budgets) // 2], budgets[-1])
    return dict(zip(NAMED, chosen, strict=True))


def coverage(tensors: Mapping[str, Tensor], widths: Mapping[int, int]) -> float:
    """The share of neurons that some expert holds, as a mean over layers."""
    shares = []
    for index, width in widths.items():
        partition = tensors[f"{index}.partition"]
        held = masks(partition, ranking(tensors[f"{index}.logits.0"]), width, int(partition.max()) + 1)
        shares.append(held.any(dim=0).float().mean().item())
    return sum(shares) / len(shares)
