"""Mixtral models in which the sliding window has no effect."""

from ladimo.model.families.moe_family import MoeFamily

MIXTRAL = MoeFamily(
    "mixtral",
    num_key_value_heads=8,
    max_position_embeddings=131072,
    qkv_bias=False,
    output_bias=False,
    defaults={"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2},
    experts_field="num_local_experts",
    norm_topk_prob=True,
    block="block_sparse_moe",
    matrices=("w1", "w3", "w2"),
)
