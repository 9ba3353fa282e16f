"""Qwen2 and Qwen2.5: LLaMA with biases on queries, keys and values."""

from ladimo.model.families.family import Family

QWEN2 = Family(
    "qwen2",
    num_key_value_heads=32,
    max_position_embeddings=32768,
    qkv_bias=True,
    output_bias=False,
    sliding_window=4096,
    use_sliding_window=False,
)
