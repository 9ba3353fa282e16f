"""Nested weights on a GPU, in bf16 and at the sizes of a 7B model: parity, a token's numbers in any batch, capture, serving."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ladimo.checkpoint import load_model, load_to_serve, read_policies
from ladimo.model.backends.torch_backend import TorchBackend
from ladimo.model.nested.plane_layout import DownWeights, to_neuron_rows, to_words
from ladimo.model.nested.refinement import column_norms
from ladimo.model.nested.weights import NestedWeights
from ladimo.policy import LayerRule, RoutingPolicy
from ladimo.prefill.random_weights import random_planes
from server.engine.build import assemble_core
from server.engine.config import EngineConfig
from server.engine.request import GenerationRequest, SamplingParams, Trace
from tests.factories import PHI2, make_nested
from tests.server.engine.graphs import Driver, assert_idle, random_prompts

pytest.importorskip("triton")
from ladimo.model.kernels.nested import experts as nested_experts
from ladimo.model.kernels.nested import head as nested_head
from ladimo.model.kernels.nested import linear as nested_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

Tokens = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Layer = tuple[NestedWeights, DownWeights, Tensor, Tensor | None]

INF = float("inf")
HIDDEN, SIZE, WORDS = 4096, 11008, 32000
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EXACT = TorchBackend(CUDA, torch.float32)
# Bits and REFINE by kind of token.
KINDS = {"4": (4, INF), "8": (8, INF), "whole": (INF, INF), "refined": (4, 1.5), "padding": (0, 0)}
BATCHES = [1, 2, 8, 9, 16, 17, 32, 33, 200]


@pytest.fixture(autouse=True)
def exact_fp32() -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")


def matrices(*shape: int) -> NestedWeights:
    """Random weights, with planes apart from them."""
    high, low = random_planes(*shape, device=CUDA, scale=shape[-1] ** -0.5)
    full = (torch.randn(shape, device=CUDA) * shape[-1] ** -0.5).to(torch.bfloat16)
    return NestedWeights(full, to_words(high), to_words(low))


@pytest.fixture(scope="module")
def square() -> NestedWeights:
    return matrices(HIDDEN, HIDDEN)


def make_layer(gated: bool) -> Layer:
    """Gate and up, or up alone, down, the norms of the columns of down, and the bias of up."""
    gate_up, one = matrices(1, (2 if gated else 1) * SIZE, HIDDEN), matrices(1, HIDDEN, SIZE)
    down = DownWeights(one.full, one.high, one.low, to_neuron_rows(one.low))
    bias = None if gated else torch.randn(1, SIZE, device=CUDA).to(torch.bfloat16)
    return gate_up, down, column_norms(down.at(INF, torch.float32)), bias


@pytest.fixture(scope="module")
def layer() -> Layer:
    return make_layer(gated=True)


@pytest.fixture(scope="module")
def head() -> NestedWeights:
    return matrices(WORDS, HIDDEN)


def draw(kinds: list[str], seed: int = 0) -> Tokens:
    """Inputs [T, D], weights and ids [T, 1], bits and REFINE [T]."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(len(kinds), HIDDEN, device=CUDA, generator=generator).to(torch.bfloat16)
    bits, refine = torch.tensor([KINDS[kind] for kind in kinds], device=CUDA).unbind(dim=1)
    padding = (bits == 0).unsqueeze(1)
    return x, (~padding).float(), torch.where(padding, -1, 0), bits, refine


def mixed(num_tokens: int) -> list[str]:
    return [[*KINDS][token % len(KINDS)] for token in range(num_tokens)]


