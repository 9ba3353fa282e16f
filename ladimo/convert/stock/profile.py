"""`ladimo profile` for models that were trained as Mixture-of-Experts: policies below their own number of experts.

Legend: T tokens, D hidden_size, E experts.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.checkpoint import FRONTIER, POLICIES, read_json, write_json, write_policy
from ladimo.convert.data.calibration import Encoder, calibrate
from ladimo.convert.evaluation.measure import num_scored
from ladimo.convert.ffn.expert_layer import full_rule, route
from ladimo.convert.policies.candidates import ConvertedModel, routed_candidates
from ladimo.convert.policies.frontier import measure_frontier
from ladimo.convert.policies.routing_profile import LayerProfile, profile_layer
from ladimo.convert.provenance import device_name, file_hash
from ladimo.convert.recipe import Recipe
from ladimo.convert.report_files import PROFILE, policy_entries
from ladimo.convert.stock.model import StockModel
from ladimo.model.moe import ExpertLayer
from ladimo.policy import unmeasured_policies

FLOORS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # shares of the best score that `relative_floor` is tried at

logger = logging.getLogger(__name__)


def profile_stock(directory: Path, text: Path, device: torch.device, recipe: Recipe | None = None) -> dict[str, Any]:
    """Write policies, frontier and routing/profile.json into the checkpoint, and return the content of the last.

    The text is cut as for a conversion. Policies that a user added stay. Raises ValueError for a text that is too short.
    """
    recipe = recipe or Recipe()
    model = StockModel(directory, device)
    config = model.config
    calibration = calibrate(Encoder(directory, config), recipe.tokens, recipe.seed, [text])
    if calibration.note:
        logger.warning("%s", calibration.note)
    profiled = torch.cat((calibration.fit, calibration.holdout))[-max(1, len(calibration.evaluation)) :]
    profiles: dict[int, LayerProfile] = {}
    layers = []
    for index, inputs, outputs in model.expert_data(profiled):
        experts = model.experts(index)
        profiles[index] = profile_layer(experts, inputs, outputs, recipe.policies.taus, FLOORS)
        layers.append({"layer": index, "load": profiles[index].load, "saliency": saliency(experts, inputs)})
        logger.info("layer %d: best expert's weight %.2f", index, profiles[index].mean_best_weight)
    converted = ConvertedModel(model, model.experts, config)
    candidates = routed_candidates(converted, profiles, profiled, recipe)
    fewer = {name: policy.layers for name, policy in unmeasured_policies(config).items()}
    points = measure_frontier(converted, replace(candidates, rules={**fewer, **candidates.rules}), calibration.evaluation)
    profile = {
        "text": {"path": str(text.resolve()), "sha256": file_hash(text)},
        "tokens": {"profile": num_scored(profiled), "evaluation": num_scored(calibration.evaluation)},
        "device": device_name(device),
        "source": {"perplexity": points.dense_perplexity},
        "layers": layers,
        **policy_entries(points, config, None),
    }
    former = read_json(directory / PROFILE)["policies"] if (directory / PROFILE).exists() else []
    stale = {entry["policy"] for entry in former} - {policy.name for policy in points.policies}
    # In this order every file that a reader meets is whole, and the frontier never names a policy that is not there.
    for policy in reversed(points.policies):
        write_policy(directory, policy)
    write_json(directory / FRONTIER, points.frontier.to_dict())
    for name in stale:
        (directory / POLICIES / f"{name}.json").unlink(missing_ok=True)
    write_json(directory / PROFILE, profile)
    return profile


@torch.no_grad()
def saliency(layer: ExpertLayer, inputs: Tensor) -> list[float]:
    """What each of the E experts adds where it runs, on FFN inputs [T, D]: the mean over its tokens of its weight times the
    norm of its output. 0 for an expert that no token chose. REAP (arXiv 2510.13999) prunes the experts that add least."""
    sums = torch.zeros(layer.config.num_experts, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for chunk in inputs.split(8192):
        x = chunk.to(layer.experts.down_proj.device, layer.experts.down_proj.dtype)
        _, topk_weights, topk_ids = route(layer, x, full_rule(layer))
        for expert in range(layer.config.num_experts):
            tokens, places = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[tokens], layer.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            norms = F.linear(F.silu(gate) * up, layer.experts.down_proj[expert]).float().norm(dim=-1)
            sums[expert] += (norms * topk_weights[tokens, places]).sum().item()
            counts[expert] += len(tokens)
    return (sums / counts.clamp(min=1)).tolist()
