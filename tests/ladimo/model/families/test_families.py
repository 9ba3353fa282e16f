"""Every family of dense models through the whole product: converted, run by our network, by transformers and by the engine."""

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import (
    TensorReader,
    load_model,
    load_to_serve,
    moe_config_json,
    read_config,
    read_json,
    read_policies,
    write_json,
)
from ladimo.convert.methods.registry import METHODS
from ladimo.convert.pipeline import convert
from ladimo.hf import LadimoLlamaForCausalLM
from ladimo.model.cpu.build import library
from ladimo.model.families import read_model_config
from ladimo.model.inputs import StepInputs
from server.engine.async_engine import AsyncEngine
from server.engine.build import build_core
from server.engine.config import EngineConfig
from server.engine.request import GenerationRequest, SamplingParams
from tests.factories import (
    CONTEXT,
    EOS_ID,
    EXACT,
    HALF_ROPE,
    LLAMA3_ROPE,
    PARTIAL_LONGROPE,
    PHI2,
    VOCAB_SIZE,
    make_dense,
    make_moe,
    make_nested,
)
from tests.ladimo.convert.conftest import make_text, small_recipe
from tests.ladimo.stepping import Row, Stepper, make_tables

CPU = torch.device("cpu")
IDS = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(5))
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "llama3": {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "head_dim": 16, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "phi2": PHI2,
    "phi3": {
        "model_type": "phi3",
        "rope_parameters": HALF_ROPE,
    },
    "phi4_mini": {"model_type": "phi3", "rope_parameters": PARTIAL_LONGROPE, "original_max_position_embeddings": 20},
}


def theirs(directory: Path, **options: Any) -> LadimoLlamaForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model, LadimoLlamaForCausalLM)
    return model


