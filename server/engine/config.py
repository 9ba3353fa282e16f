"""Sizes of one engine, fixed before anything is allocated."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the operator may choose. None means: as much as the model or the memory allows.

    `max_step_tokens` bounds the tokens computed in one step, so that a long prompt delays running requests by one chunk.
    """

    device: str = "auto"
    dtype: str = "auto"
    max_num_seqs: int = 32
    max_model_len: int | None = None
    kv_cache_blocks: int | None = None
    block_size: int = 16
    max_step_tokens: int = 512
    max_policies: int = 64
    prefix_caching: bool = True
    cuda_graphs: bool = True
    batch_budgets: bool = False
    quantize: str | None = None


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the running engine settled on."""

    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    vocab_size: int
    max_policies: int
