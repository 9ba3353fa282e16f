"""Triton decides when first imported, by whichever library, whether kernels are interpreted: without a GPU they must be."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
