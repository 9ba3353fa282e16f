"""The three ways to run experts agree, and an exact split of an FFN sums to the FFN."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ladimo.checkpoint import load_model
from ladimo.model.config import MoeLayerConfig
from ladimo.model.experts import (
    MAX_GATHERED,
    apply_experts,
    apply_experts_gathered,
    apply_experts_grouped,
    apply_experts_masked,
)
from ladimo.model.inputs import StepInputs
from ladimo.model.layers import GatedMLP
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import VOCAB_SIZE, make_moe, split_ffn
from tests.ladimo.stepping import make_tables

EXPERTS, HIDDEN, INTERMEDIATE = 4, 32, 24
IMPLEMENTATIONS: list[Callable[..., Tensor]] = [
    apply_experts_grouped,
    apply_experts_gathered,
    apply_experts_masked,
]


def draw(num_tokens: int, case: str = "mixed") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of `apply_experts`; `case` says what the ids look like."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_states = torch.randn(num_tokens, HIDDEN, generator=generator)
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / 6
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / 5
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(dim=-1)
    if case == "mixed":
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, -1)
    elif case == "none":
        ids = torch.full_like(ids, -1)
    elif case == "one_expert":
        ids = torch.full_like(ids, -1)
        ids[:, 0] = 2
    weights = torch.rand(ids.shape, generator=generator) * (ids >= 0)
    return hidden_states, weights, ids, gate_up, down


def direct(hidden_states: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Token by token, expert by expert, in double precision."""
    out = torch.zeros_like(hidden_states, dtype=torch.float64)
    for token, places in enumerate(ids.tolist()):
        for place, expert in enumerate(places):
            if expert >= 0:
                gate, up = (gate_up[expert].double() @ hidden_states[token].double()).chunk(2)
                result = down[expert].double() @ (gate * gate.sigmoid() * up)
                out[token] += weights[token, place].double() * result
    return out


@pytest.mark.parametrize("case", ["all", "mixed", "none", "one_expert"])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 64])
def test_implementations_agree(num_tokens: int, case: str) -> None:
    arguments = draw(num_tokens, case)
    expected = direct(*arguments).float()
    assert (expected != 0).any() == (case != "none")
    for implementation in IMPLEMENTATIONS:
        torch.testing.assert_close(implementation(*arguments), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["all", "mixed", "none"])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_experts_without_a_gate(num_tokens: int, case: str) -> None:
    """A bias of neurons does not count where their expert does not run."""
    hidden_states, weights, ids, both, down = draw(num_tokens, case)
    up, bias = both[:, :INTERMEDIATE], torch.randn(EXPERTS, INTERMEDIATE, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros_like(hidden_states)
    for token, places in enumerate(ids.tolist()):
        for place, expert in enumerate(places):
            if expert >= 0:
                x = up[expert] @ hidden_states[token] + bias[expert]
                gelu = x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
                expected[token] += weights[token, place] * (down[expert] @ gelu)
    assert (expected != 0).any() == (case != "none")
    for implementation in (*IMPLEMENTATIONS, apply_experts):
        torch.testing.assert_close(implementation(hidden_states, weights, ids, up, down, bias), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [*range(1, 17), 31, 33, 48, 63])
def test_implementations_agree_at_any_size(num_tokens: int) -> None:
    arguments = draw(num_tokens)
    outputs = [implementation(*arguments) for implementation in IMPLEMENTATIONS]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=0, atol=1e-5)


def test_cpu_runs_grouped_and_a_device_does_not() -> None:
    """On the meta device, as on any without kernels, the path without host synchronisation is taken, whatever the size."""
    assert torch.equal(apply_experts(*draw(9)), apply_experts_grouped(*draw(9)))
    for num_tokens in (1, MAX_GATHERED // EXPERTS, 64):
        on_meta = [argument.to("meta") for argument in draw(num_tokens)]
        assert apply_experts(*on_meta).shape == (num_tokens, HIDDEN)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_tokens", [2, 8, 40])
def test_a_token_is_the_same_alone_and_among_others(
    implementation: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor], num_tokens: int
) -> None:
    hidden_states, weights, ids, gate_up, down = draw(num_tokens)
    together = implementation(hidden_states, weights, ids, gate_up, down)
    for token in range(num_tokens):
        row = slice(token, token + 1)
        alone = implementation(hidden_states[row], weights[row], ids[row], gate_up, down)
        torch.testing.assert_close(together[row], alone, rtol=1e-6, atol=1e-6)


def test_grouped_gradients_are_those_of_the_reference() -> None:
    """Distillation trains through the grouped path: hidden states, weights and both stacks get exact gradients."""
    hidden_states, weights, ids, gate_up, down = draw(17)
    gradients = []
    for implementation in (apply_experts_grouped, apply_experts_masked):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden_states, weights, gate_up, down)]
        implementation(inputs[0], inputs[1], ids, inputs[2], inputs[3]).square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    for name, ours, theirs in zip(("hidden", "weights", "gate_up", "down"), *gradients, strict=True):
        assert ours is not None and theirs is not None
        assert ours.abs().max() > 0, name
        if name == "weights":  # a dropped place has no gradient to compare
            ours, theirs = ours * (ids >= 0), theirs * (ids >= 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_split_exactness() -> None:
    """Experts that partition an FFN, all on with weight one, are the FFN."""
    torch.manual_seed(0)
    mlp = GatedMLP(HIDDEN, EXPERTS * INTERMEDIATE)
    layer = ExpertLayer(HIDDEN, MoeLayerConfig(EXPERTS, EXPERTS, INTERMEDIATE, expert_weight="one"))
    gate_up, down = split_ffn(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, EXPERTS)
    layer.load_state_dict({"gate.weight": layer.gate.weight, "experts.gate_up_proj": gate_up, "experts.down_proj": down})
    rows, allowed = RoutingPolicy("p", "", (LayerRule(EXPERTS, renormalize=False),)).to_rows(EXPERTS)
    hidden_states = torch.randn(50, HIDDEN)
    with torch.no_grad():
        out, ids, _ = layer(hidden_states, torch.tensor(rows[0]).expand(50, -1), torch.tensor(allowed).expand(50, EXPERTS))
        assert (ids >= 0).all()
        torch.testing.assert_close(out, mlp(hidden_states), rtol=0, atol=1e-5)


@torch.no_grad()
def test_split_model_is_the_dense_model(dense_dir: Path, tmp_path: Path) -> None:
    """The same through whole checkpoints: every expert with weight one gives the dense source's logits."""
    moe_dir = make_moe(tmp_path, dense=dense_dir, top_k=4, dense_layers=(), layer={"expert_weight": "one"})
    dense, moe = (load_model(path, torch.float32, torch.device("cpu")) for path in (dense_dir, moe_dir))
    every = RoutingPolicy("every", "", (LayerRule(4, renormalize=False),) * 3)
    three = RoutingPolicy("three", "", (LayerRule(3, renormalize=False),) * 3)
    ids = torch.randint(VOCAB_SIZE, (2, 30), generator=torch.Generator().manual_seed(0))
    tables = make_tables(moe, [every, three])
    expected = dense(StepInputs.whole_sequences(ids, policy_id=0), None, make_tables(dense, [])).logits
    torch.testing.assert_close(moe(StepInputs.whole_sequences(ids, 1), None, tables).logits, expected, rtol=0, atol=1e-4)
    assert (moe(StepInputs.whole_sequences(ids, 2), None, tables).logits - expected).abs().max() > 1e-2
