"""The back end of CPUs: a step over a cache is one call of compiled code (`ladimo.model.cpu`)."""

import torch
from torch import nn

from ladimo.model.backends.torch_backend import Step, TorchBackend
from ladimo.model.cpu.native_draw import NativeDraw
from ladimo.model.cpu.native_step import NativeStep, stored_format
from ladimo.model.inputs import RoutingTables, StepInputs, StepOutput
from ladimo.model.kv_cache import KVCache
from ladimo.model.transformer import MoeTransformer


class NativeBackend(TorchBackend):
    """Packs the weights of one model, rounded to integers if asked for, and lets go of the model's own.

    The cache is in the compiled code's own layout, so it serves this back end alone. What a request computes is the same in
    every batch, bit for bit.
    """

    name = "native"
    quantizes_as_it_packs = True

    _native: NativeStep | None = None

    def prepare(self, model: nn.Module) -> None:
        """Raises Unsupported for what `native_step.check_supported` names, before anything is changed."""
        assert isinstance(model, MoeTransformer)
        self._native = NativeStep(model, stored_format(self.dtype, self.quantize), self.num_threads, release=True)
        self.compiled_draw = NativeDraw(self._native.pool)
        super().prepare(model)

    def step(self, forward: Step, inputs: StepInputs, kv_cache: KVCache | None, tables: RoutingTables) -> StepOutput:
        assert self._native is not None and kv_cache is not None
        return self._native(inputs, kv_cache, tables)

    def begin_step(self, num_tokens: int) -> None:
        torch.set_num_threads(1)  # the compiled code has threads of its own, and torch little to do beside it
