"""Kernels run on the GPU where there is one, else in Triton's interpreter (see `tests/__init__.py`).

In the interpreter bfloat16 arithmetic is wrong, so these tests are in fp32 and fp16; tests/gpu has bf16.
"""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
