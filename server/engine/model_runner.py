"""The model on its device: loads it, allocates the cache, computes a batch. The only file that runs the network."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ladimo.checkpoint import choose_device, choose_dtype, load_model
from ladimo.model.inputs import RoutingTables, StepInputs
from ladimo.model.kv_cache import KVCache
from ladimo.model.transformer import MoeTransformer
from server.engine.batch import Batch, make_step_inputs, num_logits, samples
from server.engine.logprobs import token_logprobs
from server.engine.request import Sequence, TokenLogprobs
from server.engine.sampler import LogitAdjuster, make_sampling_inputs, sample

# Of the memory that is free once the weights are loaded, this share goes to the cache unless the operator says a number.
CUDA_CACHE_SHARE = 0.85
CPU_CACHE_BYTES = 2 * 2**30
# A smaller step (multiply-adds) runs on one CPU thread: others gain it little, and beside a busy neighbour, such as the HTTP
# loop, waiting for them at every operation makes it many times slower.
SERIAL_STEP = 10**8


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token for a sequence whose end was reached."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """`drawn`: one per sequence whose end was reached, in batch order.

    Per scheduled sequence: `expert_counts` by layer, how many experts its tokens of this step ran; `prompt_logprobs` of the
    prompt tokens that follow the step's tokens, when asked for.
    """

    drawn: list[Drawn]
    expert_counts: list[list[int]]
    prompt_logprobs: list[list[TokenLogprobs]]


class ModelRunner:
    """Executes batches under the policies of `tables`."""

    def __init__(self, model: MoeTransformer, kv_cache: KVCache, tables: RoutingTables, eos_token_ids: frozenset[int]) -> None:
        self.model, self.kv_cache, self.tables = model, kv_cache, tables
        self.device = kv_cache.k.device
        self.block_size = kv_cache.k.shape[2]
        self.adjuster = LogitAdjuster(model.config.vocab_size, eos_token_ids, self.device)
        self._num_threads = torch.get_num_threads()
        self._multiply_adds = sum(weight.numel() for weight in model.parameters())  # per token, about

    @torch.inference_mode()
    def execute(self, batch: Batch) -> BatchOutput:
        """Compute the batch and draw a token for each sequence that reached its end.

        Synchronises with the host once; once more for each sequence that wants log-probabilities.
        """
        if self.device.type == "cpu":
            serial = self._multiply_adds * batch.num_tokens < SERIAL_STEP
            torch.set_num_threads(1 if serial else self._num_threads)  # of this thread only
        inputs = make_step_inputs(batch, self.block_size, self.device)
        logits, expert_ids = self.model(inputs, self.kv_cache, self.tables)
        scheduled = batch.scheduled
        per_sequence = logits.split([num_logits(sequence, count) for sequence, count in scheduled])
        drawing = [sequence for sequence, count in scheduled if samples(sequence, count)]
        last = [rows[-1:] for (sequence, count), rows in zip(scheduled, per_sequence, strict=True) if samples(sequence, count)]
        ends = last[0] if len(last) == 1 else torch.cat(last) if last else logits[:0]
        token_ids = ends.argmax(dim=-1)
        if drawing:
            token_ids = sample(self.adjuster.adjust(ends, drawing), make_sampling_inputs(drawing, self.device))
        counts = self._count_experts(batch, inputs, expert_ids)
        packed = torch.cat((token_ids, counts.flatten())).tolist()  # one copy to the host for both
        width, flat = counts.shape[1], packed[len(drawing) :]
        return BatchOutput(
            drawn=self._drawn(drawing, packed[: len(drawing)], ends),
            expert_counts=[flat[i : i + width] for i in range(0, len(flat), width)],
            prompt_logprobs=[
                _prompt_logprobs(sequence, count, rows) for (sequence, count), rows in zip(scheduled, per_sequence, strict=True)
            ],
        )

    def _count_experts(self, batch: Batch, inputs: StepInputs, expert_ids: Tensor | None) -> Tensor:
        """Count the step in the routing tables; per scheduled sequence and layer [B, L], how many experts its tokens ran."""
        lengths = [count for _, count in batch.scheduled]
        if expert_ids is None:
            return torch.zeros(len(lengths), self.model.config.num_hidden_layers, dtype=torch.int64, device=self.device)
        self.tables.record(expert_ids, inputs.policy_ids)
        per_token = (expert_ids >= 0).sum(dim=-1).t()  # [T, L]
        if len(lengths) == batch.num_tokens:
            return per_token
        repeats = torch.tensor(lengths, device=self.device)
        rows = torch.arange(len(lengths), device=self.device).repeat_interleave(repeats, output_size=batch.num_tokens)
        return per_token.new_zeros(len(lengths), per_token.shape[1]).index_add_(0, rows, per_token)

    def _drawn(self, sequences: Rows[Sequence], token_ids: Rows[int], logits: Tensor) -> list[Drawn]:
        """Tell grammars and penalties of the draw; add log-probabilities [R, V] where asked for."""
        drawn = []
        for row, (sequence, token_id) in enumerate(zip(sequences, token_ids, strict=True)):
            self.adjuster.drawn(sequence, token_id)
            num_top = sequence.request.sampling.logprobs
            known = None if num_top is None else token_logprobs(logits[row : row + 1], [token_id], num_top)[0]
            drawn.append(Drawn(token_id, known))
        return drawn


def _prompt_logprobs(sequence: Sequence, count: int, logits: Tensor) -> list[TokenLogprobs]:
    """Of the prompt tokens that follow the next `count` ones, whose logits are [count, V]; empty when not asked for."""
    num_top, prompt = sequence.request.sampling.prompt_logprobs, sequence.request.prompt_ids
    following = prompt[sequence.num_computed + 1 : sequence.num_computed + count + 1]
    if num_top is None or not following:
        return []
    return token_logprobs(logits[: len(following)], following, num_top)


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
