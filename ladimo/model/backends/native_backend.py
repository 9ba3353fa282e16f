"""The back end for CPUs: a step over a KV cache is one call of compiled code (`ladimo.model.cpu`)."""

import torch
from torch import nn

from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.backends.torch_backend import Step, TorchBackend
from ladimo.model.cpu.native_draw import NativeDraw
from ladimo.model.cpu.native_step import NativeStep, stored_format
from ladimo.model.inputs import RoutingTables, StepInputs, StepOutput
from ladimo.model.transformer import MoeTransformer


class NativeBackend(TorchBackend):
    """Computes one model from packed weights, which may be rounded to integers. The model's own weights are freed.

    The compiled code has its own layout of the KV cache, so no other back end can use this cache. The results of a request do
    not depend on its batch, in any bit.
    """

    name = "native"
    quantizes_as_it_packs = True

    _native: NativeStep | None = None

    def prepare(self, model: nn.Module) -> None:
        """Pack the weights of a loaded model. Raises Unsupported (see `native_step.check_supported`) before it changes
        anything."""
        assert isinstance(model, MoeTransformer)
        self._native = NativeStep(model, stored_format(self.dtype, self.quantize), self.num_threads, release=True)
        self.compiled_draw = NativeDraw(self._native.pool)
        super().prepare(model)

    def step(self, forward: Step, inputs: StepInputs, kv_cache: KVCache | None, tables: RoutingTables) -> StepOutput:
        assert self._native is not None and kv_cache is not None
        return self._native(inputs, kv_cache, tables)

    def begin_step(self, num_tokens: int) -> None:
        torch.set_num_threads(1)  # the compiled code has its own threads, and torch has little to do
