"""A family of one's own: one module, registered, goes through loading, conversion and serving."""

import asyncio
import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import TensorReader, copy_tokenizer, load_model, read_config, read_json, read_policies, write_json
from ladimo.convert.pipeline import convert
from ladimo.model import families
from ladimo.model.inputs import StepInputs
from server.engine.async_engine import AsyncEngine
from server.engine.build import build_core
from server.engine.config import EngineConfig
from server.engine.request import GenerationRequest, SamplingParams
from tests.factories import VOCAB_SIZE, make_dense
from tests.ladimo.convert.conftest import make_text, small_recipe
from tests.ladimo.stepping import make_tables

CPU = torch.device("cpu")
IDS = torch.randint(VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(7))
# Other names in config.json, other names of weights, fused projections, and attention whose output is doubled.
TOY = """
from ladimo.model.attention.layer import Attention
from ladimo.model.families import Family, Stored, register

NAMES = {
    "self_attn.o_proj.weight": "attn.out",
    "mlp.down_proj.weight": "ffn.down",
    "input_layernorm.weight": "norm1",
    "post_attention_layernorm.weight": "norm2",
}
FIELDS = {
    "hidden_size": "width",
    "intermediate_size": "ffn_width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
}


class DoubledAttention(Attention):
    def forward(self, *arguments):
        return 2 * super().forward(*arguments)


class Toy(Family):
    def read_config(self, raw):
        return super().read_config({**raw, **{ours: raw[theirs] for ours, theirs in FIELDS.items() if theirs in raw}})

    def locate(self, name, config):
        if not name.startswith("model.layers."):
            return Stored({"model.embed_tokens.weight": "embed", "model.norm.weight": "norm", "lm_head.weight": "head"}[name])
        _, _, layer, rest = name.split(".", 3)
        heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        ffn = config.intermediate_size
        rows = {
            "self_attn.q_proj.weight": ("attn.qkv", slice(0, heads)),
            "self_attn.k_proj.weight": ("attn.qkv", slice(heads, heads + kv)),
            "self_attn.v_proj.weight": ("attn.qkv", slice(heads + kv, heads + 2 * kv)),
            "mlp.gate_proj.weight": ("ffn.gate_up", slice(0, ffn)),
            "mlp.up_proj.weight": ("ffn.gate_up", slice(ffn, 2 * ffn)),
        }
        stored, part = rows.get(rest, (NAMES.get(rest), None))
        return Stored(f"blocks.{layer}.{stored}", part)


register(Toy("toy", num_key_value_heads=2, attention=DoubledAttention))
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The family, known for the length of a test."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package/toy_family.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path / "package")
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    importlib.import_module("toy_family")
    yield
    del sys.modules["toy_family"]


@pytest.fixture
def pair(tmp_path: Path, toy: None) -> tuple[Path, Path]:
    """A LLaMA and the same model in the toy family's clothes: its output projections halved, as its attention doubles."""
    llama = make_dense(tmp_path / "llama", max_position_embeddings=64)
    raw, reader, config = read_json(llama / "config.json"), TensorReader(llama), read_config(llama)
    directory = tmp_path / "toy"
    directory.mkdir()
    sizes = {
        "width": "hidden_size",
        "ffn_width": "intermediate_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
    }
    kept = ("vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters")
    fields = {name: raw[name] for name in kept} | {theirs: raw[ours] for theirs, ours in sizes.items()}
    write_json(directory / "config.json", {"model_type": "toy", **fields})
    family = families.find_family("toy")
    tensors: dict[str, torch.Tensor] = {}
    # Queries before keys before values, gate before up, so that fused rows lie as the family says.
    order = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    for name in sorted(reader.files, key=lambda name: next((i for i, part in enumerate(order) if part in name), 9)):
        tensor = reader.get(name) / (2 if "o_proj" in name else 1)
        (stored,) = family.locate(name, config).names
        tensors[stored] = torch.cat([tensors[stored], tensor]) if stored in tensors else tensor
    save_file(tensors, directory / "model.safetensors")
    copy_tokenizer(llama, directory)
    return llama, directory


@torch.no_grad()
def test_it_is_the_model_that_it_stands_for(pair: tuple[Path, Path]) -> None:
    llama, toy = pair
    theirs = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)(IDS).logits.flatten(0, 1)
    model = load_model(toy, torch.float32, CPU)
    ours = model(StepInputs.whole_sequences(IDS), None, make_tables(model, [])).logits
    assert (ours - theirs).abs().max() < 1e-4


async def test_it_is_converted_and_served(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The converted model keeps the family's attention, and the engine runs it."""
    _, toy = pair
    moe = tmp_path / "moe"
    assert convert(str(toy), moe, small_recipe(**{"train.steps": 5, "policies.points": 0}), [make_text(tmp_path / "text.txt")])
    config = read_config(moe)
    assert (config.family, config.moe_layer_indices) == ("toy", (0, 1, 2))
    policy = read_policies(moe, config)["full"]
    model = load_model(moe, torch.float32, CPU)
    prompt = IDS[:1, :9]
    expected = prompt
    with torch.no_grad():
        for _ in range(8):
            logits = model(StepInputs.whole_sequences(expected), None, make_tables(model, [policy])).logits
            expected = torch.cat([expected, logits[-1:].argmax(-1, keepdim=True)], dim=1)
    engine_config = EngineConfig(device="cpu", dtype="float32", max_num_seqs=2, block_size=4, max_step_tokens=8)
    engine = AsyncEngine(partial(build_core, moe, engine_config), lambda _: None)
    await asyncio.wait_for(engine.start(), 60)
    try:
        sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        asked = GenerationRequest("one", tuple(prompt[0].tolist()), sampling, policy)
        written = [event.token_id async for event in engine.generate(asked) if event.token_id is not None]
    finally:
        await engine.stop()
    assert written == expected[0, prompt.shape[1] :].tolist()


def test_a_family_that_nobody_registered_is_refused_by_name(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "toy"})
    with pytest.raises(
        ValueError,
        match="supported: llama, mistral, qwen2, qwen3, phi3, phi, mixtral, qwen2_moe, olmoe, ladimo_llama",
    ):
        read_config(tmp_path)


def test_a_checkpoint_of_a_family_that_nobody_registered_is_refused_by_name(pair: tuple[Path, Path], moe_dir: Path) -> None:
    raw = read_json(moe_dir / "config.json")
    with pytest.raises(ValueError, match="family is 'other'"):
        families.read_model_config({**raw, "family": "other"})
