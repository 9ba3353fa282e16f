"""Plays the scheduler's part for tests of the model: hands out cache blocks in a scattered order and lays out StepInputs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ladimo.model.backends.torch_backend import TorchBackend
from ladimo.model.inputs import PrefillSegment, RoutingTables, StepInputs
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import RoutingPolicy


@dataclass
class Row:
    """One sequence: its tokens, how many of them are in the cache, and where."""

    tokens: list[int]
    policy: int = 1
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass
class Stepper:
    """One model, one paged cache. The cache starts full of rubbish, so that reading a place nobody wrote shows."""

    model: MoeTransformer
    tables: RoutingTables
    block_size: int = 4
    num_blocks: int = 128

    def __post_init__(self) -> None:
        self.kv_cache = TorchBackend().allocate_cache(self.model.config, self.num_blocks, self.block_size)
        generator = torch.Generator().manual_seed(0)
        for cache in (self.kv_cache.k, self.kv_cache.v):
            cache.copy_(torch.randn(cache.shape, generator=generator) * 100)
        self.free = list(range(1, self.num_blocks))
        random.Random(0).shuffle(self.free)

    @torch.no_grad()
    def step(self, decode: Sequence[Row] = (), prefill: Sequence[tuple[Row, int]] = ()) -> list[Tensor]:
        """Compute one token of each row in `decode` and the next n of each (row, n) in `prefill`; logits [n, V] per row."""
        inputs = self.inputs(decode, prefill)
        logits = self.model(inputs, self.kv_cache, self.tables).logits
        counts = [1] * len(decode) + [count for _, count in prefill]
        for row, count in zip([*decode, *(row for row, _ in prefill)], counts, strict=True):
            row.computed += count
        return list(logits.split(counts))

    def inputs(self, decode: Sequence[Row] = (), prefill: Sequence[tuple[Row, int]] = ()) -> StepInputs:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        policies: list[int] = []
        lengths: list[int] = []
        segments: list[PrefillSegment] = []
        for index, (row, count) in enumerate([*((row, 1) for row in decode), *prefill]):
            end = row.computed + count
            while len(row.blocks) * self.block_size < end:
                row.blocks.append(self.free.pop())
            if index >= len(decode):
                segments.append(PrefillSegment(row=index, start=len(ids), length=count, context_len=end))
            ids += row.tokens[row.computed : end]
            positions += range(row.computed, end)
            slots += [
                row.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(row.computed, end)
            ]
            policies += [row.policy] * count
            lengths.append(end)
        rows = [*decode, *(row for row, _ in prefill)]
        width = max(len(row.blocks) for row in rows) + 1  # one place more than needed: the null block must not show
        return StepInputs(
            input_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            policy_ids=torch.tensor(policies),
            slot_mapping=torch.tensor(slots),
            block_table=torch.tensor([row.blocks + [0] * (width - len(row.blocks)) for row in rows]),
            context_lens=torch.tensor(lengths),
            num_decode=len(decode),
            prefill=tuple(segments),
        )

    def greedy(self, prompt: list[int], max_tokens: int, policy: int = 1, stop: int | None = None) -> list[int]:
        """Greedy continuation: one prefill, then token by token through the cache; ends with `stop` if that is drawn."""
        row = Row(list(prompt), policy)
        logits = self.step(prefill=[(row, len(prompt))])[0]
        while True:
            row.tokens.append(int(logits[-1].argmax()))
            if len(row.tokens) == len(prompt) + max_tokens or row.tokens[-1] == stop:
                return row.tokens[len(prompt) :]
            logits = self.step(decode=[row])[0]


def make_tables(model: MoeTransformer, policies: Sequence[RoutingPolicy]) -> RoutingTables:
    """Routing tables with the policies in rows 1, 2, ..."""
    config = model.config
    tables = RoutingTables.empty(len(policies) + 1, config.num_hidden_layers, config.max_num_experts, "cpu")
    for index, policy in enumerate(policies):
        tables.write(index + 1, *policy.to_rows(config.max_num_experts))
    return tables
