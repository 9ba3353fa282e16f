"""How many bits of a weight can be read, and what that costs. Plain numbers: policies and costs need no torch."""

GROUP = 32  # columns of a row that share a scale, in integer formats and in nested weights
NESTED_BITS = (4, 8)  # that nested weights can be read at, besides all
# Keys and values are read at no fewer bits than this: they are few weights, and every later token looks at what they give. On
# SmolLM2 the 2.5% of the weights that make values cost 5% of perplexity at 4 bits.
KEY_VALUE_BITS = 8
REFINED_GROUPS = 16  # neighbouring neurons of a layer, or words, whose refinements are counted together
WHOLE_BYTES = 2  # of a weight that is not rounded, in 16 bits
SCALE_BYTES = 2


def bytes_per_weight(bits: int | None) -> float:
    """Bytes that are read for a weight at so many bits, its share of the scale included. None: all bits."""
    return WHOLE_BYTES if bits is None else bits / 8 + SCALE_BYTES / GROUP
