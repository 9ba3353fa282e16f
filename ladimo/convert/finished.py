"""Work on a finished checkpoint: evaluate its policies, profile it again. Neither trains anything."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ladimo.checkpoint import (
    FRONTIER,
    POLICIES,
    choose_device,
    read_json,
    read_policies,
    resolve_directory,
    write_json,
    write_policy,
)
from ladimo.convert.calibration import Encoder, calibrate, evaluation_blocks
from ladimo.convert.candidates import budget_candidates, routed_candidates
from ladimo.convert.choose_policy import NAMED, Rules
from ladimo.convert.evaluate import ExpertSource, figures, likelihoods, measure, num_scored
from ladimo.convert.operating_points import measure_operating_points
from ladimo.convert.pipeline import load_experts, recipe_taus
from ladimo.convert.profile import LayerProfile, profile_layer
from ladimo.convert.provenance import PROVENANCE, device_name, file_hash, find_dense_source
from ladimo.convert.recipe import Recipe
from ladimo.convert.report import REPORT, policy_entries, write_report
from ladimo.convert.tasks import PROTOCOL, EncodedTask, encode_task, read_task, score_task, task_files
from ladimo.convert.teacher import StreamedModel
from ladimo.model.moe import ExpertLayer
from ladimo.policy import RoutingPolicy

logger = logging.getLogger(__name__)


def evaluate_checkpoint(
    name: str,
    text: Path,
    policy: str = "all",
    tokens: int | None = None,
    dense: Path | None = None,
    device: str = "auto",
    tasks: Sequence[Path] = (),
    items: int | None = None,
) -> dict[str, Any]:
    """The JSON object of `ladimo evaluate`, with the key "tasks" where there are any. Works on dense models too.

    dense: where the dense source is, if not where provenance.json says; figures that need it and lack it are None. tasks: files
    of `ladimo.convert.tasks`' forms, or directories of them; items: the first so many of each (None = all). Raises ValueError
    for an unknown policy, text shorter than one block, a wrong task file or a broken checkpoint.
    """
    directory = resolve_directory(name)
    own = StreamedModel(directory, choose_device(device))
    policies = read_policies(directory, own.config)
    chosen = list(policies.values()) if policy == "all" else [_named(policies, policy)]
    encoder = Encoder(directory, own.config)
    blocks = evaluation_blocks(encoder, text, tokens)
    encoded = [encode_task(read_task(file, items), encoder) for file in task_files(tasks)]
    model, experts = own, None
    source = find_dense_source(directory, dense) if own.config.moe_layer_indices else None
    if source is not None:
        model, experts = StreamedModel(source, own.device), experts_of(own)
    variants = [entry.layers for entry in chosen]
    reference: Rules | None = None
    if model.config.moe_layer_indices:
        logger.warning("the dense source is not at hand: figures relative to it are null (--dense DIR says where it is)")
    else:
        reference = (None,) * model.config.num_hidden_layers
        variants.append(reference)
    measured = measure(model, experts, blocks, variants, reference)
    perplexity = None if reference is None else measured[reference].perplexity
    result = {
        "model": name,
        "text": str(text),
        "tokens": num_scored(blocks),
        "dense": {"perplexity": perplexity},
        "policies": [figures(entry, measured[entry.layers], own.config, perplexity) for entry in chosen],
    }
    if encoded:
        result["tasks"] = _task_entries(model, experts, encoded, chosen, reference)
    return result


def profile_checkpoint(name: str, text: Path, dense: Path | None = None, device: str = "auto") -> dict[str, Any]:
    """Profile the routing weights on another text, rebuild policies, frontier and report in place; returns the report.

    The text is cut as in a conversion: a fifth of the recipe's tokens to evaluate, as many others to profile. Policies that
    a user added stay. Raises ValueError when the model is dense or its dense source is not at hand.
    """
    directory = resolve_directory(name)
    own = StreamedModel(directory, choose_device(device))
    if not own.config.moe_layer_indices:
        raise ValueError(f"{directory}: is a dense model; there is no routing to profile")
    source = find_dense_source(directory, dense)
    if source is None:
        raise ValueError(f"{directory}: its dense source is needed and not where {PROVENANCE} says; give --dense DIR")
    report: dict[str, Any] = read_json(directory / REPORT)
    recipe = Recipe.from_dict(report["recipe"])
    encoder = Encoder(directory, own.config)
    calibration = calibrate(encoder, recipe.tokens, recipe.seed, [text])
    if calibration.note:
        logger.warning("%s", calibration.note)
    model, experts = StreamedModel(source, own.device), experts_of(own)
    profiled = torch.cat((calibration.fit, calibration.holdout))[-max(1, len(calibration.evaluation)) :]
    profiles: dict[int, LayerProfile] = {}
    if "elastic" in report:
        stored = read_policies(directory, own.config)
        names = [*NAMED, *(budget["policy"] for budget in report["elastic"]["budgets"])]
        named = {name: _named(stored, name).layers for name in names}
        candidates, guard = budget_candidates(model, experts, own.config, named, profiled, recipe)
    else:
        for index, _, inputs, targets in model.ffn_data(profiled, own.config.moe_layer_indices):
            profiles[index] = profile_layer(experts(index), inputs, targets, recipe_taus(recipe.policies))
            logger.info("layer %d: best expert's weight %.2f", index, profiles[index].mean_best_weight)
        candidates, guard = routed_candidates(model, experts, own.config, profiles, profiled, recipe)
    points = measure_operating_points(model, experts, own.config, candidates, calibration.evaluation, guard)
    for layer in report["layers"]:
        if layer["layer"] in profiles:
            layer["profile"] = profiles[layer["layer"]].to_dict()
    report["source"]["perplexity"] = points.dense_perplexity
    report["conditions"]["profiled"] = {
        "text": {"path": str(text.resolve()), "sha256": file_hash(text)},
        "tokens": {"profile": num_scored(profiled), "evaluation": num_scored(calibration.evaluation)},
        "device": device_name(own.device),
    }
    stale = {entry["policy"] for entry in report["policies"]} - {policy.name for policy in points.policies}
    report |= policy_entries(points)
    # In this order every file that a reader meets is whole, and the frontier never names a policy that is not there.
    for policy in points.policies:
        write_policy(directory, policy)
    write_json(directory / FRONTIER, points.frontier.to_dict())
    for policy_name in stale:
        (directory / POLICIES / f"{policy_name}.json").unlink(missing_ok=True)
    write_report(directory, report)
    return report


def _task_entries(
    model: StreamedModel,
    experts: ExpertSource | None,
    tasks: Sequence[EncodedTask],
    policies: Sequence[RoutingPolicy],
    reference: Rules | None,
) -> list[dict[str, Any]]:
    """One entry per task: what it is, and its scores under every policy and of the dense source (None without one)."""
    continuations = [one for task in tasks for one in task.continuations]
    variants = [policy.layers for policy in policies] + ([] if reference is None else [reference])
    found = likelihoods(model, experts, continuations, variants)
    entries, place = [], 0
    for task in tasks:
        own = slice(place, place + len(task.continuations))
        place = own.stop
        scores = {variant: score_task(task.items, values[own]) for variant, values in found.items()}
        entries.append(
            {
                "task": task.task.name,
                "file": str(task.task.file),
                "form": task.task.form,
                "protocol": PROTOCOL,
                "items": len(task.items),
                "skipped": len(task.task.items) - len(task.items),
                "truncated": task.truncated,
                "dense": None if reference is None else scores[reference],
                "policies": [
                    {"policy": policy.name, "version": policy.version, **scores[policy.layers]} for policy in policies
                ],
            }
        )
    return entries


def experts_of(own: StreamedModel) -> ExpertSource:
    def experts(index: int) -> ExpertLayer:
        layer = own.config.layers[index]
        assert layer is not None
        return load_experts(own.reader, f"model.layers.{index}.mlp.", layer, own)

    return experts


def _named(policies: Mapping[str, RoutingPolicy], name: str) -> RoutingPolicy:
    try:
        return policies[name]
    except KeyError:
        raise ValueError(f"policy {name!r} is unknown; known: {', '.join(sorted(policies))}") from None
