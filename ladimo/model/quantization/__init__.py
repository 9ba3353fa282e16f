"""Weights as small integers, and only the weights: no offset, a scale per row and 32 columns, rounded when a model is loaded.

The idea is FineQuant's (arXiv 2308.09723): groups along the input dimension keep int4 usable without calibration data.

Why no library: torch's own products (`_weight_int4pack_mm`, `_weight_int8pack_mm`, which torchao calls) take dense layers only,
int4 in bf16 alone and int8 with one scale per row; none reads a stacked expert by its number, which is what makes cost follow
the routing. So the expert kernels unpack what they read, and dense layers share their format.
"""

from ladimo.model.quantization.formats import GROUP, Format, find_format, format_names, register
from ladimo.model.quantization.int4 import Int4
from ladimo.model.quantization.int8 import Int8
from ladimo.model.quantization.weights import (
    QuantizedWeights,
    Weights,
    as_tensor,
    dequantize,
    linear,
    quantize,
    quantize_weights,
)

for _format in (Int8(), Int4()):
    register(_format)

__all__ = [
    "GROUP",
    "Format",
    "QuantizedWeights",
    "Weights",
    "as_tensor",
    "dequantize",
    "find_format",
    "format_names",
    "linear",
    "quantize",
    "quantize_weights",
    "register",
]
