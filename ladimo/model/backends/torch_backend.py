"""The back end that runs anywhere, with torch's own operations. The other back ends replace some of these.

Legend: T tokens in the step, K places per token, L layers, R rows, V vocabulary.
"""

import ctypes
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.model import experts, norm_activation, quantization, routing
from ladimo.model.attention import paged
from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.config import ModelConfig
from ladimo.model.cpu.arena import huge_zeros
from ladimo.model.inputs import RoutingTables, StepInputs, StepOutput
from ladimo.model.nested import refinement
from ladimo.model.nested.weights import NestedWeights, by_precision
from ladimo.model.precision import REFINED_GROUPS

# The share of a GPU's free memory that the KV cache gets, after the weights are loaded.
CUDA_CACHE_SHARE = 0.85
CPU_CACHE_BYTES = 2 * 2**30
CPU_STEP_BYTES = 2**29
# A step with fewer multiply-adds than this runs on one CPU thread. More threads would gain little. If another thread of the
# process is busy, such as the HTTP loop, waiting for all threads at every operation would make the step many times slower.
SERIAL_STEP = 10**8

CPU = torch.device("cpu")

Step = Callable[[StepInputs, KVCache | None, RoutingTables], StepOutput]


class Draw(Protocol):
    """Draws token ids [R] from logits [R, V]. `server.engine.sampling.sampler` defines the draw."""

    def likeliest(self, logits: Tensor) -> Tensor: ...

    def draw(
        self, logits: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor, top_k: Tensor
    ) -> Tensor: ...


