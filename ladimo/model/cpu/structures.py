"""The structures of `model.h`, field by field."""

import ctypes
from ctypes import c_double, c_int64, c_void_p


class CMatrix(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("data", "high", "low", "scales", "single")] + [
        (name, c_int64) for name in ("rows", "panels", "cols", "kind", "careful_row", "single_bytes")
    ]


class CLayer(ctypes.Structure):
    _fields_ = (
        [(name, c_void_p) for name in ("input_norm", "post_norm", "input_norm_bias", "post_norm_bias", "q_norm", "k_norm")]
        + [(name, c_void_p) for name in ("qkv_bias", "o_bias", "selection_bias", "up_bias", "pairs", "column_norms")]
        + [(name, CMatrix) for name in ("qkv", "o", "gate_up", "down", "router", "router_second")]
        + [(name, c_int64) for name in ("num_experts", "expert_size", "neurons", "router_kind", "fixed_experts")]
        + [(name, c_int64) for name in ("sigmoid", "score_norm_top_k", "weight_one")]
    )


class CModel(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_int64)
            for name in (
                "num_layers",
                "hidden",
                "heads",
                "kv_heads",
                "head_dim",
                "qk_head_dim",
                "rotary_dim",
                "vocab",
                "max_experts",
                "norms_each_head",
                "bf16",
            )
        ),
        ("eps", c_double),
        *((name, c_void_p) for name in ("embedding", "rope", "norm", "norm_bias", "head_bias")),
        ("packed_embedding", CMatrix),
        ("head", CMatrix),
        ("layers", ctypes.POINTER(CLayer)),
    ]


class CStep(ctypes.Structure):
    _fields_ = [
        (name, c_int64)
        for name in (
            "num_tokens",
            "num_decode",
            "num_segments",
            "num_logits",
            "table_width",
            "block_size",
            "parallel",
            "batch_budgets",
        )
    ] + [
        (name, c_void_p)
        for name in (
            "input_ids",
            "positions",
            "policy_ids",
            "slots",
            "block_table",
            "logit_indices",
            "segments",
            "rows",
            "allowed",
            "k_cache",
            "v_cache",
            "logits",
            "expert_ids",
            "refined",
        )
    ]
