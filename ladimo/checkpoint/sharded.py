"""Loads one part of a model, for processes that compute it together."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ladimo.checkpoint.directory import read_config
from ladimo.checkpoint.loading import load_into
from ladimo.checkpoint.tensors import TensorReader
from ladimo.model.backends.choose import on_device
from ladimo.model.nested.refinement import Part
from ladimo.model.sharding import Shard, add_up
from ladimo.model.transformer import MoeTransformer


class ShardReader(TensorReader):
    """Reads one part's share of each tensor."""

    def __init__(self, directory: Path, shard: Shard, gated: bool) -> None:
        """gated: whether FFNs have a gate."""
        super().__init__(directory)
        self.shard, self.gated = shard, gated

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.shard.part(name, torch.empty(super().shape(name), device="meta"), self.gated).shape)

    def get(self, name: str) -> Tensor:
        return self.shard.part(name, super().get(name), self.gated)


def load_shard(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard,
    reduce: Callable[[Tensor], None],
    context: int | None = None,
) -> MoeTransformer:
    """Load one part of a model. `reduce` adds a tensor up over all parts, in place. `context`: as in `load_model`.

    Raises ValueError for a broken checkpoint, and for a model that cannot be divided.
    """
    config = shard.config(read_config(directory))
    with torch.device("meta"):
        model = MoeTransformer(config)
    load_into(model, ShardReader(directory, shard, config.ffn_kind != "gelu"), config, dtype, device)
    model.rotary.materialise(device, context)
    backend = on_device(device, dtype)
    backend.part = Part(shard.rank, shard.size, reduce)
    backend.prepare(model)
    add_up(model, reduce)
    return model.eval()
