"""The engine's options and the limits that follow from them. Both are fixed before the engine serves requests."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The operator's choices. `max_model_len` None: the model's context length. `kv_cache_blocks` None: as many blocks as the
    memory allows. `quantize` None: no integer weights. `tensor_parallel_size`: the number of processes that share the model.

    `max_step_tokens` limits the tokens of one step. A long prompt then delays running requests by one chunk only. "auto": as
    many as `max_step_ms` allow, by how long steps have taken (`ChunkSizes`).
    `shadow_share`: the share of finished answers that will be replayed; 0 needs no memory for it.
    `max_policies` is the number of rows in the policy table besides row 0.
    """

    device: str = "auto"
    dtype: str = "auto"
    max_num_seqs: int = 32
    max_model_len: int | None = None
    kv_cache_blocks: int | None = None
    block_size: int = 16
    max_step_tokens: int | Literal["auto"] = 512
    max_step_ms: float = 250.0
    max_policies: int = 64
    prefix_caching: bool = True
    cuda_graphs: bool = True
    batch_budgets: bool = False
    quantize: str | None = None
    shadow_share: float = 0.0
    tensor_parallel_size: int = 1


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The limits of a running engine. Lengths and sizes are in tokens. `max_replay_tokens`: of an answer with its prompt; 0 if
    nothing is replayed."""

    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    vocab_size: int
    max_policies: int
    max_replay_tokens: int = 0
