"""Qwen3: LLaMA with norms of queries and keys. The size of a head does not follow from the hidden size."""

from ladimo.model.families.family import Family

QWEN3 = Family(
    "qwen3",
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=32768,
    sliding_window=4096,
    use_sliding_window=False,
    qk_norm="head",
)
