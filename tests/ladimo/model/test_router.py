"""Routers of every kind: what they compute, what they cost, and their way through checkpoints and transformers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import TensorReader, load_model, read_config, read_json, write_json
from ladimo.model.config import MoeLayerConfig
from ladimo.model.inputs import StepInputs
from ladimo.model.moe import ExpertLayer
from ladimo.model.router import FixedOrder, GluRouter, LinearRouter, MlpRouter, TableRouter, make_router
from ladimo.model.routing import select_experts
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import VOCAB_SIZE, make_moe
from tests.ladimo.stepping import make_tables

IDS = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(5))
KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"router": "mlp", "router_hidden_size": 6, "score_function": "sigmoid", "expert_weight": "one"},
    "table": {"router": "table", "router_hidden_size": 5, "score_function": "sigmoid", "expert_weight": "one"},
    "glu": {"router": "glu", "selection_bias": True, "expert_weight": "one"},
    "none": {"router": "none", "expert_weight": "one"},
    "substitutes": {"substitutes": 1, "selection_bias": True, "score_function": "sigmoid"},
    "fixed": {"fixed_experts": 2, "score_function": "sigmoid"},
}


@torch.no_grad()
def test_what_routers_compute() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 16)
    linear, mlp, glu, none = (
        make_router(16, MoeLayerConfig(5, 2, 8, router=kind, router_hidden_size=3 if kind == "mlp" else None))
        for kind in ("linear", "mlp", "glu", "none")
    )
    assert isinstance(linear, LinearRouter) and isinstance(mlp, MlpRouter) and isinstance(glu, GluRouter)
    torch.testing.assert_close(linear(x), x @ linear.weight.t())
    torch.testing.assert_close(mlp(x), torch.tanh(x @ mlp.fc1.weight.t()) @ mlp.fc2.weight.t())
    gate, up = x @ glu.gate_proj.weight.t(), x @ glu.up_proj.weight.t()
    torch.testing.assert_close(glu(x), (F.silu(gate) * up).abs())
    assert isinstance(none, FixedOrder)
    assert not list(none.parameters())
    assert (none(x).diff(dim=1) < 0).all()


@torch.no_grad()
def test_a_choice_ranks_the_experts() -> None:
    """A token runs the best experts of its choice, as many as the rule says."""
    torch.manual_seed(0)
    config = MoeLayerConfig(6, 6, 4, router="table", router_hidden_size=3, score_function="sigmoid", expert_weight="one")
    layer, x = ExpertLayer(8, config), torch.randn(30, 8)
    assert isinstance(layer.gate, TableRouter)
    ranks = torch.stack([torch.randperm(6) for _ in range(3)], dim=1)
    layer.gate.fc2.weight.copy_(-0.25 * ranks)
    choice = (x @ layer.gate.fc1.weight.t()).argmax(dim=1)
    assert len(choice.unique()) == 3
    for width in (1, 3, 6):
        rows, allowed = RoutingPolicy("p", "", (LayerRule(width, renormalize=False),)).to_rows(6)
        _, ids, _ = layer(x, torch.tensor(rows[0]).expand(30, -1), torch.tensor(allowed).expand(30, 6))
        assert torch.equal(ids[:, :width], ranks.argsort(dim=0).t()[choice][:, :width])
        assert (ids[:, width:] == -1).all()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_without_a_router_experts_come_by_number(score_function: Any) -> None:
    """Also among very many, in half precision, and among those that a policy allows."""
    layer = ExpertLayer(
        8, MoeLayerConfig(200, 3, 2, router="none", expert_weight="one", score_function=score_function)
    ).bfloat16()
    for rule, expected in [
        (LayerRule(3), [0, 1, 2]),
        (LayerRule(3, experts=(7, 50, 198, 199)), [7, 50, 198]),
        (LayerRule(200), list(range(200))),
    ]:
        rows, allowed = RoutingPolicy("p", "", (rule,)).to_rows(200)
        _, ids, _ = layer(
            torch.randn(4, 8).bfloat16(), torch.tensor(rows[0]).expand(4, -1), torch.tensor(allowed).expand(4, 200)
        )
        assert ids[:, : len(expected)].tolist() == [expected] * 4
        assert (ids[:, len(expected) :] == -1).all()


@torch.no_grad()
def test_selection_bias_orders_and_does_not_score() -> None:
    torch.manual_seed(0)
    config = MoeLayerConfig(4, 2, 6, selection_bias=True, score_function="sigmoid")
    layer, plain = ExpertLayer(8, config), ExpertLayer(8, MoeLayerConfig(4, 2, 6, score_function="sigmoid"))
    layer.experts.down_proj.normal_()
    layer.experts.gate_up_proj.normal_()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "bias" not in name})
    assert layer.gate.e_score_correction_bias is not None
    layer.gate.e_score_correction_bias[3] = 2.0  # above any score: always first
    rows, allowed = RoutingPolicy("p", "", (LayerRule(1, renormalize=False),)).to_rows(4)
    x, row = torch.randn(50, 8), torch.tensor(rows[0]).expand(50, -1)
    out, ids, _ = layer(x, row, torch.tensor(allowed).expand(50, -1))
    assert (ids[:, 0] == 3).all()
    only = torch.tensor([[False, False, False, True]]).expand(50, -1)
    torch.testing.assert_close(out, plain(x, row, only)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_fixed_experts_count_with_one_and_only_the_others_are_scored(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = MoeLayerConfig(7, 3, 6, score_function="sigmoid", substitutes=4, fixed_experts=3)
    layer = ExpertLayer(8, config)
    for weight in layer.experts.parameters():
        weight.normal_()
    layer, x = layer.to(dtype), torch.randn(40, 8).to(dtype)
    gate = layer.gate.get_parameter("weight")
    assert gate.shape == (4, 8)
    assert config.router_parameters(8) == 32

    def run(rule: LayerRule) -> tuple[torch.Tensor, torch.Tensor]:
        rows, allowed = RoutingPolicy("p", "", (rule,)).to_rows(7)
        router_logits = layer.gate(x)
        return select_experts(router_logits, torch.tensor(rows[0]).expand(40, -1), torch.tensor(allowed).expand(40, 7), config)

    full = LayerRule.full(config)
    assert full == LayerRule(3, renormalize=False, experts=(0, 1, 2))
    weights, ids = run(full)
    assert ids.tolist() == [[0, 1, 2, -1, -1, -1, -1]] * 40
    assert weights.tolist() == [[1.0] * 3 + [0.0] * 4] * 40  # exactly
    weights, ids = run(LayerRule(2, experts=(3, 4, 5, 6)))
    best = (x @ gate.t()).topk(2, dim=1)
    assert torch.equal(ids[:, :2], 3 + best.indices) and (ids[:, 2:] == -1).all()
    scores = best.values.float().sigmoid()
    torch.testing.assert_close(weights[:, :2], scores / scores.sum(dim=1, keepdim=True), rtol=1e-2, atol=1e-2)
    assert len(ids[:, 0].unique()) > 1


def test_full_never_runs_substitutes() -> None:
    assert LayerRule.full(MoeLayerConfig(4, 2, 8)) == LayerRule(2)
    assert LayerRule.full(MoeLayerConfig(4, 2, 8, expert_weight="one")) == LayerRule(2, renormalize=False)
    layer = MoeLayerConfig(6, 4, 8, expert_weight="one", substitutes=2)
    assert LayerRule.full(layer) == LayerRule(4, renormalize=False, experts=(0, 1, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_checkpoints_of_every_kind(tmp_path: Path, kind: str) -> None:
    """Our reader and transformers' agree under `full`; the config counts what is stored; a bias stays fp32 in a bf16 model."""
    directory = make_moe(tmp_path, layer=KINDS[kind])
    model = load_model(directory, torch.float32, torch.device("cpu"))
    full = tuple(None if layer is None else LayerRule.full(layer) for layer in model.config.layers)
    tables = make_tables(model, [RoutingPolicy("full", "", full)])
    expected = model(StepInputs.whole_sequences(IDS), None, tables).logits.view(*IDS.shape, -1)
    theirs, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (theirs(IDS).logits - expected).abs().max() < 1e-4

    reader, config = TensorReader(directory), read_config(directory)
    stored = [name for name in reader.files if "embed_tokens" not in name and "lm_head" not in name]
    total = sum(math.prod(reader.shape(name)) for name in stored)
    assert config.active_parameters_ratio((4.0, None, 4.0)) == pytest.approx(total / config.dense_parameters)

    half = load_model(directory, torch.bfloat16, torch.device("cpu"))
    their_half = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    for loaded in (half, their_half):
        for name, parameter in loaded.named_parameters():
            assert parameter.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16)
    assert ("model.layers.0.mlp.gate.e_score_correction_bias" in reader) == KINDS[kind].get("selection_bias", False)


