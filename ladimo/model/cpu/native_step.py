"""Calls `step.c`: packs the weights of a model, passes the inputs of a step as C structures, and returns its outputs.

Legend: T tokens, R tokens whose logits are wanted, V vocabulary, L layers, E experts.
"""

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.model.attention.kv_cache import KVCache
from ladimo.model.attention.layer import Attention
from ladimo.model.config import ModelConfig
from ladimo.model.cpu.arena import Arena
from ladimo.model.cpu.build import library, origin
from ladimo.model.cpu.packing import (
    FLOATS,
    KINDS,
    PLANES,
    Matrix,
    Packed,
    Packer,
    Source,
    columns_multiple,
    pack,
    pack_down,
    pack_gate_up,
    stack_rows,
)
from ladimo.model.cpu.pool import Pool
from ladimo.model.cpu.structures import CLayer, CMatrix, CModel, CStep
from ladimo.model.families import find_family
from ladimo.model.inputs import RoutingTables, StepInputs, StepOutput
from ladimo.model.layers import GatedMLP, GeluMLP, LayerNorm, Norm
from ladimo.model.moe import ExpertLayer
from ladimo.model.nested.layers import NestedEmbedding, NestedLinear
from ladimo.model.precision import REFINED_GROUPS
from ladimo.model.quantization import format_names
from ladimo.model.router import GluRouter, LinearRouter, MlpRouter, Router, TableRouter
from ladimo.model.transformer import DecoderLayer, MoeTransformer

BOTH_PLANES = 5  # the kind of matrices in `PLANES`
ROUTER_LINEAR, ROUTER_MLP, ROUTER_TABLE, ROUTER_GLU, ROUTER_NONE = range(5)
NO_ROW = 2**62  # behind the last row of any matrix
# With fewer multiply-adds than this in a step, waking the other threads would cost more time than it saves.
WAKE_THREADS_FROM = 10**6


class Unsupported(Exception):
    """The compiled step cannot run this model. The message says why."""


def stored_format(dtype: torch.dtype, quantize: str | None) -> str:
    """The format in which weights of `dtype` are packed, one of `packing.KINDS` unless `quantize` is another format."""
    return quantize or ("bfloat16" if dtype == torch.bfloat16 else "float32")


def check_supported(config: ModelConfig, dtype: torch.dtype, quantize: str | None = None) -> None:
    """Raises Unsupported if this machine's compiled step cannot run such a model in `dtype`, or in the format `quantize`."""
    if library() is None:
        raise Unsupported(f"there is no compiled kernel: {origin()}")
    if find_family(config.family).has_own_modules:
        raise Unsupported(f"family {config.family} has modules that it does not know")
    if config.ffn_kind == "gelu" and not config.parallel_block:
        raise Unsupported("it knows FFNs without a gate only where they read what the attention reads")
    if any(layer is not None and layer.shared_expert_intermediate_size for layer in config.layers):
        raise Unsupported("it does not know shared experts")
    if config.nested_bits and quantize is not None:
        raise Unsupported(f"the weights have integers of their own, which {quantize} cannot replace")
    if dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f"the weights are {dtype}")
    format = stored_format(dtype, quantize)
    if format not in KINDS:
        raise Unsupported("the kernel does not know this format")
    multiple = columns_multiple(format, nested=bool(config.nested_bits))
    for name, size in (("hidden_size", config.hidden_size), ("attention width", config.num_attention_heads * config.head_dim)):
        if size % multiple:
            raise Unsupported(f"{name} {size} is not a multiple of {multiple}")


