"""The memory of captured decode steps: allocated once, filled before each replay, read after it.

Legend: R rows (of the largest captured step), N blocks per row, V vocabulary, L layers, E experts (of the largest layer).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ladimo.model.config import ModelConfig
from ladimo.model.inputs import StepInputs
from server.engine.batch import Batch, decode_rows
from server.engine.sampling.sampler import SamplingInputs, uniform

# Rows of `integers` and `floats`.
INPUT_IDS, PREVIOUS, POSITIONS, POLICY_IDS, SLOT_MAPPING, CONTEXT_LENS, TOP_K = range(7)
TEMPERATURE, TOP_P, MIN_P, UNIFORM = range(4)


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """Inputs and outputs of a captured step, at fixed addresses. Weights, KV cache and routing tables are elsewhere.

    Three tensors hold all inputs, so three copies fill them. Padding rows are zeros with a context of 1. They run under the
    policy "none" (row 0) and use the null block.

    `previous` tells where a row's input token comes from. 0: the host knows it, and it is in `input_ids`. Otherwise it is one
    plus a row of the step before, and the token is what that row drew.

    Example: a bucket of 4 with two rows, which continue with the tokens that rows 0 and 2 of the step before drew:
    input_ids [0, 0, 0, 0]  previous [1, 3, 0, 0]  positions [9, 5, 0, 0]  policy_ids [3, 1, 0, 0]  context_lens [10, 6, 1, 1]
    """

    integers: Tensor  # [7, R] int64: input_ids, previous, positions, policy_ids, slot_mapping, context_lens, top_k
    floats: Tensor  # [4, R] float64: temperature, top_p, min_p, uniform
    block_table: Tensor  # [R, N] int64
    logits: Tensor  # [R, V]
    # [R, 2 + L] int64: the token drawn, the number of experts that ran in each layer, and the rows of weights that were refined
    results: Tensor
    expert_ids: Tensor  # [L, R, E] int64, -1 where no expert ran
    refined: Tensor  # [L + 1, R] int64, `StepOutput.refined_counts`

    @classmethod
    def allocate(
        cls, config: ModelConfig, rows: int, blocks_per_row: int, dtype: torch.dtype, device: torch.device
    ) -> "StepBuffers":
        """Buffers for steps of up to `rows` rows, with `blocks_per_row` blocks in the block table."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        num_layers = config.num_hidden_layers
        integers = zeros(7, rows)
        integers[CONTEXT_LENS] = 1  # attention over an empty context would write NaN into the null block
        return cls(
            integers=integers,
            floats=zeros(4, rows, dtype=torch.float64),
            block_table=zeros(rows, blocks_per_row),
            logits=zeros(rows, config.vocab_size, dtype=dtype),
            results=zeros(rows, 2 + num_layers),
            expert_ids=zeros(num_layers, rows, config.max_num_experts) - 1,
            refined=zeros(num_layers + 1, rows),
        )

    @property
    def num_rows(self) -> int:
        return self.block_table.shape[0]

    def step_inputs(self, rows: int) -> StepInputs:
        """The first `rows` rows as a decode step. Takes the tokens of the step before from `results`."""
        previous = self.integers[PREVIOUS, :rows]
        drawn = self.results[:, 0][(previous - 1).clamp(min=0)]
        return StepInputs(
            input_ids=torch.where(previous > 0, drawn, self.integers[INPUT_IDS, :rows]),
            positions=self.integers[POSITIONS, :rows],
            policy_ids=self.integers[POLICY_IDS, :rows],
            slot_mapping=self.integers[SLOT_MAPPING, :rows],
            block_table=self.block_table[:rows],
            context_lens=self.integers[CONTEXT_LENS, :rows],
            num_decode=rows,
        )

    def sampling_inputs(self, rows: int, cuts: bool) -> SamplingInputs:
        """The sampling parameters of the first `rows` rows."""
        return SamplingInputs(
            temperature=self.floats[TEMPERATURE, :rows],
            top_p=self.floats[TOP_P, :rows],
            top_k=self.integers[TOP_K, :rows],
            min_p=self.floats[MIN_P, :rows],
            uniform=self.floats[UNIFORM, :rows],
            cuts=cuts,
        )


class Staging:
    """The inputs on the host. The memory is pinned if there is a device, so the host does not wait for the copies."""

    def __init__(self, buffers: StepBuffers, block_size: int) -> None:
        self._buffers, self._block_size = buffers, block_size
        self._on_device = buffers.integers.device.type == "cuda"
        self._host = [
            torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=self._on_device)
            for tensor in (buffers.integers, buffers.floats, buffers.block_table)
        ]
        self._integers, self._floats, self._block_table = (tensor.numpy() for tensor in self._host)
        self._tables: list[list[int]] = [[] for _ in range(buffers.num_rows)]  # the content of the host's block table
        self._copied = torch.cuda.Event() if self._on_device else None

    def fill(self, batch: Batch, rows: int) -> None:
        """Lay out a batch of decoding sequences, padded to `rows`, and start the copies to the device."""
        if self._copied is not None:
            self._copied.synchronize()  # the copies of the step before; they are done already unless the host runs ahead
        sequences, count = batch.decode, len(batch.decode)
        laid_out = decode_rows(batch, self._block_size)
        integers = self._integers
        integers[:, count:] = 0
        integers[CONTEXT_LENS, count:] = 1
        integers[INPUT_IDS, :count] = laid_out.input_ids
        integers[PREVIOUS, :count] = 0 if batch.previous is None else [row + 1 for row in batch.previous]
        integers[POSITIONS, :count] = laid_out.positions
        integers[POLICY_IDS, :count] = laid_out.policy_ids
        integers[SLOT_MAPPING, :count] = laid_out.slot_mapping
        integers[CONTEXT_LENS, :count] = laid_out.context_lens
        for row in range(rows):
            self._write_table(row, sequences[row].block_table if row < count else [])
        self._fill_sampling(batch, ahead=int(batch.previous is not None))
        for target, source in zip(
            (self._buffers.integers, self._buffers.floats, self._buffers.block_table[:rows]),
            (self._host[0], self._host[1], self._host[2][:rows]),
            strict=True,
        ):
            target.copy_(source, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _write_table(self, row: int, table: list[int]) -> None:
        if self._tables[row] != table:
            self._block_table[row, : len(table)] = table
            self._block_table[row, len(table) :] = 0
            self._tables[row] = table.copy()

    def _fill_sampling(self, batch: Batch, ahead: int) -> None:
        count, params = len(batch.decode), [s.request.sampling for s in batch.decode]
        if batch.greedy:
            return  # a greedy step does not read the sampling parameters
        self._integers[TOP_K, :count] = [p.top_k for p in params]
        self._floats[:, :count] = [
            [p.temperature for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [uniform(s.seed, s.num_tokens + ahead) if s.request.sampling.temperature else 0.0 for s in batch.decode],
        ]
        self._floats[:, count:] = 0
