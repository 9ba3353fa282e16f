"""Models that were trained as Mixture-of-Experts: the same as in transformers at their own number of experts, and below it."""

import asyncio
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import load_model, load_to_serve, read_config, read_json, read_policies, write_json
from ladimo.convert.source import check_source
from ladimo.model.families import dense_types, read_model_config
from ladimo.model.inputs import StepInputs
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import LayerRule, RoutingPolicy
from server.engine.async_engine import AsyncEngine
from server.engine.build import build_core
from server.engine.config import EngineConfig
from server.engine.request import GenerationRequest, SamplingParams
from tests.factories import VOCAB_SIZE, make_dense
from tests.ladimo.stepping import make_tables

CPU = torch.device("cpu")
IDS = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(5))
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 3, "head_dim": 16},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "qwen2_moe_normalised": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "qkv_bias": False,
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 5, "num_experts_per_tok": 3, "num_key_value_heads": 4},
}


@pytest.fixture(scope="module", params=MODELS)
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as transformers writes it."""
    return make_dense(tmp_path_factory.mktemp(request.param), **MODELS[request.param])


@cache
def network(directory: Path) -> MoeTransformer:
    return load_model(directory, torch.float32, CPU)


@torch.no_grad()
def ours(directory: Path, policy: RoutingPolicy | None = None) -> torch.Tensor:
    model = network(directory)
    policy = policy or read_policies(directory, model.config)["full"]
    logits: torch.Tensor = model(StepInputs.whole_sequences(IDS), None, make_tables(model, [policy])).logits
    return logits


def theirs(directory: Path, **config: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **config)
    assert not info["missing_keys"]
    return model


@torch.no_grad()
def test_logits_are_those_of_transformers_for_every_number_of_experts(stock: Path) -> None:
    policies = read_policies(stock, read_config(stock))
    top_k = max(rule.top_k for rule in policies["full"].layers if rule)
    assert list(policies) == ["full", *(f"top-{count}" for count in reversed(range(1, top_k)))]
    seen = []
    for policy, count in zip(policies.values(), range(top_k, 0, -1), strict=True):
        expected = theirs(stock, num_experts_per_tok=count)(IDS).logits.flatten(0, 1)
        assert expected.std() > 0.5
        assert (ours(stock, policy) - expected).abs().max() < 1e-4
        seen.append(expected)
    assert (seen[0] - seen[-1]).abs().max() > 0.1


def test_the_engine_generates_what_transformers_generates(stock: Path) -> None:
    """Prefill in chunks and decode through the cache, full and below, side by side in one batch."""
    policies = read_policies(stock, read_config(stock))
    counts = {"full": max(rule.top_k for rule in policies["full"].layers if rule), "top-1": 1}
    prompt = IDS[:1, :11]
    expected = {}
    for name, count in counts.items():
        options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected[name] = theirs(stock, num_experts_per_tok=count).generate(prompt, **options)[0, 11:].tolist()
    assert expected["full"] != expected["top-1"]

    async def generated() -> dict[str, list[int]]:
        config = EngineConfig(device="cpu", dtype="float32", max_num_seqs=2, block_size=4, max_step_tokens=8)
        engine = AsyncEngine(partial(build_core, stock, config), lambda _: None)
        await asyncio.wait_for(engine.start(), 60)
        sampling = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)

        async def run(name: str) -> list[int]:
            asked = GenerationRequest(name, tuple(prompt[0].tolist()), sampling, policies[name])
            return [event.token_id async for event in engine.generate(asked) if event.token_id is not None]

        try:
            return dict(zip(counts, await asyncio.gather(*map(run, counts)), strict=True))
        finally:
            await engine.stop()

    assert asyncio.run(generated()) == expected


def test_a_relative_floor_drops_experts(stock: Path) -> None:
    """1 keeps the best expert alone, 0 all; in between lie other models."""
    config = read_config(stock)
    full = read_policies(stock, config)["full"]

    def floored(floor: float, **fields: Any) -> torch.Tensor:
        rules = (rule and LayerRule(rule.top_k, relative_floor=floor, renormalize=rule.renormalize) for rule in full.layers)
        return ours(stock, RoutingPolicy("floor", "", tuple(rules)))

    assert torch.equal(floored(0.0), ours(stock))
    assert torch.equal(floored(1.0), ours(stock, read_policies(stock, config)["top-1"]))
    assert (floored(0.5) - floored(0.0)).abs().max() > 0.01 < (floored(0.5) - floored(1.0)).abs().max()


def test_a_policy_costs_its_share_of_the_models_own_parameters(stock: Path) -> None:
    config = read_config(stock)

    def ratio(count: float) -> float:
        experts = (None if layer is None else min(count, float(layer.num_experts_per_tok)) for layer in config.layers)
        return config.active_parameters_ratio(tuple(experts))

    assert ratio(99) == pytest.approx(1)
    assert 0.2 < ratio(1) < 0.95


def test_the_compiled_step_runs_what_it_knows(stock: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = load_to_serve(stock, "cpu").backend
    if "there is no compiled kernel" in caplog.text:
        pytest.skip("there is no compiler")
    assert backend.name == ("torch" if read_config(stock).family == "qwen2_moe" else "native")


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_experts_are_rounded_to_integers(quantize: str, tmp_path: Path) -> None:
    mixtral = make_dense(tmp_path, **MODELS["mixtral"])
    model = load_to_serve(mixtral, "cpu", quantize=quantize)
    assert model.backend.quantize == quantize


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mixtral", {"sliding_window": 64}, "sliding_window is 64 .*, below max_position_embeddings 256"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts must be a positive integer"),
        ("mixtral", {"num_experts_per_tok": 5}, r"num_experts_per_tok must be in 1\.\.4, got 5"),
        ("qwen2_moe", {"mlp_only_layers": "1"}, "mlp_only_layers must be a list of layer numbers"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0; supported: null"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_field(family: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    raw = read_json(make_dense(tmp_path, **MODELS[family]) / "config.json")
    with pytest.raises(ValueError, match=message):
        read_model_config({**raw, **fields})


def test_fields_that_are_left_out_have_transformers_defaults(tmp_path: Path) -> None:
    """Mixtral's frequencies and epsilon are not LLaMA's."""
    raw = read_json(make_dense(tmp_path, **MODELS["mixtral"]) / "config.json")
    config = read_model_config({name: value for name, value in raw.items() if name not in ("rope_parameters", "rms_norm_eps")})
    assert (config.rope.theta, config.rms_norm_eps) == (1e6, 1e-5)


def test_an_expert_that_is_missing_or_of_another_size_is_named(tmp_path: Path) -> None:
    directory = make_dense(tmp_path, **MODELS["mixtral"])
    file, name = directory / "model.safetensors", "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][:5].clone()}, file)
    with pytest.raises(ValueError, match=r"the parts of model.layers.1.mlp.experts.gate_up_proj do not fit each other"):
        load_model(directory, torch.float32, CPU)
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, file)
    with pytest.raises(ValueError, match=f"lacks the tensor {name}"):
        load_model(directory, torch.float32, CPU)


def test_it_is_not_converted(stock: Path) -> None:
    assert dense_types() == ["llama", "mistral", "qwen2", "qwen3", "phi3", "phi"]
    with pytest.raises(ValueError, match="is a Mixture-of-Experts already; give a dense model"):
        check_source(stock)


def test_a_llama_with_an_unused_window_is_read(tmp_path: Path) -> None:
    """transformers' LLaMA has no window, whatever the file says."""
    directory = make_dense(tmp_path)
    write_json(directory / "config.json", {**read_json(directory / "config.json"), "sliding_window": 8})
    assert read_config(directory).family == "llama"
