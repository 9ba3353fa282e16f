"""Builds the engine for a checkpoint: the model, and all memory that the engine will use."""

from pathlib import Path

from ladimo.checkpoint import load_to_serve, read_eos_token_ids
from ladimo.model.config import ModelConfig
from ladimo.model.transformer import MoeTransformer
from server.engine.config import EngineConfig, EngineLimits
from server.engine.core import EngineCore
from server.engine.graphs.cuda_graphs import CudaGraphs, DecodeGraphs, GraphCapturer, bucket_sizes
from server.engine.model_runner import ModelRunner, affordable_blocks
from server.engine.policy_table import PolicyTable
from server.engine.replay import MAX_TOKENS as REPLAY_TOKENS
from server.engine.replay import Replayer
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.chunks import MOST, ChunkSizes
from server.engine.scheduling.scheduler import Scheduler


def build_core(directory: Path, config: EngineConfig) -> EngineCore:
    """Load the model from `directory` and allocate all memory of the engine.

    Raises ValueError for a model that cannot be read, and for options that do not fit the model or the machine.
    """
    if config.tensor_parallel_size > 1:
        from server.engine.tensor_parallel import lead  # what it imports is needed nowhere else

        model, config = lead(directory, config)
    else:
        model = load_to_serve(directory, config.device, config.dtype, config.quantize, config.max_model_len)
    return assemble_core(model, config, read_eos_token_ids(directory))


def step_limits(config: EngineConfig, model: ModelConfig, step_bytes: int) -> tuple[int, ChunkSizes | None]:
    """The largest number of tokens in a step, and what chooses those of prompts; None if nothing does. step_bytes: the memory
    for what a step computes."""
    if config.max_step_tokens != "auto":
        return config.max_step_tokens, None
    # In fp32: the logits of a prompt whose log-probabilities are wanted, and what a layer computes.
    token_bytes = 4 * (model.vocab_size + 8 * model.hidden_size + 3 * model.intermediate_size)
    most = max(min(MOST, step_bytes // token_bytes), config.block_size)
    return config.max_num_seqs + most, ChunkSizes(config.max_step_ms / 1000, config.block_size, most)


def assemble_core(
    model: MoeTransformer,
    config: EngineConfig,
    eos_token_ids: frozenset[int] = frozenset(),
    capturer: GraphCapturer | None = None,
    buckets: tuple[int, ...] | None = None,
) -> EngineCore:
    """Build the engine for a loaded model. Raises ValueError for a context length or cache size that does not fit.

    `capturer` captures the decode steps as graphs of `buckets` rows. None: CUDA graphs on a CUDA device, no graphs elsewhere.
    """
    context = model.config.max_position_embeddings
    if config.max_model_len is not None and not 2 <= config.max_model_len <= context:
        raise ValueError(f"max_model_len must be in 2..{context}, got {config.max_model_len}")
    max_model_len = config.max_model_len or context
    num_blocks = config.kv_cache_blocks or affordable_blocks(model, config.block_size, max_model_len, config.max_num_seqs)
    blocks = BlockManager(max(num_blocks, 2), config.block_size)
    if blocks.blocks_for(max_model_len) >= num_blocks:
        raise ValueError(
            f"the KV cache of {num_blocks} blocks of {config.block_size} tokens cannot hold one sequence of {max_model_len}; "
            "lower max_model_len or give the cache more blocks"
        )
    backend = model.backend
    backend.make_current()  # sets the device of the calling thread, the engine thread
    backend.lay_out(model)
    kv_cache = backend.allocate_cache(model.config, num_blocks, config.block_size)
    table = PolicyTable(model.config, config.max_policies + 1, backend.device, config.batch_budgets)
    replay_tokens = min(REPLAY_TOKENS, max_model_len) if config.shadow_share else 0
    replayer = Replayer(model, table, replay_tokens, config.block_size) if replay_tokens else None
    sizes = (max_model_len, config.max_num_seqs, num_blocks, config.block_size, model.config.vocab_size, config.max_policies)
    limits = EngineLimits(*sizes, replay_tokens)
    limit, chunks = step_limits(config, model.config, backend.step_bytes())
    scheduler = Scheduler(blocks, config.max_num_seqs, limit, max_model_len, config.prefix_caching, chunks)
    if capturer is None and backend.captures_graphs and config.cuda_graphs:
        capturer = CudaGraphs(backend.device)
    graphs = None
    if capturer is not None:
        buckets = buckets or bucket_sizes(config.max_num_seqs)
        graphs = DecodeGraphs(model, kv_cache, table.tables, blocks.blocks_for(max_model_len), buckets, capturer)
    runner = ModelRunner(model, kv_cache, table.tables, eos_token_ids, graphs)
    return EngineCore(runner, scheduler, table, limits, eos_token_ids, replayer=replayer)
