"""The elementwise kernels against their references."""

import pytest
import torch

from ladimo.model import norm_activation as plain

pytest.importorskip("triton")
from ladimo.model.kernels import norm_activation as kernels

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}  # one unit in the last place, where the sums differ in order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 32), (5, 100), (3, 1024), (2, 3, 48)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    x, residual = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator).to(device, dtype)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        kernels.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5), rtol=tolerance, atol=tolerance
    )
    out, total = kernels.add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = plain.add_rms_norm(x, residual, weight, 1e-5)
    assert out.dtype == dtype
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8), (3, 1100), (2, 2, 33)])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(shape, generator=generator).to(device, dtype) * 3 for _ in range(2))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(kernels.silu_mul(gate, up), plain.silu_mul(gate, up), rtol=tolerance, atol=tolerance)
