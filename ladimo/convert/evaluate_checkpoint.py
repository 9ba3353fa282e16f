"""`ladimo evaluate`: perplexity, cost and task scores of a checkpoint's policies. Trains nothing."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ladimo.checkpoint import (
    choose_device,
    read_policies,
    resolve_directory,
)
from ladimo.convert.data.calibration import Encoder, evaluation_blocks
from ladimo.convert.evaluation.likelihoods import likelihoods
from ladimo.convert.evaluation.measure import figures, measure, num_scored
from ladimo.convert.evaluation.tasks import PROTOCOL, EncodedTask, encode_task, read_task, score_task, task_files
from ladimo.convert.evaluation.variants import Rules, variant_of
from ladimo.convert.policies.candidates import ConvertedModel
from ladimo.convert.provenance import find_dense_source
from ladimo.convert.stock.model import open_model
from ladimo.convert.streamed_model import ExpertSource, StreamedModel
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
    """The JSON object of `ladimo evaluate`. It has the key "tasks" if there are tasks. Dense models work, too.

    tokens: score the first so many tokens, rounded up to whole blocks; None: all. dense: the directory of the dense source, if
    it is not the one in provenance.json. Without a dense source, the figures that need it are None. tasks: task files, or
    directories of them, in the forms of `ladimo.convert.evaluation.tasks`. items: the first so many of each; None: all. Raises
    ValueError for an unknown policy, text shorter than one block, a wrong task file or a broken checkpoint.
    """
    directory = resolve_directory(name)
    own = open_model(directory, choose_device(device))
    policies = read_policies(directory, own.config)
    chosen = list(policies.values()) if policy == "all" else [_named(policies, policy)]
    encoder = Encoder(directory, own.config)
    blocks = evaluation_blocks(encoder, text, tokens)
    encoded = [encode_task(read_task(file, items), encoder) for file in task_files(tasks)]
    model, experts = own, None
    nested = bool(own.config.nested_bits)
    holds_source = nested and own.config.nested_top_bits is None  # such a checkpoint contains the dense model
    converted = bool(own.config.moe_layer_indices) and not holds_source and not own.config.trained_as_moe
    source = find_dense_source(directory, dense) if converted else None
    apart: StreamedModel | None = None
    if source is not None:
        found = ConvertedModel.of(own, StreamedModel(source, own.device))
        model, experts, apart = found.dense, found.experts, found.apart
    variants = [variant_of(entry, own.config) for entry in chosen]
    reference: Rules | None = None
    if converted and source is None:
        logger.warning("the dense source was not found, so figures relative to it are null; --dense DIR names its directory")
    else:
        reference = (None,) * model.config.num_hidden_layers
        if holds_source:
            reference = ConvertedModel.of(own, own).reference
        variants.append(reference)
    measured = measure(model, experts, blocks, variants, reference, apart)
    perplexity = None if reference is None else measured[reference].perplexity
    result = {
        "model": name,
        "text": str(text),
        "tokens": num_scored(blocks),
        "dense": {"perplexity": perplexity},
        "policies": [figures(entry, measured[variant_of(entry, own.config)], own.config, perplexity) for entry in chosen],
    }
    if encoded:
        result["tasks"] = _task_entries(model, experts, encoded, chosen, reference, apart)
    return result


def _task_entries(
    model: StreamedModel,
    experts: ExpertSource | None,
    tasks: Sequence[EncodedTask],
    policies: Sequence[RoutingPolicy],
    reference: Rules | None,
    apart: StreamedModel | None,
) -> list[dict[str, Any]]:
    """One entry per task: its description, its scores under each policy, and those of the dense source (None without one).
    apart: the dense source, if `model` is not."""
    continuations = [one for task in tasks for one in task.continuations]
    own = {policy.name: variant_of(policy, model.config) for policy in policies}
    references = [] if reference is None else [reference]
    found = likelihoods(model, experts, continuations, [*own.values(), *(references if apart is None else [])])
    if apart is not None:
        found |= likelihoods(apart, None, continuations, references)
    entries, place = [], 0
    for task in tasks:
        here = slice(place, place + len(task.continuations))
        place = here.stop
        scores = {variant: score_task(task.items, values[here]) for variant, values in found.items()}
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
                    {"policy": policy.name, "version": policy.version, **scores[own[policy.name]]} for policy in policies
                ],
            }
        )
    return entries


def _named(policies: Mapping[str, RoutingPolicy], name: str) -> RoutingPolicy:
    try:
        return policies[name]
    except KeyError:
        raise ValueError(f"policy {name!r} is unknown; known: {', '.join(sorted(policies))}") from None
