"""Decoding attention over the paged cache and the way into it, against their references."""

import pytest
import torch
from torch import Tensor

from ladimo.model.attention import paged as plain

pytest.importorskip("triton")
from ladimo.model.kernels import attention as kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # the interpreter's numpy, in unused lanes
]

BLOCK_SIZE, NUM_BLOCKS = 4, 40


def draw(
    batch: int, heads: int, kv_heads: int, head_dim: int, width: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """q, the two caches and a block table whose blocks are scattered; block 0 is the null block."""
    generator = torch.Generator().manual_seed(batch * heads + head_dim)
    cache = (torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, kv_heads, head_dim, generator=generator)).to(device, dtype)
    q = torch.randn(batch, heads, head_dim, generator=generator).to(device, dtype)
    table = torch.stack([torch.randperm(NUM_BLOCKS - 1, generator=generator)[:width] + 1 for _ in range(batch)])
    return [q, *cache.unbind(), table.to(device)]


SHAPES = [(4, 4, 16), (4, 2, 16), (7, 1, 20), (6, 3, 32), (32, 2, 8)]


@pytest.mark.parametrize("programs", [1, 1000], ids=["one part", "many parts"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_attend_decode(heads: int, kv_heads: int, head_dim: int, programs: int, device: torch.device) -> None:
    contexts = [1, 70, 33, 16]
    q, k, v, table = draw(len(contexts), heads, kv_heads, head_dim, 20, device, torch.float32)
    context_lens = torch.tensor(contexts, device=device)
    parts = kernels.num_parts(len(contexts), kv_heads, 80, programs, 16)
    assert parts == (1 if programs == 1 else 8)
    expected = plain.attend_decode(q, k, v, table, context_lens)
    out = kernels.attend_decode(q, k, v, table, context_lens, programs, 16)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("programs", [1, 1000], ids=["one part", "many parts"])
def test_padding_is_zero_and_nothing_beyond_the_context_is_read(programs: int, device: torch.device) -> None:
    """Rows of no context give zeros; places that nobody wrote hold what is not a number."""
    q, k, v, table = draw(3, 4, 2, 16, 9, device, torch.float32)
    context_lens = torch.tensor([0, 21, 0], device=device)
    table[0], table[2] = 0, 0
    expected = plain.attend_decode(q[1:2], k, v, table[1:2], context_lens[1:2])
    written = torch.zeros(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool, device=device)
    positions = torch.arange(21, device=device)
    written[table[1][positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE] = True
    for cache in (k, v):
        cache.flatten(0, 1)[~written] = torch.nan
    out = kernels.attend_decode(q, k, v, table, context_lens, programs, 16)
    torch.testing.assert_close(out[1:2], expected, rtol=0, atol=2e-6)
    assert (out[[0, 2]] == 0).all()


def test_half_precision(device: torch.device) -> None:
    q, k, v, table = draw(2, 4, 2, 16, 9, device, torch.float16)
    context_lens = torch.tensor([5, 36], device=device)
    expected = plain.attend_decode(q.float(), k.float(), v.float(), table, context_lens)
    out = kernels.attend_decode(q, k, v, table, context_lens)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("batch", "kv_heads", "max_context", "parts"),
    [(1, 32, 4096, 16), (1, 8, 4096, 64), (1, 8, 128, 2), (64, 32, 4096, 1), (4, 8, 4096, 16), (1, 3, 1000, 16)],
)
def test_number_of_parts(batch: int, kv_heads: int, max_context: int, parts: int) -> None:
    assert kernels.num_parts(batch, kv_heads, max_context) == parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rotated", [1.0, 0.5])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [*SHAPES, (20, 10, 12)])
def test_rotate_and_store(
    heads: int, kv_heads: int, head_dim: int, rotated: float, dtype: torch.dtype, device: torch.device
) -> None:
    """Bit for bit, in both types: products and sums are rounded where torch rounds them. Heads may be rotated in part."""
    generator = torch.Generator().manual_seed(heads)
    num_tokens = 5
    q, k, v = (
        torch.randn(num_tokens, count, head_dim, generator=generator).to(device, dtype) for count in (heads, kv_heads, kv_heads)
    )
    angles = torch.rand(num_tokens, int(rotated * head_dim) // 2, generator=generator).repeat(1, 2) * 6
    table = torch.stack((angles.cos(), angles.sin()), dim=1).to(device, dtype)
    rope = table[:, 0, None], table[:, 1, None]
    slots = torch.tensor([7, 0, 18, 19, 4], device=device)
    ours, theirs = (torch.zeros(2, 5, BLOCK_SIZE, kv_heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    expected = plain.rotate_and_store(q, k, v, rope, theirs[0], theirs[1], slots)
    assert torch.equal(kernels.rotate_and_store(q, k, v, rope, ours[0], ours[1], slots), expected)
    assert torch.equal(ours, theirs)
    assert ours.count_nonzero() > 0
    joined = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1).split([x[0].numel() for x in (q, k, v)], dim=1)
    q, k, v = (part.view(x.shape) for part, x in zip(joined, (q, k, v), strict=True))
    assert torch.equal(kernels.rotate_and_store(q, k, v, rope, ours[1], ours[0], slots), expected)
    assert torch.equal(ours[1], theirs[0])
