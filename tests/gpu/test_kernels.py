"""The kernels on a GPU, in bf16 and at the sizes of a 7B model: parity with the plain modules, determinism, capture."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ladimo.checkpoint import load_model, read_policies
from ladimo.model.backends.choose import on_device
from ladimo.model.backends.torch_backend import TorchBackend
from ladimo.model.config import MoeLayerConfig
from ladimo.model.experts import apply_experts_masked
from ladimo.model.inputs import RoutingTables, StepInputs
from ladimo.model.quantization import QuantizedWeights, quantize_weights
from ladimo.model.quantization.layers import quantize_model
from ladimo.model.rule import RuleNumber
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import rule_row

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda")
KERNELS, PLAIN = on_device(CUDA, torch.bfloat16), TorchBackend(CUDA, torch.bfloat16)

EXPERTS, HIDDEN, INTERMEDIATE = 8, 4096, 1376
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def weights() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    gate_up = normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5)
    return gate_up, normal(EXPERTS, HIDDEN, INTERMEDIATE, scale=INTERMEDIATE**-0.5)


def draw(num_tokens: int, top_k: int, weights: tuple[Tensor, Tensor], padding: int = 0) -> Arguments:
    ids = torch.rand(num_tokens, EXPERTS, device="cuda").argsort(dim=-1)
    ids[:, top_k:] = -1
    ids[num_tokens - padding :] = -1
    scores = torch.rand(num_tokens, EXPERTS, device="cuda") * (ids >= 0)
    return normal(num_tokens, HIDDEN), scores, ids, *weights


def exact(arguments: Arguments) -> Tensor:
    """In double precision, expert by expert."""
    x, scores, ids, gate_up, down = arguments
    out = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for expert in range(EXPERTS):
        gate, up = (x.double() @ gate_up[expert].double().t()).chunk(2, dim=-1)
        weight = (scores * (ids == expert)).sum(dim=-1, keepdim=True).double()
        out += weight * ((torch.nn.functional.silu(gate) * up) @ down[expert].double().t())
    return out


def assert_bf16_close(actual: Tensor, expected: Tensor) -> None:
    """Within one and a half percent of the typical size of an element: three roundings to bf16."""
    assert actual.isfinite().all()
    error = (actual.double() - expected.double()).abs().max()
    assert error <= 0.015 * max(expected.double().square().mean().sqrt().item() * 4, 1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16, 17, 32, 64, 256, 511, 512, 1000])
def test_experts(num_tokens: int, top_k: int, weights: tuple[Tensor, Tensor]) -> None:
    """On both sides of every change of tiles, with padded rows at the end."""
    arguments = draw(num_tokens, top_k, weights, padding=num_tokens // 5)
    out = KERNELS.apply_experts(*arguments)
    assert_bf16_close(out, exact(arguments))
    assert (out[num_tokens - num_tokens // 5 :] == 0).all()


@pytest.mark.parametrize("num_tokens", [5000])
def test_experts_of_a_long_prompt(num_tokens: int, weights: tuple[Tensor, Tensor]) -> None:
    """Longer than one cut, tokens that take every expert among others."""
    arguments = draw(num_tokens, 2, weights)
    arguments[2][::3] = torch.arange(EXPERTS, device="cuda")
    arguments[1][::3] = 1
    assert_bf16_close(KERNELS.apply_experts(*arguments), exact(arguments))


@pytest.mark.parametrize("sizes", [(7, 96, 40, 5), (300, 200, 72, 3), (9, 288, 96, 16), (64, 2048, 704, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_experts_of_awkward_sizes(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    num_tokens, hidden, size, num_experts = sizes
    ids = torch.rand(num_tokens, num_experts, device="cuda").argsort(dim=-1)
    ids = ids.masked_fill(torch.rand(ids.shape, device="cuda") < 0.5, -1)
    scores = torch.rand(ids.shape, device="cuda") * (ids >= 0)
    x, gate_up = normal(num_tokens, hidden, dtype=dtype), normal(num_experts, 2 * size, hidden, scale=0.1, dtype=dtype)
    down = normal(num_experts, hidden, size, scale=0.1, dtype=dtype)
    out = KERNELS.apply_experts(x, scores, ids, gate_up, down)
    expected = apply_experts_masked(x.double(), scores.double(), ids, gate_up.double(), down.double())
    typical = expected.square().mean().sqrt().item()
    tolerance = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance * typical)


@pytest.mark.parametrize("num_tokens", [1, 5, 32, 64, 600])
def test_same_numbers_every_time_and_whatever_the_neighbours(num_tokens: int, weights: tuple[Tensor, Tensor]) -> None:
    first, second = draw(num_tokens, 2, weights), draw(num_tokens, 5, weights)
    for a, b in zip(first[:3], second[:3], strict=True):
        b[0] = a[0]
    out = KERNELS.apply_experts(*first)
    assert all(torch.equal(KERNELS.apply_experts(*first), out) for _ in range(3))
    assert torch.equal(KERNELS.apply_experts(*second)[0], out[0])


@pytest.fixture(scope="module", params=["int8", "int4"])
def integers(request: pytest.FixtureRequest, weights: tuple[Tensor, Tensor]) -> tuple[QuantizedWeights, QuantizedWeights]:
    gate_up, down = weights
    return quantize_weights(gate_up, request.param), quantize_weights(down, request.param)


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 32, 64, 511, 512, 1000])
def test_experts_of_integers(num_tokens: int, top_k: int, integers: tuple[QuantizedWeights, QuantizedWeights]) -> None:
    """Against what the integers stand for: the same arithmetic as with weights as they are."""
    whole = integers[0].to_dtype(torch.float32), integers[1].to_dtype(torch.float32)
    x, scores, ids, gate_up, down = draw(num_tokens, top_k, whole, padding=num_tokens // 5)
    out = KERNELS.apply_experts(x, scores, ids, *integers)
    assert_bf16_close(out, exact((x, scores, ids, gate_up, down)))
    assert (out[num_tokens - num_tokens // 5 :] == 0).all()
    assert torch.equal(KERNELS.apply_experts(x, scores, ids, *integers), out)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("sizes", [(7, 96, 40, 5), (1, 200, 72, 3), (64, 2048, 704, 64)])
def test_integers_of_awkward_sizes(sizes: tuple[int, int, int, int], format: str) -> None:
    num_tokens, hidden, size, num_experts = sizes
    ids = torch.rand(num_tokens, num_experts, device="cuda").argsort(dim=-1)
    ids[:, 1::2] = -1
    scores = torch.rand(ids.shape, device="cuda") * (ids >= 0)
    x = normal(num_tokens, hidden, dtype=torch.float32)
    gate_up, down = (
        quantize_weights(normal(num_experts, *shape, scale=0.1), format) for shape in ((2 * size, hidden), (hidden, size))
    )
    whole = (one.to_dtype(torch.float64) for one in (gate_up, down))
    expected = apply_experts_masked(x.double(), scores.double(), ids, *whole)
    typical = expected.square().mean().sqrt().item()
    out = KERNELS.apply_experts(x, scores, ids, gate_up, down)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4 * typical)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(4096, 4096), (4096, 11008), (513, 3600)])
@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 33, 255, 256, 1000])
def test_linear_of_integers(num_rows: int, num_outputs: int, num_inputs: int, format: str) -> None:
    weights = quantize_weights(normal(num_outputs, num_inputs, scale=num_inputs**-0.5), format)
    x, bias = normal(num_rows, num_inputs), normal(num_outputs)
    expected = x.double() @ weights.to_dtype(torch.float64).t() + bias.double()
    assert_bf16_close(KERNELS.linear(x, weights, bias), expected)


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(4096, 4096), (12288, 4096), (4096, 11008), (8, 4096), (513, 3600)])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_linear(num_rows: int, num_outputs: int, num_inputs: int) -> None:
    weights = normal(num_outputs, num_inputs, scale=num_inputs**-0.5)
    x, bias = normal(num_rows, num_inputs), normal(num_outputs)
    assert_bf16_close(KERNELS.linear(x, weights, bias), x.double() @ weights.double().t() + bias.double())


@torch.inference_mode()
def test_kernels_that_start_early_see_what_was_written_before_them() -> None:
    """A long chain in which each product reads the last one's output and writes where the one before has read: replayed many
    times, with the numbers of the same products one by one."""
    weights = [normal(HIDDEN, HIDDEN, scale=HIDDEN**-0.5) for _ in range(8)]
    norm, start = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda"), normal(1, HIDDEN)

    def run(wait: bool) -> Tensor:
        x = start
        for weight in weights * 4:
            x = KERNELS.rms_norm(KERNELS.linear(x, weight), norm, 1e-5)
            if wait:
                torch.cuda.synchronize()
        return x

    expected = run(wait=True)
    assert torch.equal(run(wait=False), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(wait=False)
    for _ in range(50):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", [1, 64])
def test_capture_and_replay_of_integers(num_tokens: int, integers: tuple[QuantizedWeights, QuantizedWeights]) -> None:
    """Both kinds of layer, one after the other, as a captured step has them."""
    whole = integers[0].to_dtype(torch.bfloat16), integers[1].to_dtype(torch.bfloat16)
    inputs = draw(num_tokens, 2, whole)[:3]
    dense = quantize_weights(normal(HIDDEN, HIDDEN, scale=HIDDEN**-0.5), "int4")
    run: Callable[[], Tensor] = lambda: KERNELS.linear(KERNELS.apply_experts(*inputs, *integers), dense)  # noqa: E731
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for top_k in (8, 1, 0):
        for old, new in zip(inputs, draw(num_tokens, top_k, whole)[:3], strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(out, run())


@pytest.mark.parametrize("seed", range(8))
def test_routing(seed: int) -> None:
    torch.manual_seed(seed)
    num_experts, num_tokens = (8, 5, 64, 200)[seed % 4], (1, 64, 300, 33)[seed % 4]
    softmax, one = bool(seed & 1), bool(seed & 2)
    layer = MoeLayerConfig(
        num_experts,
        2,
        8,
        score_function="softmax" if softmax else "sigmoid",
        score_norm_top_k=2 if seed & 4 else None,
        expert_weight="one" if one else "score",
    )
    rules = [
        LayerRule(2),
        LayerRule(num_experts, renormalize=False),
        LayerRule(2, mass=0.6),
        LayerRule(4, floor=0.1, experts=(0, 2, 4)),
        LayerRule(4, relative_floor=0.4),
    ]
    tables = RoutingTables.empty(len(rules) + 1, 1, num_experts, "cuda")
    for row, rule in enumerate(rules):
        tables.write(row + 1, *RoutingPolicy("p", "", (rule,)).to_rows(num_experts))
    policy_ids = torch.randint(len(rules) + 1, (num_tokens,), device="cuda")
    rows, allowed = (table[:, 0] for table in tables.rules(policy_ids))
    logits = torch.randn(num_tokens, num_experts, device="cuda") * 3
    bias = torch.randn(num_experts, device="cuda")
    scores, ids = KERNELS.select_experts(logits, rows, allowed, layer, bias)
    KERNELS.record(tables, ids[None], policy_ids)
    counted = [tables.expert_tokens.clone(), tables.distinct_experts.clone()]
    tables.expert_tokens.zero_()
    tables.distinct_experts.zero_()
    expected_scores, expected_ids = PLAIN.select_experts(logits, rows, allowed, layer, bias)
    PLAIN.record(tables, expected_ids[None], policy_ids)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-6)
    assert torch.equal(counted[0], tables.expert_tokens)
    assert torch.equal(counted[1], tables.distinct_experts)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 8), (32, 8), (512, 8), (64, 60)])
def test_apply_batch_budget(num_tokens: int, num_experts: int) -> None:
    rows = rule_row(LayerRule(2, batch_experts=3)).repeat(num_tokens, 1).cuda()
    rows[::5, RuleNumber.BATCH_EXPERTS] = torch.inf
    ids = torch.rand(num_tokens, num_experts, device="cuda").argsort(dim=-1)
    ids[:, 2:] = -1
    ids[::5] = -1
    scores = torch.randint(1, 9, ids.shape, device="cuda") / 8 * (ids >= 0)  # sums are exact in any order
    allowed = torch.rand(ids.shape, device="cuda") < 0.8
    shared = KERNELS.apply_batch_budget(scores, ids, rows, allowed, num_tokens - 1)
    assert torch.equal(shared, PLAIN.apply_batch_budget(scores, ids, rows, allowed, num_tokens - 1))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 32, 128), (32, 8, 128), (28, 4, 128), (9, 3, 64), (6, 6, 80)])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_attention(batch: int, heads: int, kv_heads: int, head_dim: int) -> None:
    block_size, width = 16, 70
    k, v = normal(2, batch * width + 1, block_size, kv_heads, head_dim)
    table = (torch.randperm(batch * width, device="cuda") + 1).view(batch, width)
    context_lens = torch.randint(1, width * block_size + 1, (batch,), device="cuda")
    context_lens[-1] = 1
    q = normal(batch, heads, head_dim)
    out = KERNELS.attend_decode(q, k, v, table, context_lens)
    expected = PLAIN.attend_decode(q.float(), k.float(), v.float(), table, context_lens)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.01)
    assert torch.equal(out, KERNELS.attend_decode(q, k, v, table, context_lens))
    assert (KERNELS.attend_decode(q, k, v, table, torch.zeros_like(context_lens)) == 0).all()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 32, 128), (32, 8, 128), (9, 3, 64)])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_elementwise_kernels_round_as_torch_does(num_tokens: int, heads: int, kv_heads: int, head_dim: int) -> None:
    hidden = heads * head_dim
    x, residual, weight = normal(num_tokens, hidden), normal(num_tokens, hidden), normal(hidden)
    q, k, v = (normal(num_tokens, count, head_dim) for count in (heads, kv_heads, kv_heads))
    angles = torch.rand(num_tokens, head_dim // 2, device="cuda").repeat(1, 2) * 6
    rope = angles.cos().to(torch.bfloat16)[:, None], angles.sin().to(torch.bfloat16)[:, None]
    slots = torch.randperm(400, device="cuda")[:num_tokens]
    ours, theirs = (torch.zeros(2, 25, 16, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def run(backend: TorchBackend, cache: Tensor) -> list[Tensor]:
        normed, total = backend.add_rms_norm(x, residual, weight, 1e-5)
        rotated = backend.rotate_and_store(q, k, v, rope, cache[0], cache[1], slots)
        return [total, rotated, cache, normed, backend.silu_mul(x, residual)]

    results, expected = run(KERNELS, ours), run(PLAIN, theirs)
    assert all(torch.equal(a, b) for a, b in zip(results[:3], expected[:3], strict=True))
    for a, b in zip(results[3:], expected[3:], strict=True):  # sums in another order, another exponential: a last place
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


def on_gpu(model_dir: Path) -> tuple[MoeTransformer, RoutingTables, list[str]]:
    model = load_model(model_dir, torch.float32, torch.device("cuda"))
    policies = read_policies(model_dir, model.config)
    tables = RoutingTables.empty(len(policies) + 1, model.config.num_hidden_layers, model.config.max_num_experts, "cuda")
    for row, policy in enumerate(policies.values()):
        tables.write(row + 1, *policy.to_rows(model.config.max_num_experts))
    return model, tables, list(policies)


@torch.inference_mode()
@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_a_model_on_kernels_is_the_model(moe_dir: Path, format: str | None) -> None:
    model, tables, names = on_gpu(moe_dir)
    if format is not None:
        quantize_model(model, format)
    ids = torch.randint(256, (2, 20), device="cuda")
    for policy in range(1, len(names) + 1):
        inputs = StepInputs.whole_sequences(ids, policy)
        KERNELS.prepare(model)
        out = model(inputs, None, tables)
        PLAIN.prepare(model)
        expected = model(inputs, None, tables)
        torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=2e-3)
        assert torch.equal(out.expert_ids, expected.expert_ids)


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", [1, 5, 64, 512])
def test_capture_and_replay(num_tokens: int, weights: tuple[Tensor, Tensor]) -> None:
    """A captured call follows its inputs: other ids, among them none at all, replay the same graph."""
    arguments = draw(num_tokens, 2, weights)
    run: Callable[[], Tensor] = lambda: KERNELS.apply_experts(*arguments)  # noqa: E731
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for top_k in (2, 8, 1, 0):
        for old, new in zip(arguments[:3], draw(num_tokens, top_k, weights)[:3], strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(out, run())