def in_fp32(weights: NestedWeights) -> NestedWeights:
    return replace(weights, full=weights.at(INF, torch.float32).float())


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within one and a half percent of four typical elements: roundings to bf16."""
    assert actual.isfinite().all()
    assert (actual.float() - expected).abs().max() <= 0.06 * expected.square().mean().sqrt()


def linear(x: Tensor, weights: NestedWeights, bits: Tensor) -> Tensor:
    return nested_linear.linear(x, weights, bits)


def run_layer(tokens: Tokens, layer: Layer) -> tuple[Tensor, Tensor]:
    return nested_experts.apply_nested(*tokens[:3], *layer[:3], tokens[3], tokens[4], layer[3])


def logits(tokens: Tokens, head: NestedWeights) -> tuple[Tensor, Tensor]:
    return nested_head.logits(tokens[0], head, tokens[3], tokens[4])


@torch.inference_mode()
@pytest.mark.parametrize("kinds", [["4"], ["8"], ["whole"], [*KINDS]], ids=["4", "8", "whole", "mixed"])
@pytest.mark.parametrize("num_tokens", BATCHES)
def test_linear(num_tokens: int, kinds: list[str], square: NestedWeights) -> None:
    x, _, _, bits, _ = draw((kinds * num_tokens)[:num_tokens])
    live = bits > 0
    expected = EXACT.nested_linear(x.float(), in_fp32(square), bits)
    assert_close(linear(x, square, bits)[live], expected[live])


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", BATCHES)
@pytest.mark.parametrize("gated", [True, False])
def test_experts(gated: bool, num_tokens: int) -> None:
    """A neuron close to the limit may be chosen by one and not by the other, so counts are compared in sum."""
    tokens, layer = draw(mixed(num_tokens)), make_layer(gated)
    out, counts = run_layer(tokens, layer)
    gate_up, down, norms, bias = layer
    exact = tokens[0].float(), *tokens[1:3], in_fp32(gate_up), in_fp32(down), norms, *tokens[3:]
    expected, expected_counts = EXACT.apply_nested(*exact, None if bias is None else bias.float())
    assert_close(out, expected)
    refining = (tokens[3] == 4) & (tokens[4] < INF)
    assert (counts[~refining] == 0).all()
    torch.testing.assert_close(counts.sum(dim=1).float(), expected_counts.sum(dim=1).float(), rtol=0.01, atol=5)


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", BATCHES)
def test_head(num_rows: int, head: NestedWeights) -> None:
    tokens = draw(mixed(num_rows))
    x, _, _, bits, refine = tokens
    out, counts = logits(tokens, head)
    expected, expected_counts = EXACT.nested_logits(x.float(), in_fp32(head), bits, refine)
    live = bits > 0
    # A word close to the limit may be refined by one and not by the other.
    at_4 = EXACT.nested_linear(x.float(), in_fp32(head), torch.full_like(bits, 4))
    limit = at_4.amax(dim=1, keepdim=True) - refine[:, None]
    close = ((bits == 4) & (refine < INF))[:, None] & ((at_4 - limit).abs() < 0.05)
    assert close.float().mean() < 0.01
    assert_close(torch.where(close, expected, out.float())[live], expected[live])
    torch.testing.assert_close(counts[live].sum(dim=1), expected_counts[live].sum(dim=1), rtol=0.01, atol=5)


@torch.inference_mode()
def test_a_token_has_the_same_numbers_in_every_decode_batch(square: NestedWeights, layer: Layer, head: NestedWeights) -> None:
    """Bit for bit: among any others in batches of up to 8, and in those of 9 to 32."""
    for kind, sizes in itertools.product(("4", "8", "whole", "refined"), ((1, 5, 8), (9, 16, 32))):
        first = draw([kind])[0][0]
        expected: list[Tensor] = []
        for size in sizes:
            tokens = draw([kind, *mixed(size - 1)], seed=size)
            tokens[0][0] = first
            out = [one[0] for one in (linear(tokens[0], square, tokens[3]), *run_layer(tokens, layer), *logits(tokens, head))]
            expected = expected or out
            assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True)), (kind, size)


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", [1, 8, 32])
def test_capture_and_replay(num_tokens: int, square: NestedWeights, layer: Layer, head: NestedWeights) -> None:
    """A captured step follows its inputs: other bits, among them padding alone, replay the same graph."""
    tokens = draw(["whole"] * num_tokens)

    def run() -> list[Tensor]:
        return [linear(tokens[0], square, tokens[3]), *run_layer(tokens, layer), *logits(tokens, head)]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed, kinds in enumerate((["4"], ["8"], ["refined"], [*KINDS], ["padding"])):
        for old, new in zip(tokens, draw((kinds * num_tokens)[:num_tokens], seed), strict=True):
            old.copy_(new)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, run(), strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("fields", [{}, PHI2], ids=["gate", "no gate"])
def test_nested_checkpoints_are_served_from_graphs(fields: dict[str, Any], tmp_path: Path) -> None:
    """As the server loads them: replayed steps write what steps without graphs do, and what torch does on a CPU."""
    directory = make_nested(tmp_path, num_experts=1, **fields)
    config = EngineConfig(device="cuda", max_num_seqs=8, max_step_tokens=4096, max_policies=12, max_model_len=256)
    policies = [*read_policies(directory, load_model(directory, torch.float32, torch.device("cpu")).config).values()]
    rule = LayerRule(1, renormalize=False, bits=4, attention_bits=4, refine=1.0)
    policies.append(RoutingPolicy("refined", "", (rule,) * len(policies[0].layers), 4, 2.0))
    sampling = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    asked = [
        GenerationRequest(
            f"r{index}", tuple(prompt), sampling, policies[index % len(policies)], trace=(None, Trace.OUTPUT)[index % 2]
        )
        for index, prompt in enumerate(random_prompts(6))
    ]
    answers, traces = [], []
    for device, graphs in (("cuda", False), ("cuda", True), ("cpu", False)):
        model = load_to_serve(directory, device, "float32") if device == "cuda" else load_model(directory, torch.float32, CPU)
        driver = Driver(assemble_core(model, replace(config, device=device, cuda_graphs=graphs)))
        driver.submit(*asked)
        answers.append(driver.run())
        traces.append(
            {one.request_id: [each.trace for each in driver.events if each.request_id == one.request_id] for one in asked}
        )
        assert_idle(driver.core)
    assert answers[0] == answers[1] == answers[2]
    assert traces[0] == traces[1]  # rounding may move a neuron over the threshold on a CPU