@torch.no_grad()
def assert_halves_agree(directory: Path) -> None:
    """Our network and transformers' view give the same logits under every policy of the checkpoint."""
    model = load_model(directory, torch.float32, CPU)
    reference = theirs(directory, **({"policy": "fast"} if model.config.nested_bits else {}))  # so that it has the planes
    for policy in read_policies(directory, model.config).values():
        reference.set_policy(policy.layers, policy.head_bits, policy.head_refine)
        ours = model(StepInputs.whole_sequences(IDS), None, make_tables(model, [policy])).logits
        assert ours.abs().max() > 1
        assert (ours - reference(IDS).logits.flatten(0, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_model_is_the_same_in_transformers(family: str, tmp_path: Path) -> None:
    """Biases drawn at random, so that one too many or too few shows; saved by transformers and read again."""
    moe = make_moe(tmp_path / "moe", **FAMILIES[family])
    assert_halves_agree(moe)
    theirs(moe).save_pretrained(tmp_path / "again")
    (moe / "routing").rename(tmp_path / "again/routing")
    assert_halves_agree(tmp_path / "again")


@pytest.mark.parametrize("family", ["mistral", "qwen2_tied", "qwen3", "phi4_mini"])
def test_conversion_end_to_end(family: str, tmp_path: Path) -> None:
    fields = {**FAMILIES[family], "max_position_embeddings": 32}
    dense = make_dense(tmp_path / "dense", **fields)
    recipe = small_recipe(**{"train.steps": 5, "policies.points": 0})
    assert convert(str(dense), tmp_path / "moe", recipe, [make_text(tmp_path / "text.txt")])
    config = read_config(tmp_path / "moe")
    assert (config.attention_bias, config.attention_output_bias) == (family == "qwen2_tied", False)
    assert not any(name.endswith("o_proj.bias") for name in TensorReader(tmp_path / "moe").files)
    assert_halves_agree(tmp_path / "moe")


def written_by_transformers(model: Any, prompt: torch.Tensor) -> list[int]:
    """16 tokens, greedily."""
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": EOS_ID}
    found: list[int] = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :].tolist()
    return found


async def written_by_the_engine(directory: Path, prompt: torch.Tensor, **settings: Any) -> list[int]:
    """The same from the engine, under policy `full`."""
    policy = read_policies(directory, read_config(directory))["full"]
    config = EngineConfig(device="cpu", max_num_seqs=2, block_size=4, max_step_tokens=8, **settings)
    engine = AsyncEngine(partial(build_core, directory, config), lambda _: None)
    await engine.start()
    try:
        sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        asked = GenerationRequest("one", tuple(prompt[0].tolist()), sampling, policy)
        return [event.token_id async for event in engine.generate(asked) if event.token_id is not None]
    finally:
        await engine.stop()


def written_by_torch(directory: Path, prompt: torch.Tensor) -> list[int]:
    """The same by our network in torch, over a cache."""
    model = load_model(directory, torch.float32, CPU)
    steps = Stepper(model, make_tables(model, [read_policies(directory, model.config)["full"]]))
    row = Row(prompt[0].tolist())
    logits = steps.step(prefill=[(row, prompt.shape[1])])[0]
    while len(row.tokens) < prompt.shape[1] + 16:
        row.tokens.append(int(logits[-1].argmax()))
        logits = steps.step(decode=[row])[0]
    return row.tokens[prompt.shape[1] :]


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3", "phi3", "phi4_mini", "phi2"])
async def test_the_engine_writes_what_transformers_writes(family: str, tmp_path: Path) -> None:
    """Greedy, the dense model, one with experts and a nested one, in the compiled step and in torch. The reference for the
    dense model is the family's own class."""
    fields = dict(FAMILIES[family])
    if family == "phi4_mini":  # transformers changes the frequencies when a text outgrows this; an engine has one set of them
        fields["original_max_position_embeddings"] = CONTEXT
    dense = make_dense(tmp_path / "dense", **fields)
    moe, nested = make_moe(tmp_path / "moe", dense=dense), make_nested(tmp_path / "nested", dense=dense)
    prompt = IDS[:1, :11]
    for directory in (dense, moe, nested):
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        expected = await asyncio.to_thread(written_by_transformers, reference, prompt)
        assert await written_by_the_engine(directory, prompt) == expected
        assert written_by_torch(directory, prompt) == expected


def test_a_converted_configuration_says_what_its_family_left_unsaid(tmp_path: Path) -> None:
    """Read without the family's name, it describes the same model; nothing of the window stays."""
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    for family, heads, kv_heads, context in (
        ("mistral", 16, 8, 131072),
        ("qwen2", 32, 32, 32768),
        ("qwen3", 32, 32, 32768),
        ("llama", 16, 16, 2048),
    ):
        raw = {"model_type": family, **sizes, "num_attention_heads": heads, "sliding_window": None}
        dense = read_model_config(raw)
        assert (dense.num_key_value_heads, dense.max_position_embeddings) == (kv_heads, context)
        assert dense.head_dim == (128 if family == "qwen3" else 64 // heads)
        converted = moe_config_json(raw, [None, None])
        assert read_model_config(converted) == dense
        assert "sliding_window" not in converted


def test_checkpoints_converted_before_there_were_families(tmp_path: Path) -> None:
    """They have one flag for all four biases."""
    moe = make_moe(tmp_path, attention_bias=True)
    raw = read_json(moe / "config.json")
    del raw["attention_output_bias"]
    write_json(moe / "config.json", raw)
    assert read_config(moe).attention_output_bias
    assert_halves_agree(moe)


def test_a_text_that_outgrows_the_original_context_is_written_by_transformers_as_before(tmp_path: Path) -> None:
    """The converted model drops its keys when the frequencies change, as transformers' Phi-3 does."""
    dense = make_dense(tmp_path / "dense", **FAMILIES["phi4_mini"])
    moe = make_moe(tmp_path / "moe", dense=dense, top_k=4, layer=EXACT)
    models = [AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32) for directory in (dense, moe)]
    first, second = (written_by_transformers(model, IDS[:1, :11]) for model in models)  # the original context is 20 tokens
    assert first == second


async def test_a_shorter_context_has_the_frequencies_of_short_texts(tmp_path: Path) -> None:
    """The engine computes with the frequencies for its own longest text, so it writes what transformers writes up to there."""
    dense = make_dense(tmp_path / "dense", **{**FAMILIES["phi4_mini"], "original_max_position_embeddings": 32})
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for length, context in ((11, 32), (33, None)):
        prompt = torch.cat((IDS[:1], IDS[1:]), dim=1)[:, :length]
        expected = await asyncio.to_thread(written_by_transformers, model, prompt)
        assert await written_by_the_engine(dense, prompt, max_model_len=context) == expected


@pytest.mark.skipif(library() is None, reason="there is no compiled CPU kernel here")
@torch.no_grad()
def test_phi2_runs_in_the_compiled_step_in_integers_too(tmp_path: Path) -> None:
    """Its FFN has 96 neurons: a block of 64 and half of one."""
    dense = make_dense(tmp_path / "dense", **FAMILIES["phi2"])
    model = load_model(dense, torch.float32, CPU)
    steps = Stepper(model, make_tables(model, list(read_policies(dense, model.config).values())))
    inputs = steps.inputs(prefill=[(Row(IDS[0].tolist()), IDS.shape[1])])
    expected = model(inputs, steps.kv_cache, steps.tables).logits
    for quantize, likeness in ((None, 0.99999), ("int8", 0.999), ("int4", 0.97)):
        served = load_to_serve(dense, "cpu", "float32", quantize)
        assert served.backend.name == "native"
        cache = served.backend.allocate_cache(model.config, steps.num_blocks, steps.block_size)
        logits = served.step(inputs, cache, steps.tables).logits
        assert torch.nn.functional.cosine_similarity(logits, expected).min() > likeness


@torch.no_grad()
def test_phi2_split_exactly_or_kept_whole_is_phi2(tmp_path: Path) -> None:
    """Biases count once: those of neurons with their experts, that of the output with none of them."""
    dense = make_dense(tmp_path / "dense", **FAMILIES["phi2"], max_position_embeddings=32)
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(IDS).logits.flatten(0, 1)
    make_moe(tmp_path / "split", dense=dense, top_k=4, layer=EXACT)
    recipe = small_recipe(**{"method": "static", "static.kept": 1.0, "train.steps": 0, "policies.points": 0})
    assert convert(str(dense), tmp_path / "kept", recipe, [make_text(tmp_path / "text.txt")])
    for directory in (tmp_path / "split", tmp_path / "kept"):
        model = load_model(directory, torch.float32, CPU)
        policy = read_policies(directory, model.config)["full"]
        if directory.name == "split":
            policy = replace(policy, layers=tuple(rule and replace(rule, renormalize=False) for rule in policy.layers))
        ours = model(StepInputs.whole_sequences(IDS), None, make_tables(model, [policy])).logits
        assert (ours - expected).abs().max() < 1e-4


@pytest.mark.parametrize("method", sorted(METHODS))
def test_phi2_is_converted_by_methods_that_need_no_gate(method: str, tmp_path: Path) -> None:
    """The others refuse it by name."""
    dense = make_dense(tmp_path / "dense", **FAMILIES["phi2"], max_position_embeddings=32)
    moe, text = tmp_path / "moe", [make_text(tmp_path / "text.txt")]
    recipe = small_recipe(
        **{"method": method, "train.steps": 5, "elastic.steps": 5, "policies.points": 0, "target_active": 0.9}
    )
    if "gelu" not in METHODS[method].ffn_kinds:
        with pytest.raises(ValueError, match=f"method '{method}' does not convert family 'phi', whose FFNs have no gate"):
            convert(str(dense), moe, recipe, text)
        assert not moe.exists()
        return
    assert convert(str(dense), moe, recipe, text)
    config = read_config(moe)
    assert {layer.ffn_kind for layer in config.layers if layer is not None} == {"gelu"}
    assert (config.parallel_block, config.norm_kind, config.head_bias) == (True, "layer", True)
    assert_halves_agree(moe)
    report = read_json(moe / "report.json")
    cost = "bytes_ratio" if config.nested_bits else "active_parameters_ratio"
    assert min(policy[cost] for policy in report["policies"]) < 0.95


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_layernorm": True}, "qk_layernorm is true; supported: false"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; supported: gelu_new"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true, but the output head has a bias of its own"),
    ],
)
def test_what_phi2_cannot_have_is_refused_by_field(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    raw = read_json(make_dense(tmp_path, **FAMILIES["phi2"]) / "config.json")
    with pytest.raises(ValueError, match=message):
        read_model_config({**raw, **fields})
