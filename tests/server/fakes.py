"""An engine without a neural network: the real scheduler, policy table and threads, over a runner that counts upwards."""

import threading
import time
from collections.abc import Callable

import torch

from ladimo.model.config import ModelConfig
from ladimo.model.families import read_model_config
from ladimo.policy import LayerRule, RoutingPolicy
from server.engine.batch import Batch, samples
from server.engine.config import EngineLimits
from server.engine.core import EngineCore
from server.engine.model_runner import BatchOutput, Drawn
from server.engine.policy_table import PolicyTable
from server.engine.request import Sequence, TokenLogprobs, TokenRouting
from server.engine.scheduling.block_manager import BlockManager
from server.engine.scheduling.chunks import ChunkSizes
from server.engine.scheduling.scheduler import Scheduler

FAKE_VOCAB = 300
FAKE_CONFIG = read_model_config(
    {
        "model_type": "ladimo_llama",
        "vocab_size": FAKE_VOCAB,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "moe_layers": [
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4},
            None,
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4},
        ],
    }
)


def fake_policy(name: str, top_k: int = 2, description: str = "") -> RoutingPolicy:
    return RoutingPolicy(name, description, (LayerRule(top_k), None, LayerRule(top_k)))


class FakeRunner:
    """Draws the last token plus one, modulo the vocabulary. Each token runs the experts 0 .. top_k - 1 of every expert layer.

    Log-probabilities: token t has -0.5, and t + 1, t + 2, ... have -1.5, -2.5, ... At odd positions of a prompt, t - 1 has -0.5
    and t has -1.5.

    `gate`: every step waits while it is cleared. `let(n)`: n steps may run, and the next one waits. `fail_with`: the next step
    raises this error.
    """

    def __init__(self, table: PolicyTable, vocab_size: int = FAKE_VOCAB) -> None:
        self.table, self.vocab_size = table, vocab_size
        self.gate = threading.Event()
        self.gate.set()
        self._steps_left: int | None = None
        self.fail_with: Exception | None = None
        self.batches: list[list[tuple[str, int]]] = []

    def let(self, steps: int) -> None:
        """Let `steps` steps run, then hold the next one back."""
        self._steps_left = steps
        self.gate.set()

    graph_captures = 0

    def graph_bucket(self, batch: Batch) -> int | None:
        return None

    def launch(self, batch: Batch) -> Callable[[], BatchOutput]:
        output = self.execute(batch)
        return lambda: output

    def execute(self, batch: Batch) -> BatchOutput:
        if self._steps_left == 0:
            self._steps_left = None
            self.gate.clear()
        elif self._steps_left is not None:
            self._steps_left -= 1
        self.gate.wait()
        if self.fail_with is not None:
            raise self.fail_with
        self.batches.append([(sequence.request.request_id, count) for sequence, count in batch.scheduled])
        token_ids = [
            (sequence.token_ids(sequence.num_tokens - 1, sequence.num_tokens)[0] + 1) % self.vocab_size
            for sequence, count in batch.scheduled
            if samples(sequence, count)
        ]
        drawing = [sequence for sequence, count in batch.scheduled if samples(sequence, count)]
        drawn = [
            Drawn(token_id, self._logprobs(token_id, sequence.request.sampling.logprobs))
            for sequence, token_id in zip(drawing, token_ids, strict=True)
        ]
        counts = [self._count(*scheduled) for scheduled in batch.scheduled]
        return BatchOutput(
            drawn,
            counts,
            [0] * len(counts),
            [self._prompt_logprobs(*scheduled) for scheduled in batch.scheduled],
            [self._routing(*scheduled) for scheduled in batch.scheduled],
        )

    def _routing(self, sequence: Sequence, count: int) -> list[TokenRouting]:
        if sequence.request.trace is None:
            return []
        layers, routing = self.table.config.moe_layer_indices, list[TokenRouting]()
        for row, run in _rows(sequence, count):
            top_k = self.table.tables.rows[row, :-1, 0].long().tolist()
            routing += [TokenRouting(tuple(tuple(range(top_k[layer])) for layer in layers))] * run
        return routing

    def _prompt_logprobs(self, sequence: Sequence, count: int) -> list[TokenLogprobs]:
        num_top, begin = sequence.request.sampling.prompt_logprobs, sequence.num_computed + 1
        ids = sequence.request.prompt_ids[begin : begin + count]
        scored = [self._logprobs(token_id, num_top, place % 2) for place, token_id in enumerate(ids, begin)]
        return [each for each in scored if each is not None]

    def _logprobs(self, token_id: int, num_top: int | None, shift: int = 0) -> TokenLogprobs | None:
        if num_top is None:
            return None
        ranked = [((token_id - shift + rank) % self.vocab_size, -0.5 - rank) for rank in range(num_top)]
        return TokenLogprobs(token_id, -0.5 - shift, tuple(ranked))

    def _count(self, sequence: Sequence, count: int) -> list[int]:
        totals = [0] * self.table.config.num_hidden_layers
        for row, run in _rows(sequence, count):
            for layer, k in enumerate(self.table.tables.rows[row, :-1, 0].long().tolist()):
                self.table.tables.expert_tokens[row, layer, :k] += run
                totals[layer] += k * run
        return totals


def _rows(sequence: Sequence, count: int) -> list[tuple[int, int]]:
    """The rows of the next `count` tokens, each with the number of its tokens."""
    begin = sequence.num_computed
    return [(sequence.rows[phase], run) for phase, run in sequence.phases(begin, begin + count)]


class Clock:
    """Replaces `time.monotonic`. Its time changes only when a test sets `now`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fake_core(
    *,
    max_num_seqs: int = 4,
    max_model_len: int = 64,
    num_blocks: int = 65,
    block_size: int = 4,
    max_step_tokens: int = 32,
    max_policies: int = 8,
    eos_token_ids: frozenset[int] = frozenset(),
    config: ModelConfig = FAKE_CONFIG,
    clock: Callable[[], float] = time.monotonic,
    chunks: ChunkSizes | None = None,
) -> tuple[EngineCore, FakeRunner]:
    """An engine core over a FakeRunner. It is so small that tests can use up its rows, blocks and token budget."""
    table = PolicyTable(config, max_policies + 1, torch.device("cpu"))
    runner = FakeRunner(table, config.vocab_size)
    limits = EngineLimits(max_model_len, max_num_seqs, num_blocks, block_size, config.vocab_size, max_policies)
    blocks = BlockManager(num_blocks, block_size)
    scheduler = Scheduler(blocks, max_num_seqs, max_step_tokens, max_model_len, chunks=chunks)
    return EngineCore(runner, scheduler, table, limits, eos_token_ids, clock), runner