@torch.no_grad()
def test_a_checkpoint_from_before_routers_still_loads(tmp_path: Path) -> None:
    directory = make_moe(tmp_path)
    raw = read_json(directory / "config.json")
    before = (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "score_function",
        "score_norm_top_k",
        "expert_weight",
    )
    raw["moe_layers"] = [entry and {name: entry[name] for name in before} for entry in raw["moe_layers"]]
    expected = load_model(directory, torch.float32, torch.device("cpu"))
    write_json(directory / "config.json", raw)
    again = load_model(directory, torch.float32, torch.device("cpu"))
    assert again.config == expected.config
    assert "model.layers.0.mlp.gate.weight" in dict(again.named_parameters())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"router": "random"}, "router must be"),
        ({"router": ["linear"]}, "router must be"),
        ({"router": "mlp"}, "router_hidden_size"),
        ({"router": "mlp", "router_hidden_size": 0}, "router_hidden_size"),
        ({"router": "table"}, "router_hidden_size"),
        ({"router_hidden_size": 8}, "router_hidden_size must be null"),
        ({"selection_bias": 1}, "selection_bias"),
        ({"substitutes": -1}, "substitutes"),
        ({"substitutes": True}, "substitutes"),
        ({"substitutes": 4}, "substitutes must be below"),
        ({"substitutes": 3}, r"num_experts_per_tok must be in 1\.\.1"),
        ({"fixed_experts": -1}, "fixed_experts"),
        ({"fixed_experts": 4, "score_function": "sigmoid"}, "fixed_experts must be below"),
        ({"fixed_experts": 2}, "fixed_experts need router linear and score_function sigmoid"),
        ({"fixed_experts": 2, "score_function": "sigmoid", "router": "glu"}, "fixed_experts need router linear"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MoeLayerConfig(4, 2, 8, **fields)


def test_fresh_transformers_model_has_fresh_routers(tmp_path: Path) -> None:
    directory = make_moe(tmp_path, layer={"router": "glu", "selection_bias": True})
    model = type(AutoModelForCausalLM.from_pretrained(directory))(AutoModelForCausalLM.from_pretrained(directory).config)
    router = model.model.layers[0].mlp.gate
    assert not router.e_score_correction_bias.any()
    assert 0.15 < router.up_proj.weight.std() < 0.25
