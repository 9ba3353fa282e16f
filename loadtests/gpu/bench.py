"""The settings and results of one section of the GPU suite, and its engines."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ladimo.model.config import ModelConfig
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import RoutingPolicy
from ladimo.prefill.random_weights import random_model
from loadtests.common.conditions import conditions
from loadtests.common.models import partitioned_config, top_k_policy
from server.engine.build import assemble_core
from server.engine.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.graphs.cuda_graphs import Rerun


@dataclass
class Bench:
    """The settings of one section, and its results so far."""

    name: str
    out: Path
    shape: str
    dry: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    @property
    def config(self) -> ModelConfig:
        return partitioned_config(self.shape)

    def size(self, real: int, dry: int) -> int:
        return dry if self.dry else real

    def row(self, **figures: Any) -> None:
        """Print a row of the table, and save all results so far to disk."""
        self.rows.append(figures)
        print(
            "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
            )
        )
        sys.stdout.flush()
        self.save()

    def save(self) -> dict[str, Any]:
        record = {
            "benchmark": f"gpu_suite {self.name}",
            "shape": self.shape,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dry_run": self.dry,
            **self.notes,
            "results": self.rows,
            **conditions(),
        }
        (self.out / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return record

    def model(self) -> MoeTransformer:
        return random_model(self.config, self.dtype, self.device)

    def core(
        self, model: MoeTransformer, max_num_seqs: int, max_model_len: int, tokens: int, step_tokens: int = 8192
    ) -> EngineCore:
        """An engine with a KV cache for `tokens` tokens. It has graphs for few batch sizes only, because captures take time."""
        block_size = 16
        blocks = max(-(-tokens // block_size) + max_num_seqs, -(-max_model_len // block_size)) + 2
        sizes = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_cache_blocks=blocks,
            block_size=block_size,
            max_step_tokens=step_tokens,
            prefix_caching=False,  # all rounds must do the same work
        )
        buckets = tuple(sorted({size for size in (1, 8, 32, 64, 256) if size < max_num_seqs} | {max_num_seqs}))
        return assemble_core(model, sizes, capturer=Rerun() if self.dry else None, buckets=buckets)

    def policies(self) -> dict[str, RoutingPolicy]:
        """Policies in which all, a half or a quarter of the FFN is active by routing, and one with a fixed quarter of the
        experts."""
        config = self.config
        return {
            "all": top_k_policy(config, "all", 8),
            "half": top_k_policy(config, "half", 4),
            "quarter": top_k_policy(config, "quarter", 2),
            "quarter fixed": top_k_policy(config, "quarter fixed", 2, experts=(0, 1)),
        }
