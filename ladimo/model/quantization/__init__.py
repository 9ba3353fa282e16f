"""Weights as small integers. Only weights are rounded, when a model is loaded. Each row has a scale per 32 columns, no offset.

The idea is that of FineQuant (arXiv 2308.09723): groups along the input dimension keep int4 usable without calibration data.

Why this does not use a library: torch has integer products (`_weight_int4pack_mm` and `_weight_int8pack_mm`, which torchao
calls), but only for dense layers, for int4 only in bf16, and for int8 only with one scale per row. None of them can read single
experts out of a stack, and without that a step does not get cheaper when it runs fewer experts. So our expert kernels unpack
the integers as they read them, and dense layers use the same format.
"""

from ladimo.model.precision import GROUP
from ladimo.model.quantization.formats import Format, find_format, format_names, register
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
