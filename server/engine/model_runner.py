"""Computes batches on the device. The engine runs the network in this file and in its CUDA graphs only."""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.inputs import RoutingTables, StepInputs, StepOutput, refined_rows
from ladimo.model.transformer import MoeTransformer
from server.engine.batch import Batch, make_step_inputs, num_logits, samples
from server.engine.graphs.cuda_graphs import DecodeGraphs
from server.engine.request import Sequence, TokenLogprobs, TokenRouting
from server.engine.sampling.logit_adjuster import LogitAdjuster, adjusts
from server.engine.sampling.logprobs import token_logprobs
from server.engine.sampling.sampler import make_sampling_inputs, sample
from server.engine.transfers import to_device, to_host


@dataclass(frozen=True, slots=True)
class Drawn:
    """The new token of a sequence."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """The output of one step. `drawn` has one entry for each sequence that gets a new token, in batch order.

    The other lists have one entry for each scheduled sequence. `expert_counts`: how many experts the sequence's tokens of this
    step ran, by layer. `refined_rows`: how many rows of weights these tokens refined (`inputs.refined_rows`).
    `prompt_logprobs`: log-probabilities of the prompt tokens that follow the step's tokens; empty unless the request asked for
    them. `routing`: what each of the step's tokens ran; empty unless the request is traced.
    """

    drawn: list[Drawn]
    expert_counts: list[list[int]]
    refined_rows: list[int]
    prompt_logprobs: list[list[TokenLogprobs]]
    routing: list[list[TokenRouting]]


def still_there(batch: Batch, output: BatchOutput) -> tuple[Batch, BatchOutput]:
    """Drop the sequences that ended or were aborted after this step was launched ahead. They hold no blocks any more."""
    rows = [row for row, sequence in enumerate(batch.decode) if sequence.block_table]
    left = BatchOutput(
        drawn=[output.drawn[row] for row in rows],
        expert_counts=[output.expert_counts[row] for row in rows],
        refined_rows=[output.refined_rows[row] for row in rows],
        prompt_logprobs=[output.prompt_logprobs[row] for row in rows],
        routing=[output.routing[row] for row in rows],
    )
    return Batch(decode=[batch.decode[row] for row in rows]), left


class _Ran(NamedTuple):
    """What the T tokens of a step ran, on the device."""

    expert_ids: Tensor | None  # [L, T, E]; None for a dense model
    refined: Tensor | None  # [L + 1, T], `StepOutput.refined_counts`

    def traced(self, scheduled: Rows[tuple[Sequence, int]]) -> list[Tensor]:
        """The parts that belong to traced sequences, flattened. By sequence: its experts, then what it refined."""
        if all(sequence.request.trace is None for sequence, _ in scheduled):
            return []
        known = [tensor.split([count for _, count in scheduled], dim=1) for tensor in self if tensor is not None]
        rows = [row for row, (sequence, _) in enumerate(scheduled) if sequence.request.trace is not None]
        return [parts[row].flatten() for row in rows for parts in known]

    def unpack(
        self, scheduled: Rows[tuple[Sequence, int]], expert_layers: Rows[int], numbers: Iterable[int]
    ) -> list[list[TokenRouting]]:
        """The routing of each scheduled sequence's tokens; empty for sequences without a trace. `numbers` are those of
        `traced`, on the host."""
        routing: list[list[TokenRouting]] = [[] for _ in scheduled]
        flat = iter(numbers)
        for place, (sequence, count) in enumerate(scheduled):
            if sequence.request.trace is None:
                continue
            experts: list[tuple[tuple[int, ...], ...]] = [()] * count
            refined: list[tuple[int, ...] | None] = [None] * count
            if self.expert_ids is not None:
                num_layers, _, places = self.expert_ids.shape
                ids = [[tuple(e for e in islice(flat, places) if e >= 0) for _ in range(count)] for _ in range(num_layers)]
                experts = [tuple(ids[layer][token] for layer in expert_layers) for token in range(count)]
            if self.refined is not None:
                counts = [list(islice(flat, count)) for _ in self.refined]
                refined = list(zip(*(counts[layer] for layer in (*expert_layers, -1)), strict=True))
            routing[place] = list(map(TokenRouting, experts, refined))
        return routing


class ModelRunner:
    """Runs batches under the policies of `tables`. If there are `graphs`, it replays them for steps that only decode."""

    def __init__(
        self,
        model: MoeTransformer,
        kv_cache: KVCache,
        tables: RoutingTables,
        eos_token_ids: frozenset[int],
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model, self.kv_cache, self.tables, self.graphs = model, kv_cache, tables, graphs
        self.device = kv_cache.k.device
        self.block_size = kv_cache.k.shape[2]
        self.adjuster = LogitAdjuster(eos_token_ids, self.device)

    @property
    def graph_captures(self) -> int:
        return 0 if self.graphs is None else self.graphs.captures

    def graph_bucket(self, batch: Batch) -> int | None:
        """The number of rows of the graph that the batch replays; None if it runs without a graph."""
        return None if self.graphs is None else self.graphs.bucket(batch)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Callable[[], BatchOutput]:
        """Start to compute the batch, and to draw a token for each sequence whose last token is in it.

        The returned function waits for the output. It must be called once. Before that, only one further batch may be launched,
        and only if both replay graphs (see `Batch.previous`). Waiting synchronises with the device once, and once more for each
        sequence with log-probabilities.
        """
        self.model.backend.begin_step(batch.num_tokens)
        bucket = self.graph_bucket(batch)
        if self.graphs is not None and bucket is not None:
            return self._replay(self.graphs, batch, bucket)
        assert batch.previous is None
        return self._run(batch)

    def _replay(self, graphs: DecodeGraphs, batch: Batch, bucket: int) -> Callable[[], BatchOutput]:
        graphs.fill(batch, bucket)
        graphs.replay_step(bucket)
        rows, buffers = len(batch.decode), graphs.buffers
        logits, results = buffers.logits[:rows], buffers.results[:rows]
        if not batch.greedy:
            graphs.replay_draw(bucket, batch.cuts)
        self._draw_adjusted(results[:, 0], logits, batch.decode)
        config = self.model.config
        ran = _Ran(
            buffers.expert_ids[:, :rows] if config.moe_layer_indices else None,
            buffers.refined[:, :rows] if config.nested_bits else None,
        )
        return self._output(batch, results[:, 0], results[:, 1:], ran, logits)

    def _run(self, batch: Batch) -> Callable[[], BatchOutput]:
        inputs = make_step_inputs(batch, self.block_size, self.device)
        output = self.model.step(inputs, self.kv_cache, self.tables)
        logits, ran = output.logits, _Ran(output.expert_ids, output.refined_counts)
        per_sequence, ends, drawing = None, logits, batch.drawing
        if batch.prefill:  # without a prompt, every row has one token's logits and draws
            scheduled = batch.scheduled
            per_sequence = logits.split([num_logits(sequence, count) for sequence, count in scheduled])
            last = [rows[-1:] for (one, count), rows in zip(scheduled, per_sequence, strict=True) if samples(one, count)]
            ends = torch.cat(last) if last else logits[:0]
        token_ids = self._draw(ends, drawing)
        self._draw_adjusted(token_ids, ends, drawing)
        counts = self._count(batch, inputs, output, ran)
        return self._output(batch, token_ids, counts, ran, ends, per_sequence)

    def _draw(self, logits: Tensor, sequences: Rows[Sequence]) -> Tensor:
        """Token ids [R] from logits [R, V]."""
        inputs = make_sampling_inputs(sequences, self.device)
        compiled = self.model.backend.compiled_draw
        if compiled is None:
            return sample(logits, inputs)
        if inputs is None:
            return compiled.likeliest(logits)
        return compiled.draw(logits, inputs.temperature, inputs.top_p, inputs.min_p, inputs.uniform, inputs.top_k)

    def _draw_adjusted(self, token_ids: Tensor, logits: Tensor, sequences: Rows[Sequence]) -> None:
        """Adjust the logits of the sequences that need it, and draw these again into `token_ids` [R]. Logits are [R, V]."""
        rows = [row for row, sequence in enumerate(sequences) if adjusts(sequence)]
        if rows:
            chosen, own = [sequences[row] for row in rows], logits[rows].float()
            self.adjuster.adjust(own, chosen)
            token_ids[rows] = self._draw(own, chosen)

    def _output(
        self,
        batch: Batch,
        token_ids: Tensor,
        counts: Tensor,
        ran: _Ran,
        ends: Tensor,
        per_sequence: Rows[Tensor] | None = None,
    ) -> Callable[[], BatchOutput]:
        """Start the step's only copy to the host, and return the function that waits for it.

        R sequences draw, out of B scheduled ones. token_ids [R] are their tokens and `ends` [R, V] the logits of these. counts
        [B, L + 1] are the numbers of experts that ran, and the refined rows. `per_sequence` has all logits of each scheduled
        sequence; None if the batch has no prompts.
        """
        scheduled, drawing = batch.scheduled, batch.drawing
        num_drawn, width = len(drawing), counts.shape[1]
        fetched = to_host(torch.cat((token_ids, counts.flatten(), *ran.traced(scheduled))))

        def wait() -> BatchOutput:
            packed = fetched()
            end = num_drawn + len(scheduled) * width
            flat = packed[num_drawn:end]
            with torch.inference_mode():
                drawn = self._drawn(drawing, packed[:num_drawn], ends)
                prompt_logprobs: list[list[TokenLogprobs]] = [[] for _ in scheduled]
                if per_sequence is not None:
                    prompt_logprobs = [
                        _prompt_logprobs(one, count, rows) for (one, count), rows in zip(scheduled, per_sequence, strict=True)
                    ]
            return BatchOutput(
                drawn=drawn,
                expert_counts=[flat[i : i + width - 1] for i in range(0, len(flat), width)],
                refined_rows=flat[width - 1 :: width],
                prompt_logprobs=prompt_logprobs,
                routing=ran.unpack(scheduled, self.model.config.moe_layer_indices, packed[end:]),
            )

        return wait

    def _count(self, batch: Batch, inputs: StepInputs, output: StepOutput, ran: _Ran) -> Tensor:
        """Add the step to the counters of the routing tables. Returns [B, L + 1]: the number of experts that ran for each
        scheduled sequence in each layer, and the rows of weights that it refined."""
        lengths = [1] * len(batch.decode) + [count for _, count in batch.prefill]
        num_layers, expert_ids = self.model.config.num_hidden_layers, output.expert_ids
        per_token = torch.zeros(batch.num_tokens, num_layers + 1, dtype=torch.int64, device=self.device)
        if expert_ids is None and output.refined is None:
            return per_token.new_zeros(len(lengths), num_layers + 1)
        if expert_ids is not None:
            self.model.backend.count(self.tables, expert_ids, inputs.policy_ids)
            per_token[:, :num_layers] = (expert_ids >= 0).sum(dim=-1).t()
        if output.refined is not None and ran.refined is not None:
            self.tables.record_refined(output.refined, inputs.policy_ids)
            per_token[:, num_layers] = refined_rows(ran.refined, self.model.config.neuron_rows)
        if not batch.prefill:
            return per_token
        repeats = to_device(lengths, torch.int64, self.device)
        rows = torch.arange(len(lengths), device=self.device).repeat_interleave(repeats, output_size=batch.num_tokens)
        return per_token.new_zeros(len(lengths), num_layers + 1).index_add_(0, rows, per_token)

    def _drawn(self, sequences: Rows[Sequence], token_ids: Rows[int], logits: Tensor) -> list[Drawn]:
        """Report the drawn tokens to grammars and penalties, and add log-probabilities where asked for. Logits are [R, V]."""
        drawn = []
        for row, (sequence, token_id) in enumerate(zip(sequences, token_ids, strict=True)):
            self.adjuster.drawn(sequence, token_id)
            num_top = sequence.request.sampling.logprobs
            known = None if num_top is None else token_logprobs(logits[row : row + 1], [token_id], num_top)[0]
            drawn.append(Drawn(token_id, known))
        return drawn


def _prompt_logprobs(sequence: Sequence, count: int, logits: Tensor) -> list[TokenLogprobs]:
    """Log-probabilities of the prompt tokens that follow the next `count` tokens; empty unless asked for.

    Logits are [count, V], those of the `count` tokens.
    """
    num_top, prompt = sequence.request.sampling.prompt_logprobs, sequence.request.prompt_ids
    following = prompt[sequence.num_computed + 1 : sequence.num_computed + count + 1]
    if num_top is None or not following:
        return []
    return token_logprobs(logits[: len(following)], following, num_top)


def affordable_blocks(model: MoeTransformer, block_size: int, max_model_len: int, max_num_seqs: int) -> int:
    """How many KV cache blocks fit into memory, at most what `max_num_seqs` full contexts need. Includes the null block."""
    wanted = max_num_seqs * -(-max_model_len // block_size) + 1
    return min(wanted, model.backend.cache_bytes() // KVCache.bytes_per_block(model.config, block_size, model.backend.dtype))
