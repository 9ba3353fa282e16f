"""`ladimo prune`: leaves out experts of a model that was trained as Mixture-of-Experts, by REAP's score.

The result is a checkpoint of the same model type with fewer experts in every layer, for any program that reads the type. REAP
(arXiv 2510.13999) leaves out the experts that add least where they run: the mean, over the tokens that chose an expert, of its
weight times the norm of its output. `ladimo profile` measures this score.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ladimo.checkpoint import TensorReader, copy_tokenizer, read_config, read_json, resolve_directory, write_json, write_tensors
from ladimo.convert.report_files import PROFILE
from ladimo.convert.source import model_parameters
from ladimo.model.config import ModelConfig
from ladimo.model.families import MoeFamily, Stacked, find_family, read_model_config


def prune(name: str, out: Path, experts: int) -> dict[int, tuple[int, ...]]:
    """Write the model with `experts` experts per layer, those with the highest scores. Returns the experts kept, by layer.

    The directory `out` appears when it is complete, or not at all. Raises ValueError if `out` exists, or the model was not
    trained as MoE, was not profiled, or has not more experts than that.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already")
    directory = resolve_directory(name)
    config = read_config(directory)
    if not config.trained_as_moe:
        raise ValueError(f"{directory}: is a {config.family} model; only models that were trained as MoE can be pruned")
    if not 1 <= experts < config.max_num_experts:
        raise ValueError(f"experts: must be between 1 and {config.max_num_experts - 1}, got {experts}")
    kept = _most_salient(directory, config, experts)
    family = find_family(config.family)
    assert isinstance(family, MoeFamily)
    raw = _pruned_config(read_json(directory / "config.json"), family, experts)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_json(partial / "config.json", raw)
        write_tensors(partial, _pruned_tensors(TensorReader(directory), config, read_model_config(raw), family, kept))
        copy_tokenizer(directory, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return kept


def _most_salient(directory: Path, config: ModelConfig, experts: int) -> dict[int, tuple[int, ...]]:
    """The experts with the highest scores, by layer, in the order of their numbers. Raises ValueError without a profile."""
    if not (directory / PROFILE).exists():
        raise ValueError(f"{directory}: was not profiled; run `ladimo profile` on it first")
    scores = {entry["layer"]: entry["saliency"] for entry in read_json(directory / PROFILE)["layers"]}
    kept = {}
    for layer in config.moe_layer_indices:
        moe = config.layers[layer]
        if moe is None or len(scores.get(layer, ())) != moe.num_experts:
            raise ValueError(f"{directory / PROFILE}: has no scores for the experts of layer {layer}; profile the model again")
        order = sorted(range(moe.num_experts), key=lambda expert: (-scores[layer][expert], expert))
        kept[layer] = tuple(sorted(order[:experts]))
    return kept


def _pruned_config(raw: Mapping[str, Any], family: MoeFamily, experts: int) -> dict[str, Any]:
    top_k = raw.get("num_experts_per_tok", family.defaults.get("num_experts_per_tok"))
    return {**raw, family.experts_field: experts, "num_experts_per_tok": min(top_k, experts)}


def _pruned_tensors(
    reader: TensorReader, old: ModelConfig, new: ModelConfig, family: MoeFamily, kept: Mapping[int, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """All stored tensors of the pruned model, one expert in memory at a time."""
    for name, _ in model_parameters(new):
        source, target = family.locate(name, old), family.locate(name, new)
        if isinstance(source, Stacked) and isinstance(target, Stacked):
            for expert, parts in zip(kept[_layer(name)], target.parts, strict=True):
                for stored, renamed in zip(source.parts[expert], parts, strict=True):
                    yield renamed, reader.stored(stored)
        elif name.endswith(".mlp.gate.weight"):
            yield target.names[0], reader.get(name)[torch.tensor(kept[_layer(name)])]
        else:
            yield target.names[0], reader.get(name)


def _layer(name: str) -> int:
    return int(name.split(".")[2])