class NativeStep:
    """Computes `MoeTransformer.forward` over a KV cache, from packed weights. Only one thread may call it at a time.

    The compiled code has its own layout of the cache, so a cache filled here cannot be used by torch, or the other way round.
    The rotary table of the model is not packed; it is used where it is. So is the embedding, unless it has planes, or is at the
    same time an output head that is not rounded: its rows are then read from the packed form.
    """

    def __init__(
        self,
        model: MoeTransformer,
        format: str,
        num_threads: int,
        release: bool = False,
        wake_threads_from: int = WAKE_THREADS_FROM,
    ) -> None:
        """Pack the weights of `model` in `format`.

        `release`: free the model's own weights layer by layer, so that they are never in memory twice. The model itself cannot
        compute after that. `wake_threads_from`: steps with at least this many multiply-adds use all threads. Raises Unsupported
        before anything is changed.
        """
        config, dtype = model.config, model.model.norm.weight.dtype
        check_supported(config, dtype, format if format in format_names() else None)
        code = library()
        assert code is not None
        try:
            self.pool = Pool(code, num_threads)
        except MemoryError as error:
            raise Unsupported(str(error)) from error
        self.config, self._wake_threads_from = config, wake_threads_from
        self.dtype = dtype  # of the KV cache
        self._arena = Arena()  # the memory that the C structures point to
        self._packer = Packer(self.pool, self._arena)
        self._router_format = "bfloat16" if dtype == torch.bfloat16 else "float32"
        layers = (CLayer * config.num_hidden_layers)()
        for target, layer in zip(layers, model.model.layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            self._fill_layer(target, layer, format)
            if release:
                _release(layer)
        embedding = model.model.embed_tokens
        head = _weights(embedding if model.lm_head is None else model.lm_head)
        head_bias = None if model.lm_head is None else model.lm_head.bias
        packed_head = self._matrix(pack(head, format, self._packer, single=True))
        self._layers = layers
        self._embedding: Tensor | None = None
        packed_embedding = CMatrix()
        nested = isinstance(embedding, NestedEmbedding)
        if config.tie_word_embeddings and (nested or format in FLOATS):
            packed_embedding = packed_head
        elif isinstance(embedding, NestedEmbedding):
            packed_embedding = self._matrix(pack(embedding.nested, format, self._packer))
        else:
            self._embedding = embedding.weight.detach().to(self.dtype).contiguous()
        self._rope = model.rotary.table.float().contiguous()
        self._model = CModel(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            qk_head_dim=config.qk_head_dim,
            rotary_dim=config.rotary_dim,
            vocab=config.vocab_size,
            max_experts=config.max_num_experts if config.moe_layer_indices else 0,
            norms_each_head=config.qk_norm == "head",
            bf16=dtype == torch.bfloat16,
            eps=config.rms_norm_eps,
            embedding=None if self._embedding is None else self._embedding.data_ptr(),
            rope=self._rope.data_ptr(),
            norm=self._keep(model.model.norm.weight.float()),
            norm_bias=self._norm_bias(model.model.norm),
            head_bias=None if head_bias is None else self._keep(head_bias.float()),
            packed_embedding=packed_embedding,
            head=packed_head,
            layers=layers,
        )
        self._multiply_adds = config.dense_parameters + head.shape.numel()  # per token, an upper estimate
        if release and model.lm_head is not None:
            _release(model.lm_head)
        if release and self._embedding is None:
            _release(embedding)
        self._run = code.ladimo_step
        self._run.argtypes = [c_void_p, ctypes.POINTER(CModel), ctypes.POINTER(CStep)]

    @property
    def weight_bytes(self) -> int:
        """Bytes of memory that the model's weights take."""
        return self._arena.used + (0 if self._embedding is None else self._embedding.nbytes)

    def __call__(self, inputs: StepInputs, kv_cache: KVCache, tables: RoutingTables) -> StepOutput:
        """Run one step. Logits are fp32. Raises MemoryError if there is no memory for the step's buffers."""
        assert inputs.slot_mapping is not None and inputs.block_table is not None
        assert kv_cache.k.dtype == self.dtype, "the cache was allocated for another dtype"
        config, num_tokens = self.config, len(inputs.input_ids)
        indices = None if inputs.logit_indices is None else inputs.logit_indices.contiguous()
        segments = (c_int64 * (4 * len(inputs.prefill)))(
            *(number for s in inputs.prefill for number in (s.row, s.start, s.length, s.context_len))
        )
        num_logits = num_tokens if indices is None else len(indices)
        logits = torch.empty(num_logits, config.vocab_size)
        expert_ids = None
        if self._model.max_experts:
            expert_ids = torch.empty(config.num_hidden_layers, num_tokens, config.max_num_experts, dtype=torch.int64)
        refined = None
        if config.nested_bits:
            refined = torch.zeros(config.num_hidden_layers + 1, num_tokens, REFINED_GROUPS, dtype=torch.int32)
        # Must stay alive until the call returns, because contiguous() may have made copies.
        given = [
            tensor.contiguous()
            for tensor in (
                inputs.input_ids,
                inputs.positions,
                inputs.policy_ids,
                inputs.slot_mapping,
                inputs.block_table,
            )
        ]
        step = CStep(
            num_tokens,
            inputs.num_decode,
            len(inputs.prefill),
            num_logits,
            inputs.block_table.shape[1],
            kv_cache.k.shape[2],
            self._multiply_adds * num_tokens >= self._wake_threads_from,
            tables.batch_budgets,
            *(tensor.data_ptr() for tensor in given),
            None if indices is None else indices.data_ptr(),
            ctypes.addressof(segments),
            tables.rows.data_ptr(),
            tables.allowed.data_ptr(),
            kv_cache.k.data_ptr(),
            kv_cache.v.data_ptr(),
            logits.data_ptr(),
            None if expert_ids is None else expert_ids.data_ptr(),
            None if refined is None else refined.data_ptr(),
        )
        if self._run(self.pool.handle, self._model, step):
            raise MemoryError(f"no memory for a step of {num_tokens} tokens")
        return StepOutput(logits, expert_ids, refined)

    def _fill_layer(self, target: CLayer, layer: DecoderLayer, format: str) -> None:
        attention, config = layer.self_attn, self.config
        assert isinstance(attention, Attention)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        target.input_norm = self._keep(layer.input_layernorm.weight.float())
        target.input_norm_bias = self._norm_bias(layer.input_layernorm)
        if layer.post_attention_layernorm is not None:
            target.post_norm = self._keep(layer.post_attention_layernorm.weight.float())
            target.post_norm_bias = self._norm_bias(layer.post_attention_layernorm)
        packed = pack(stack_rows([_weights(linear) for linear in projections]), format, self._packer)
        # Keys and values are never read at fewer than KEY_VALUE_BITS.
        target.qkv = self._matrix(packed, careful_row=config.num_attention_heads * config.qk_head_dim)
        if attention.q_proj.bias is not None:
            target.qkv_bias = self._keep(torch.cat([linear.bias for linear in projections]).float())
        if attention.q_norm is not None and attention.k_norm is not None:
            target.q_norm, target.k_norm = (self._keep(norm.weight.float()) for norm in (attention.q_norm, attention.k_norm))
        if attention.channels is not None:
            target.pairs = self._keep(attention.channels[:, : config.qk_head_dim // 2].int())
        target.o = self._matrix(pack(_weights(attention.o_proj), format, self._packer))
        # In a parallel block, the biases of both outputs are added together.
        biases = [attention.o_proj.bias, getattr(layer.mlp, "output_bias", None)]
        if isinstance(layer.mlp, GeluMLP):
            biases.append(layer.mlp.down_proj.bias)
        if present := [bias.float() for bias in biases if bias is not None]:
            target.o_bias = self._keep(torch.stack(present).sum(dim=0))
        if isinstance(layer.mlp, GatedMLP):
            # A dense FFN is always read whole, because a rule of a dense layer has no bits.
            gate_up = tuple(linear.weight[None] for linear in (layer.mlp.gate_proj, layer.mlp.up_proj))
            self._fill_experts(target, gate_up, layer.mlp.down_proj.weight[None], format)
            return
        if isinstance(layer.mlp, GeluMLP):
            up, down = layer.mlp.up_proj, layer.mlp.down_proj
            self._fill_experts(target, up.weight[None], down.weight[None], format, up.bias[None])
            return
        assert isinstance(layer.mlp, ExpertLayer)
        moe, experts = layer.mlp.config, layer.mlp.experts
        self._fill_experts(target, experts.gate_up_proj, experts.down_proj, format, experts.up_bias)
        self._fill_router(target, layer.mlp.gate)
        target.num_experts, target.neurons = moe.num_experts, moe.moe_intermediate_size
        if self.config.nested_bits:
            norms = layer.mlp.experts.get_buffer("norms")
            target.column_norms = self._keep(F.pad(norms, (0, target.expert_size - norms.shape[1])))
        target.sigmoid = moe.score_function == "sigmoid"
        target.score_norm_top_k = moe.score_norm_top_k or 0
        target.weight_one = moe.expert_weight == "one"

    def _fill_experts(self, target: CLayer, gate_up: Source, down: Source, format: str, up_bias: Tensor | None = None) -> None:
        """up_bias: [E, F] of experts without a gate, whose gate_up are up rows only."""
        target.down = self._matrix(pack_down(down, format, self._packer))
        target.expert_size = target.down.cols
        target.gate_up = self._matrix(pack_gate_up(gate_up, format, self._packer, gated=up_bias is None))
        if up_bias is not None:
            target.up_bias = self._keep(F.pad(up_bias.float(), (0, target.expert_size - up_bias.shape[1])))

    def _norm_bias(self, norm: Norm) -> int | None:
        return self._keep(norm.bias.float()) if isinstance(norm, LayerNorm) else None

    def _fill_router(self, target: CLayer, router: Router) -> None:
        target.router_kind = ROUTER_NONE
        if isinstance(router, LinearRouter):
            target.router_kind, target.fixed_experts = ROUTER_LINEAR, router.fixed_experts
            target.router = self._matrix(pack(router.weight, self._router_format, self._packer))
        elif isinstance(router, MlpRouter):
            target.router_kind = ROUTER_TABLE if isinstance(router, TableRouter) else ROUTER_MLP
            target.router = self._matrix(pack(router.fc1.weight, self._router_format, self._packer))
            second = router.fc2.weight
            target.router_second = self._matrix(
                pack(F.pad(second, (0, second.shape[1] % 2)), self._router_format, self._packer)
            )
        elif isinstance(router, GluRouter):
            target.router_kind = ROUTER_GLU
            target.router = self._matrix(pack(router.gate_proj.weight, self._router_format, self._packer))
            target.router_second = self._matrix(pack(router.up_proj.weight, self._router_format, self._packer))
        if router.e_score_correction_bias is not None:
            target.selection_bias = self._keep(router.e_score_correction_bias.float())

    def _matrix(self, packed: Packed, careful_row: int = NO_ROW) -> CMatrix:
        parts = (packed.data, packed.high, packed.low, packed.scales, packed.single)
        return CMatrix(
            *(None if part is None else self._keep(part) for part in parts),
            packed.rows,
            packed.panels,
            packed.cols,
            BOTH_PLANES if packed.format == PLANES else KINDS.index(packed.format),
            careful_row,
            0 if packed.single is None else packed.single[0].numel(),
        )

    def _keep(self, tensor: Tensor) -> int:
        return self._arena.keep(tensor)


def _weights(layer: nn.Linear | nn.Embedding | NestedLinear | NestedEmbedding) -> Matrix:
    return layer.nested if isinstance(layer, NestedLinear | NestedEmbedding) else layer.weight


def _release(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.new_empty(0))  # a buffer that is a view would keep the memory that it is a view of
