"""The model on its device: loads it, allocates the cache, computes a batch. The only file that runs the network."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ladimo.checkpoint import choose_device, choose_dtype, load_model
from ladimo.model.inputs import RoutingTables
from ladimo.model.kv_cache import KVCache
from ladimo.model.transformer import MoeTransformer
from server.engine.batch import Batch, make_step_inputs, samples
from server.engine.sampler import make_sampling_inputs, sample

# Of the memory that is free once the weights are loaded, this share goes to the cache unless the operator says a number.
CUDA_CACHE_SHARE = 0.85
CPU_CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """`token_ids`: one per sequence whose end was reached, in batch order. `expert_counts`: per scheduled sequence and layer,
    how many experts its tokens of this step ran."""

    token_ids: list[int]
    expert_counts: list[list[int]]


class ModelRunner:
    """Executes batches under the policies of `tables`."""

    def __init__(self, model: MoeTransformer, kv_cache: KVCache, tables: RoutingTables) -> None:
        self.model, self.kv_cache, self.tables = model, kv_cache, tables
        self.device = kv_cache.k.device
        self.block_size = kv_cache.k.shape[2]

    @torch.inference_mode()
    def execute(self, batch: Batch) -> BatchOutput:
        """Compute the batch and draw a token for each sequence that reached its end; synchronises with the host once."""
        inputs = make_step_inputs(batch, self.block_size, self.device)
        logits, expert_ids = self.model(inputs, self.kv_cache, self.tables)
        scheduled = batch.scheduled
        drawing = [sequence for sequence, count in scheduled if samples(sequence, count)]
        token_ids = sample(logits, make_sampling_inputs(drawing, self.device)) if drawing else logits.new_zeros(0)
        if expert_ids is None:
            return BatchOutput(token_ids.tolist(), [[0] * self.model.config.num_hidden_layers for _ in scheduled])
        self.tables.record(expert_ids, inputs.policy_ids)
        lengths = torch.tensor([count for _, count in scheduled], device=self.device)
        row_of_token = torch.arange(len(scheduled), device=self.device).repeat_interleave(lengths, output_size=batch.num_tokens)
        per_token = (expert_ids >= 0).sum(dim=-1).t()  # [T, L]
        counts = per_token.new_zeros(len(scheduled), per_token.shape[1]).index_add_(0, row_of_token, per_token)
        packed = torch.cat((token_ids, counts.flatten())).tolist()  # one copy to the host for both
        width = per_token.shape[1]
        flat = packed[len(drawing) :]
        return BatchOutput(packed[: len(drawing)], [flat[i : i + width] for i in range(0, len(flat), width)])


def load(directory: Path, device: str, dtype: str) -> MoeTransformer:
    """Raises ValueError for a checkpoint that cannot be served, or a device or dtype that cannot be had."""
    chosen = choose_device(device)
    return load_model(directory, choose_dtype(dtype, directory, chosen), chosen)


def affordable_blocks(model: MoeTransformer, block_size: int, max_model_len: int, max_num_seqs: int) -> int:
    """Blocks that fit the memory, at most what `max_num_seqs` full contexts need; the null block included."""
    weight = model.model.embed_tokens.weight
    free = CPU_CACHE_BYTES
    if weight.device.type == "cuda":
        free = int(CUDA_CACHE_SHARE * torch.cuda.mem_get_info(weight.device)[0])
    wanted = max_num_seqs * -(-max_model_len // block_size) + 1
    return min(wanted, free // KVCache.bytes_per_block(model.config, block_size, weight.dtype))
