"""Mistral models in which the sliding window has no effect."""

from ladimo.model.families.family import Family

MISTRAL = Family(
    "mistral",
    num_key_value_heads=8,
    max_position_embeddings=131072,
    qkv_bias=False,
    output_bias=False,
    sliding_window=4096,
)
