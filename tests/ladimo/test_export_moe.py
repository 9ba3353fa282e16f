"""Models that route are written for the architectures of other programs, and compute there what our engine computes."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ladimo import export
from ladimo.checkpoint import load_model, read_json, read_policies, write_policy
from ladimo.export.layer_forms import FixedExperts, RoutedExperts, layer_form
from ladimo.model.config import MoeLayerConfig
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import HALF_ROPE, LLAMA3_ROPE, VOCAB_SIZE, make_dense, make_moe
from tests.ladimo.model.families.test_moe_families import MODELS
from tests.ladimo.stepping import Stepper, make_tables

CPU = torch.device("cpu")
PROMPT = torch.randint(VOCAB_SIZE, (12,), generator=torch.Generator().manual_seed(5)).tolist()
SIGMOID = {"score_function": "sigmoid", "selection_bias": True}
BESIDE_FIXED = {"score_function": "sigmoid", "fixed_experts": 2}
NEEDS_GGUF = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")


def kept(top_k: int, *experts: int) -> LayerRule:
    """Weights as the router scores them."""
    return LayerRule(top_k, renormalize=False, experts=experts or None)


# Fields of the expert layers, and the rules; None for a dense layer.
Case = tuple[dict[str, Any], Sequence[LayerRule | None]]
UNEQUAL = SIGMOID, (kept(1), kept(3), kept(2, 0, 1, 3))
UNEQUAL_AFTER_DENSE = SIGMOID, (None, kept(3), kept(2, 0, 1, 3))
DENSE_BETWEEN = SIGMOID, (kept(2), None, kept(1, 0, 1, 3))
WITH_FIXED = BESIDE_FIXED, (kept(3), kept(4), kept(2, 2, 3))
FIXED_AND_ROUTED = BESIDE_FIXED, (kept(2, 0, 1), kept(3), kept(2, 0, 1))
NORMALISED = {"score_function": "sigmoid"}, (LayerRule(2), LayerRule(2), LayerRule(2))
SOFTMAX: Case = {}, (LayerRule(2), LayerRule(2), LayerRule(2))
SOFTMAX_KEPT: Case = {}, (kept(2), None, kept(2))
DIVIDED = {"score_norm_top_k": 2}, (kept(2), None, kept(2))
MASKED: Case = {}, (LayerRule(2, experts=(0, 1, 3)), LayerRule(2, experts=(1, 2, 3)), LayerRule(2, experts=(0, 2, 3)))

CASES = [
    *(("glm4", case) for case in (UNEQUAL, UNEQUAL_AFTER_DENSE, DENSE_BETWEEN, FIXED_AND_ROUTED, NORMALISED)),
    *(("mimo", case) for case in (DENSE_BETWEEN, WITH_FIXED, NORMALISED)),
    *(("qwen2", case) for case in (SOFTMAX_KEPT, DIVIDED, MASKED)),
    ("mixtral", MASKED),
]


def make(path: Path, case: Case, **config: Any) -> Path:
    """A checkpoint with the policy "chosen"."""
    layer, rules = case
    dense = [index for index, rule in enumerate(rules) if rule is None]
    directory = make_moe(path, layer=layer, dense_layers=dense, **config)
    write_policy(directory, RoutingPolicy("chosen", "", tuple(rules)))
    return directory


def engine_tokens(directory: Path, count: int) -> list[int]:
    """What our engine generates greedily under the policy, over the paged cache."""
    model = load_model(directory, torch.float32, CPU)
    tables = make_tables(model, [read_policies(directory, model.config)["chosen"]])
    return Stepper(model, tables).greedy(PROMPT, count)


@pytest.mark.parametrize(("target", "case"), CASES)
def test_transformers_generates_the_same(target: str, case: Case, tmp_path: Path) -> None:
    """`export` has compared the logits already; here the written model generates by itself, with transformers' cache."""
    directory = make(tmp_path / "moe", case)
    export.export(directory, tmp_path / "out", target, "chosen")
    assert read_json(tmp_path / "out/config.json")["model_type"] not in ("llama", "ladimo_llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(torch.tensor([PROMPT]), **options)[0, len(PROMPT) :].tolist()
    assert found == engine_tokens(directory, 8)


@pytest.mark.parametrize(
    ("target", "case", "config"),
    [
        ("glm4", UNEQUAL, {"model_type": "qwen2"}),
        ("mimo", UNEQUAL, {"model_type": "qwen2"}),
        ("qwen2", SOFTMAX, {"model_type": "qwen2"}),
        ("glm4", UNEQUAL, {"rope_parameters": LLAMA3_ROPE}),
        ("qwen2", SOFTMAX, {"rope_parameters": LLAMA3_ROPE}),
        ("mixtral", SOFTMAX, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
        ("glm4", UNEQUAL, {"head_dim": 16, "tie_word_embeddings": True}),
        ("mimo", UNEQUAL, {"head_dim": 16}),
        ("mixtral", SOFTMAX, {"head_dim": 16}),
        ("glm4", UNEQUAL, {"dtype": torch.bfloat16}),
        ("glm4", UNEQUAL, {"model_type": "qwen3", "head_dim": 16}),
        ("glm4", UNEQUAL, {"model_type": "phi3", "rope_parameters": HALF_ROPE}),
    ],
)
def test_families_ropes_and_sizes(target: str, case: Case, config: dict[str, Any], tmp_path: Path) -> None:
    export.export(make(tmp_path / "moe", case, **config), tmp_path / "out", target, "chosen")


@pytest.mark.parametrize(
    ("target", "case", "config", "message"),
    [
        ("mixtral", SOFTMAX_KEPT, {}, "layer 1: is dense, the target routes; try --target qwen2$"),
        *(
            (
                target,
                case,
                {"model_type": "qwen3", "head_dim": 16},
                "the model has norms of queries and keys, which the target lacks",
            )
            for target, case in (("mimo", UNEQUAL), ("qwen2", SOFTMAX), ("mixtral", SOFTMAX))
        ),
        ("mixtral", UNEQUAL, {}, "layer 0: scores by sigmoid, the target by softmax; try --target glm4 or mimo or gguf$"),
        ("glm4", SOFTMAX, {}, "layer 0: scores by softmax, the target by sigmoid; try --target qwen2 or mixtral or gguf$"),
        ("dense", UNEQUAL, {}, "layer 0: chooses 1 of 4 experts by token; the target has no router; try --target glm4"),
        ("qwen2", ({}, (kept(1), None, kept(2))), {}, "layer 2 has 2 experts per token, layer 0 has 1; .* no target can"),
        (
            "mimo",
            ({"score_function": "sigmoid"}, (LayerRule(1), None, LayerRule(2))),
            {},
            "would count in the sum; no target can",
        ),
        ("mimo", UNEQUAL, {"rope_parameters": LLAMA3_ROPE}, "RoPE of type llama3; .*; try --target glm4$"),
        ("mixtral", SOFTMAX, {"model_type": "qwen2"}, "has biases in the attention, the target has none; try --target qwen2$"),
        ("qwen2", SOFTMAX, {"head_dim": 16}, "head_dim is 16, .*; try --target mixtral or gguf$"),
        ("glm4", UNEQUAL, {"attention_bias": True}, "bias on the attention's output, which the target lacks; no target can"),
        ("gguf", SOFTMAX_KEPT, {}, "as dense: .* as mixtral: .*is dense.* as glm4: .*scores by softmax.* try --target qwen2$"),
        ("glm4", ({"router": "none"}, (kept(2), None, kept(1))), {}, "the same experts for every token.* try --target dense"),
    ],
)
def test_refusals_name_the_reason_and_what_would_work(
    target: str, case: Case, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec("gguf") is None and "gguf" in target + message:
        pytest.skip("the package gguf is not installed")
    directory = make(tmp_path / "moe", case, **config)
    with pytest.raises(ValueError, match=message):
        export.export(directory, tmp_path / "out", target, "chosen")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


@pytest.mark.parametrize(
    ("layer", "rule", "message"),
    [
        ({}, LayerRule(2, mass=0.9), "mass may drop experts"),
        ({}, LayerRule(2, relative_floor=0.5), "relative_floor may drop experts"),
        ({}, LayerRule(1, batch_experts=2), "batch_experts may drop experts"),
        ({"shared_expert_intermediate_size": 8, "expert_weight": "one"}, LayerRule(2), "has a shared expert beside"),
        ({"router": "glu"}, LayerRule(2), "router is of the kind 'glu'"),
        ({"expert_weight": "one"}, LayerRule(2, renormalize=False), "weighs them all alike"),
        ({"score_norm_top_k": 2}, LayerRule(1, renormalize=False), "divided by the sum of the best 2"),
        (BESIDE_FIXED, LayerRule(3), "weighs fixed experts together"),
        ({**BESIDE_FIXED, "selection_bias": True}, kept(3), "fixed experts and also a selection bias"),
    ],
)
def test_what_no_other_program_computes(layer: dict[str, Any], rule: LayerRule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_form(rule, MoeLayerConfig(4, 2, 8, **layer), lambda: torch.zeros(4))


@pytest.mark.parametrize(
    ("layer", "rule", "form"),
    [
        ({"router": "none", "expert_weight": "one"}, kept(2, 1, 2, 3), FixedExperts((1, 2), (1.0, 1.0))),
        ({"router": "none", "expert_weight": "one"}, LayerRule(4), FixedExperts((0, 1, 2, 3), (0.25,) * 4)),
        ({"router": "none", "expert_weight": "one"}, LayerRule(4, floor=1.0), FixedExperts((0,), (1.0,))),
        ({}, LayerRule(1, mass=0.1, experts=(2,)), FixedExperts((2,), (1.0,))),
        ({"score_function": "sigmoid"}, kept(1, 2), RoutedExperts((), (2,), 1, "sigmoid", False, False)),
        (
            {"score_function": "sigmoid", "expert_weight": "one"},
            kept(1),
            RoutedExperts((), (0, 1, 2, 3), 1, "sigmoid", True, False),
        ),
        ({}, kept(4), RoutedExperts((), (0, 1, 2, 3), 4, "softmax", True, False)),
        (BESIDE_FIXED, kept(2), FixedExperts((0, 1), (1.0, 1.0))),
        (BESIDE_FIXED, kept(3), RoutedExperts((0, 1), (2, 3), 1, "sigmoid", False, False)),
    ],
)
def test_what_a_layer_computes(layer: dict[str, Any], rule: LayerRule, form: FixedExperts | RoutedExperts) -> None:
    assert layer_form(rule, MoeLayerConfig(4, 2, 8, **layer), lambda: torch.zeros(4)) == form


@pytest.mark.parametrize("policy", ["full", "top-1"])
def test_a_stock_model_is_written_with_fewer_experts_per_token(policy: str, tmp_path: Path) -> None:
    """Mixtral in, Mixtral out."""
    mixtral = make_dense(tmp_path / "mixtral", model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    export.export(mixtral, tmp_path / policy, "mixtral", policy)
    raw = read_json(tmp_path / policy / "config.json")
    assert (raw["num_experts_per_tok"], raw["num_local_experts"]) == (2 if policy == "full" else 1, 4)


def test_a_shared_expert_is_written_where_the_target_has_one(tmp_path: Path) -> None:
    """Also with one expert to choose from. Its weight is its score, or one if weights are divided by their sum."""
    stock = make_dense(tmp_path / "stock", **MODELS["qwen2_moe"])
    export.export(stock, tmp_path / "top-2", "qwen2", "top-2")
    assert read_json(tmp_path / "top-2/config.json")["shared_expert_intermediate_size"] == 40
    for renormalize in (False, True):
        rule = LayerRule(1, renormalize=renormalize, experts=(2,))
        write_policy(stock, RoutingPolicy("single", "", (rule, None, rule)))
        write_policy(stock, RoutingPolicy("full", "", (rule, None, rule)))
        export.export(stock, tmp_path / f"single-{renormalize}", "qwen2", "single")
    with pytest.raises(ValueError, match="layer 0: has a shared expert with a gate, the target has none; try --target qwen2$"):
        export.export(stock, tmp_path / "out", "mixtral", "single")


@NEEDS_GGUF
@pytest.mark.parametrize(
    ("case", "config"),
    [
        (SOFTMAX, {}),
        (SOFTMAX, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
        (UNEQUAL_AFTER_DENSE, {}),
        (DENSE_BETWEEN, {"model_type": "qwen2"}),
        (WITH_FIXED, {"tie_word_embeddings": True}),
        (({"router": "none", "expert_weight": "one"}, (kept(2), None, kept(1))), {"model_type": "qwen2"}),
        (({"router": "none", "expert_weight": "one"}, (kept(2), None, kept(1))), {"rope_parameters": LLAMA3_ROPE}),
    ],
    ids=[
        "mixtral",
        "mixtral, scaled RoPE",
        "glm4",
        "glm4, dense between",
        "glm4, fixed",
        "dense, biases",
        "dense, scaled RoPE",
    ],
)
def test_llama_cpp_generates_the_same(case: Case, config: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from loadtests.common.llama_cpp_peer import LlamaCpp

    directory = make(tmp_path / "moe", case, **config)
    export.export(directory, tmp_path / "out", "gguf", "chosen")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.gguf"]
    rival = LlamaCpp(tmp_path / "out/model.gguf", 1, 1, 64)
    assert rival.greedy(PROMPT, 12) == engine_tokens(directory, 12)
