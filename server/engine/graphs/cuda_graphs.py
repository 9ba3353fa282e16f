"""Decode steps as CUDA graphs. They are captured at the start, for a fixed list of batch sizes.

A graph reads its inputs from buffers that never move. Two steps differ only in the content of these buffers: tokens, policies,
masks, block tables, sampling parameters. So new requests, policies and defaults need no new graph.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch

from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.inputs import RoutingTables, refined_rows
from ladimo.model.transformer import MoeTransformer
from server.engine.batch import Batch
from server.engine.graphs.step_buffers import Staging, StepBuffers
from server.engine.sampling.sampler import sample

# Larger batches run without a graph: the device is then so busy that launching kernel by kernel costs little.
LARGEST_BUCKET = 512

Replay = Callable[[], None]


class GraphCapturer(Protocol):
    """Makes a step repeatable: `capture` returns a function that runs it again. The largest step is captured first."""

    def capture(self, step: Callable[[], None]) -> Replay: ...


class Rerun:
    """Runs the step again instead of replaying a graph. Tests use it on machines without a CUDA device.

    It finds the same kind of fault as a real graph: a step that reads a value from the time of its capture.
    """

    def capture(self, step: Callable[[], None]) -> Replay:
        step()
        return step


class CudaGraphs:
    """Captures the graphs of one device. They share one memory pool, because they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, step: Callable[[], None]) -> Replay:
        """Run `step` twice, then capture it. Libraries set themselves up on first use, and that must not be captured."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            step()
            step()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may use the device meanwhile without breaking the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return graph.replay


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The batch sizes to capture: 1, 2, 4, multiples of 8 below 256, then multiples of 16 up to 512.

    Sizes stop at `max_num_seqs`, which is always the last size if it is at most 512.
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, LARGEST_BUCKET + 1, 16)]
    largest = min(max_num_seqs, LARGEST_BUCKET)
    return tuple(sorted({size for size in sizes if size < largest} | {largest}))


class DecodeGraphs:
    """Three graphs per bucket (batch size): the step and two kinds of draw.

    The step ends with the most likely token of every row. A draw follows only if some row has a temperature above 0. One kind
    of draw sorts the vocabulary, which top-k, top-p and min-p need; the other does not sort. `captures` is the number of
    graphs. All are captured in the constructor. `blocks_per_row`: the width of the block table.
    """

    def __init__(
        self,
        model: MoeTransformer,
        kv_cache: KVCache,
        tables: RoutingTables,
        blocks_per_row: int,
        buckets: tuple[int, ...],
        capturer: GraphCapturer,
    ) -> None:
        assert buckets and list(buckets) == sorted(set(buckets))
        self._model, self._kv_cache, self._tables = model, kv_cache, tables
        self.buckets = buckets
        self.buffers = StepBuffers.allocate(model.config, buckets[-1], blocks_per_row, kv_cache.k.dtype, kv_cache.k.device)
        self._staging = Staging(self.buffers, kv_cache.k.shape[2])
        self._steps: dict[int, Replay] = {}
        self._draws: dict[tuple[int, bool], Replay] = {}
        self.captures = 0
        with torch.inference_mode():
            self._capture_all(capturer)

    def bucket(self, batch: Batch) -> int | None:
        """The smallest bucket that holds the batch; None if the batch contains a prompt or is too large."""
        place = bisect_left(self.buckets, len(batch.decode))
        return None if batch.prefill or place == len(self.buckets) else self.buckets[place]

    def fill(self, batch: Batch, bucket: int) -> None:
        """Copy the batch's inputs into the buffers, padded to `bucket` rows."""
        self._staging.fill(batch, bucket)

    def replay_step(self, bucket: int) -> None:
        """Compute the rows. Writes the outputs among the buffers, the KV cache and the counters."""
        self._steps[bucket]()

    def replay_draw(self, bucket: int, cuts: bool) -> None:
        """Draw a token for each row from `logits`, and write it into `results`. `cuts`: see `SamplingInputs`."""
        self._draws[bucket, cuts]()

    def _capture_all(self, capturer: GraphCapturer) -> None:
        counters = (self._tables.expert_tokens, self._tables.distinct_experts, self._tables.refined)
        before = [counter.clone() for counter in counters]
        for rows in reversed(self.buckets):
            self._steps[rows] = capturer.capture(lambda rows=rows: self._step(rows))  # type: ignore[misc]
            for cuts in (True, False):
                self._draws[rows, cuts] = capturer.capture(lambda rows=rows, cuts=cuts: self._draw(rows, cuts))  # type: ignore[misc]
            self.captures += 3
        for counter, value in zip(counters, before, strict=True):
            counter.copy_(value)  # the steps of the capture belong to no request

    def _step(self, rows: int) -> None:
        buffers = self.buffers
        inputs = buffers.step_inputs(rows)
        output = self._model.step(inputs, self._kv_cache, self._tables)
        logits, expert_ids, refined = output
        buffers.logits[:rows].copy_(logits)
        buffers.results[:rows, 0].copy_(logits.argmax(dim=-1))
        if expert_ids is not None:
            self._model.backend.record(self._tables, expert_ids, inputs.policy_ids)
            buffers.expert_ids[:, :rows].copy_(expert_ids)
            buffers.results[:rows, 1:-1].copy_((expert_ids >= 0).sum(dim=-1).t())
        refined_counts = output.refined_counts
        if refined is not None and refined_counts is not None:
            self._tables.record_refined(refined, inputs.policy_ids)
            buffers.refined[:, :rows].copy_(refined_counts)
            buffers.results[:rows, -1].copy_(refined_rows(refined_counts, self._model.config.neuron_rows))

    def _draw(self, rows: int, cuts: bool) -> None:
        drawn = sample(self.buffers.logits[:rows], self.buffers.sampling_inputs(rows, cuts))
        self.buffers.results[:rows, 0].copy_(drawn)
