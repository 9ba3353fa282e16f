"""`ladimo profile`: measure a converted checkpoint on another text and rebuild its policies, frontier and report. Trains
nothing."""

import logging
from pathlib import Path
from typing import Any

import torch

from ladimo.checkpoint import (
    FRONTIER,
    POLICIES,
    choose_device,
    read_config,
    read_json,
    read_policies,
    resolve_directory,
    write_json,
    write_policy,
)
from ladimo.convert.data.calibration import Encoder, calibrate
from ladimo.convert.evaluation.measure import num_scored
from ladimo.convert.methods.registry import get_method
from ladimo.convert.policies.candidates import ConvertedModel
from ladimo.convert.policies.frontier import measure_frontier
from ladimo.convert.provenance import PROVENANCE, device_name, file_hash, find_dense_source
from ladimo.convert.recipe import Recipe
from ladimo.convert.report_files import REPORT, policy_entries, prefill_costs, write_report
from ladimo.convert.stock.profile import profile_stock
from ladimo.convert.streamed_model import StreamedModel

logger = logging.getLogger(__name__)


def reprofile(name: str, text: Path, dense: Path | None = None, device: str = "auto") -> dict[str, Any]:
    """Rebuild policies, frontier and report in place, and return the report.

    The text is cut as in a conversion. The number of tokens to evaluate is a fifth of the recipe's tokens, and as many others
    are for profiling. Policies that a user added stay. A model that was trained as MoE gets no report. dense: the directory of
    the dense source, if it is not the one in provenance.json. Raises ValueError if the model is dense, or if its dense source
    is not found.
    """
    directory = resolve_directory(name)
    if read_config(directory).trained_as_moe:
        if dense is not None:
            raise ValueError(f"{directory}: was not converted, so it has no dense source; leave out --dense")
        return profile_stock(directory, text, choose_device(device))
    own = StreamedModel(directory, choose_device(device))
    if not own.config.moe_layer_indices:
        raise ValueError(f"{directory}: is a dense model; there is no routing to profile")
    holds_source = own.config.nested_bits and own.config.nested_top_bits is None
    source = own.directory if holds_source else find_dense_source(directory, dense)
    if source is None:
        raise ValueError(f"{directory}: its dense source is needed and not where {PROVENANCE} says; give --dense DIR")
    report: dict[str, Any] = read_json(directory / REPORT)
    recipe = Recipe.from_dict(report["recipe"])
    calibration = calibrate(Encoder(directory, own.config), recipe.tokens, recipe.seed, [text])
    if calibration.note:
        logger.warning("%s", calibration.note)
    profiled = torch.cat((calibration.fit, calibration.holdout))[-max(1, len(calibration.evaluation)) :]
    dense_model = own if holds_source else StreamedModel(source, own.device)
    model = ConvertedModel.of(own, dense_model)
    stored = read_policies(directory, own.config)
    candidates = get_method(recipe.method).reprofile(recipe, model, stored, profiled, report)
    points = measure_frontier(model, candidates, calibration.evaluation)
    report["source"]["perplexity"] = points.dense_perplexity
    report["conditions"]["profiled"] = {
        "text": {"path": str(text.resolve()), "sha256": file_hash(text)},
        "tokens": {"profile": num_scored(profiled), "evaluation": num_scored(calibration.evaluation)},
        "device": device_name(own.device),
    }
    stale = {entry["policy"] for entry in report["policies"]} - {policy.name for policy in points.policies}
    costs = prefill_costs(own)
    report["conditions"]["prefill_costs"] = None if costs is None else costs.to_dict()
    report |= policy_entries(points, own.config, costs)
    # In this order, a reader only finds complete files, and the frontier never names a missing policy.
    for policy in points.policies:
        write_policy(directory, policy)
    write_json(directory / FRONTIER, points.frontier.to_dict())
    for policy_name in stale:
        (directory / POLICIES / f"{policy_name}.json").unlink(missing_ok=True)
    write_report(directory, report)
    return report
