"""The back end that runs anywhere: torch's own operations. The others replace some of them.

Legend: T tokens in the step.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ladimo.model import experts, norm_activation, paged_attention, quantization, routing
from ladimo.model.config import ModelConfig
from ladimo.model.cpu.arena import huge_zeros
from ladimo.model.inputs import RoutingTables, StepInputs, StepOutput
from ladimo.model.kv_cache import KVCache

# Of the memory that is free on a GPU once the weights are loaded, this share goes to the cache.
CUDA_CACHE_SHARE = 0.85
CPU_CACHE_BYTES = 2 * 2**30
# A smaller step (multiply-adds) runs on one CPU thread: others gain it little, and beside a busy neighbour, such as the HTTP
# loop, waiting for them at every operation makes it many times slower.
SERIAL_STEP = 10**8

CPU = torch.device("cpu")

Step = Callable[[StepInputs, KVCache | None, RoutingTables], StepOutput]


class Draw(Protocol):
    """Draws token ids [R] from logits [R, V], as `server.engine.sampling.sampler` describes."""

    def likeliest(self, logits: Tensor) -> Tensor: ...

    def draw(
        self, logits: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor, top_k: Tensor
    ) -> Tensor: ...


class TorchBackend:
    """Device and dtype of the weights; `quantize`: the integer format that they are rounded to (None: none); `num_threads`: CPU
    threads that a large step may use."""

    name = "torch"
    # Whether `prepare` rounds the weights. Otherwise the loader rounds them, layer by layer.
    quantizes_as_it_packs = False
    # What draws tokens in the place of torch's operations, once a model is prepared.
    compiled_draw: Draw | None = None

    # What modules compute with. Each has a reference in the plain module of its name.
    rms_norm = staticmethod(norm_activation.rms_norm)
    add_rms_norm = staticmethod(norm_activation.add_rms_norm)
    silu_mul = staticmethod(norm_activation.silu_mul)
    rotate_and_store = staticmethod(paged_attention.rotate_and_store)
    attend_decode = staticmethod(paged_attention.attend_decode)
    select_experts = staticmethod(routing.select_experts)
    apply_batch_budget = staticmethod(routing.apply_batch_budget)
    apply_experts = staticmethod(experts.apply_experts)
    linear = staticmethod(quantization.linear)

    def __init__(
        self,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        quantize: str | None = None,
        num_threads: int = 1,
    ) -> None:
        self.device, self.dtype, self.quantize, self.num_threads = device, dtype, quantize, num_threads
        self._multiply_adds = 0  # of the model, per token, about

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are captured in CUDA graphs."""
        return self.device.type == "cuda"

    def prepare(self, model: nn.Module) -> None:
        """Let every module of a loaded model, or of one layer, compute with this back end."""
        for module in model.modules():
            if isinstance(module, BackendModule):
                module.backend = self
        self._multiply_adds = sum(weight.numel() for weight in model.parameters())

    def step(self, forward: Step, inputs: StepInputs, kv_cache: KVCache | None, tables: RoutingTables) -> StepOutput:
        """One step of a prepared model, whose own `forward` is given."""
        return forward(inputs, kv_cache, tables)

    def begin_step(self, num_tokens: int) -> None:
        """Set what torch needs on the calling thread for a step of so many tokens."""
        if self.device.type == "cpu":
            torch.set_num_threads(1 if self._multiply_adds * num_tokens < SERIAL_STEP else self.num_threads)

    def count(self, tables: RoutingTables, expert_ids: Tensor, policy_ids: Tensor) -> None:
        """Add a step's choices to the counters of `tables`, at once or when they are read next. The tensors must stay as they
        are until then."""
        if self.device.type == "cpu":
            tables.defer(expert_ids, policy_ids)
        else:
            self.record(tables, expert_ids, policy_ids)

    def record(self, tables: RoutingTables, expert_ids: Tensor, policy_ids: Tensor) -> None:
        """Add a step's choices to the counters without waiting for the device: expert_ids [L, T, K], policy_ids [T]."""
        tables.record(expert_ids, policy_ids)

    def allocate_cache(self, config: ModelConfig, num_blocks: int, block_size: int) -> KVCache:
        """Keys and values for `num_blocks` blocks of `block_size` tokens, all zero."""
        shape = (config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        return KVCache(self._zeros(shape), self._zeros(shape))

    def cache_bytes(self) -> int:
        """Memory that the cache may take, once the weights are loaded."""
        if self.device.type == "cuda":
            return int(CUDA_CACHE_SHARE * torch.cuda.mem_get_info(self.device)[0])
        return CPU_CACHE_BYTES

    def release_memory(self) -> None:
        """Give back memory that loading needed and nothing holds any more."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def make_current(self) -> None:
        """Make the calling thread's kernels and events go to this device."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        if self.device.type == "cpu":
            return huge_zeros(math.prod(shape), self.dtype).view(shape)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


# What modules use that were built by hand and not loaded.
REFERENCE = TorchBackend()


class BackendModule(nn.Module):
    """A module whose arithmetic is its back end's."""

    backend: TorchBackend = REFERENCE