class TorchBackend:
    """`device` and `dtype`: those of the weights. `quantize`: the integer format of the weights; None: they are not rounded.
    `num_threads`: the number of CPU threads for large steps."""

    name = "torch"
    # True: `prepare` rounds the weights to integers. False: the loader rounds them, layer by layer.
    quantizes_as_it_packs = False
    # After `prepare`: the object that draws tokens; None: torch's operations draw them.
    compiled_draw: Draw | None = None

    # The operations of the modules. Other back ends override them; these are the references.
    rms_norm = staticmethod(norm_activation.rms_norm)
    add_rms_norm = staticmethod(norm_activation.add_rms_norm)
    silu_mul = staticmethod(norm_activation.silu_mul)
    rotate_and_store = staticmethod(paged.rotate_and_store)
    attend_decode = staticmethod(paged.attend_decode)
    select_experts = staticmethod(routing.select_experts)
    apply_batch_budget = staticmethod(routing.apply_batch_budget)
    apply_experts = staticmethod(experts.apply_experts)
    apply_refined = staticmethod(refinement.apply_refined)
    linear = staticmethod(quantization.linear)

    def __init__(
        self,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        quantize: str | None = None,
        num_threads: int = 1,
    ) -> None:
        self.device, self.dtype, self.quantize, self.num_threads = device, dtype, quantize, num_threads
        self.part = refinement.WHOLE  # of the neurons that this process has
        self._multiply_adds = 0  # of the model per token, approximately

    @property
    def captures_graphs(self) -> bool:
        """Whether decode steps are captured in CUDA graphs."""
        return self.device.type == "cuda"

    def prepare(self, model: nn.Module) -> None:
        """Make all modules of a loaded model, or of one layer, compute with this back end."""
        for module in model.modules():
            if isinstance(module, BackendModule):
                module.backend = self
        self._multiply_adds = sum(weight.numel() for weight in model.parameters())

    def lay_out(self, model: nn.Module) -> None:
        """Lay out the weights of a prepared model for serving. It cannot be trained or saved afterwards."""

    def nested_linear(self, x: Tensor, weights: NestedWeights, bits: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, K] at each token's bits [T] -> [T, N]; weights [N, K]."""
        return by_precision(bits, lambda rows, wanted: F.linear(rows, weights.at(wanted, rows.dtype), bias), x)

    def apply_nested(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        gate_up: NestedWeights,
        down: NestedWeights,
        norms: Tensor,
        bits: Tensor,
        refine: Tensor,
        up_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the chosen experts at each token's bits [T], or by `refinement.apply_refined` where `refine` [T] is finite.

        The other arguments are those of `apply_refined`. Returns the output [T, D] and the refined neurons [T, G] int64.
        """

        def run(tokens: Tensor, wanted: float) -> Tensor:
            weights = gate_up.at(wanted, hidden_states.dtype), down.at(wanted, hidden_states.dtype)
            return self.apply_experts(hidden_states[tokens], topk_weights[tokens], topk_ids[tokens], *weights, up_bias)

        tokens = torch.arange(len(hidden_states), device=hidden_states.device)
        out = by_precision(bits, run, tokens)
        if hidden_states.device.type != "cpu":  # no waiting for the device, so all tokens
            arguments = hidden_states, topk_weights, topk_ids, gate_up, down, norms, refine
            again, counts = self.apply_refined(*arguments, up_bias, self.part)
            refining = (refine < torch.inf).unsqueeze(-1)
            return torch.where(refining, again, out), counts * refining
        refined = torch.zeros(len(tokens), REFINED_GROUPS, dtype=torch.int64)
        tokens = (refine < torch.inf).nonzero().flatten()
        if len(tokens):
            chosen = hidden_states[tokens], topk_weights[tokens], topk_ids[tokens]
            weights = gate_up, down, norms
            out[tokens], refined[tokens] = self.apply_refined(*chosen, *weights, refine[tokens], up_bias, self.part)
        return out, refined

    def nested_logits(
        self, x: Tensor, weights: NestedWeights, bits: Tensor, refine: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [R, D], bits and refine [R] -> logits [R, V] and the refined words [R, G] int64 (`refinement.refine_logits`)."""
        logits = self.nested_linear(x, weights, bits, bias)
        again, counts = refinement.refine_logits(x, logits, weights, refine, bias)
        refining = (refine < torch.inf).unsqueeze(-1)
        return torch.where(refining, again, logits), counts * refining

    def step(self, forward: Step, inputs: StepInputs, kv_cache: KVCache | None, tables: RoutingTables) -> StepOutput:
        """Run one step of a prepared model. `forward` is the model's own method."""
        return forward(inputs, kv_cache, tables)

    def begin_step(self, num_tokens: int) -> None:
        """Set the number of torch's CPU threads for a step of `num_tokens` tokens. Called on the thread that runs the step."""
        if self.device.type == "cpu":
            torch.set_num_threads(1 if self._multiply_adds * num_tokens < SERIAL_STEP else self.num_threads)

    def count(self, tables: RoutingTables, expert_ids: Tensor, policy_ids: Tensor) -> None:
        """Add the choices of a step to the counters of `tables`, now or when they are next read: expert_ids [L, T, K],
        policy_ids [T]. The tensors must not change until then."""
        if self.device.type == "cpu":
            tables.defer(expert_ids, policy_ids)
        else:
            self.record(tables, expert_ids, policy_ids)

    def record(self, tables: RoutingTables, expert_ids: Tensor, policy_ids: Tensor) -> None:
        """Add the choices of a step to the counters now, without waiting for the device. Arguments are those of `count`."""
        tables.record(expert_ids, policy_ids)

    def allocate_cache(self, config: ModelConfig, num_blocks: int, block_size: int) -> KVCache:
        """A KV cache of `num_blocks` blocks of `block_size` tokens, filled with zeros."""
        shape = (config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads)
        return KVCache(self._zeros((*shape, config.qk_head_dim)), self._zeros((*shape, config.head_dim)))

    def cache_bytes(self) -> int:
        """The bytes that the KV cache may use. Called after the weights are loaded."""
        if self.device.type == "cuda":
            return int(CUDA_CACHE_SHARE * torch.cuda.mem_get_info(self.device)[0])
        return CPU_CACHE_BYTES

    def step_bytes(self) -> int:
        """The bytes that the results of a step's operations may use. Called after the KV cache is allocated."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0] // 2
        return CPU_STEP_BYTES

    def release_memory(self) -> None:
        """Return memory to the device, or to the system, that was only needed for loading."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # glibc keeps what was freed otherwise
            trim(0)

    def make_current(self) -> None:
        """Make this device the current one of the calling thread, for its kernels and events. A device without a number is the
        current one already."""
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        if self.device.type == "cpu":
            return huge_zeros(math.prod(shape), self.dtype).view(shape)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


# The back end of modules that were constructed directly instead of loaded.
REFERENCE = TorchBackend()


class BackendModule(nn.Module):
    """A module that computes with the operations of its back end."""

    backend: TorchBackend = REFERENCE
