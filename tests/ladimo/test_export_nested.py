"""Exports of one set of weights at several precisions: written as the policy reads them, in GGUF with the same integers."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ladimo import cli, export
from ladimo.checkpoint import load_model, read_config, read_policies, write_policy
from ladimo.export.gguf_blocks import to_blocks
from ladimo.model.inputs import StepInputs
from ladimo.model.nested.layers import NestedEmbedding, NestedExperts, NestedHead, NestedLinear
from tests.factories import PHI2, make_nested
from tests.ladimo.stepping import make_tables
from tests.ladimo.test_export import ours, theirs
from tests.ladimo.test_export_moe import PROMPT

CPU = torch.device("cpu")
NEEDS_GGUF = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")


@pytest.mark.parametrize(
    "fields",
    [{"tie_word_embeddings": True}, {}, {"tie_word_embeddings": True, "top_bits": 8}, PHI2, {**PHI2, "top_bits": 8}],
    ids=["tied head", "head of its own", "planes alone", "no gate", "planes alone, no gate"],
)
def test_a_policy_of_bits_is_written_as_it_runs(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Also where the head is rounded and the embedding, which it was, is not."""
    nested = make_nested(tmp_path / "nested", **fields)
    written = []
    for policy in ("full", "fast"):
        export.export(nested, tmp_path / policy, "dense", policy)
        written.append(theirs(tmp_path / policy))
        assert (ours(nested, policy) - written[-1]).abs().max() < 1e-4
    assert (written[0] - written[1]).abs().max() > 0.01


@pytest.mark.parametrize("top_bits", [16, 8])
def test_bf16_weights_are_exact_in_fp32(tmp_path: Path, top_bits: int, caplog: pytest.LogCaptureFixture) -> None:
    """What is read at 4 bits does not fit into bf16, the stored type. The export says so."""
    caplog.set_level("INFO")
    nested = make_nested(tmp_path / "nested", top_bits=top_bits, dtype=torch.bfloat16)
    export.export(nested, tmp_path / "rounded", "dense", "fast")
    assert "weights are rounded to bfloat16; --float32 writes them exactly" in caplog.messages
    caplog.clear()
    export.export(nested, tmp_path / "exact", "dense", "fast", float32=True)
    assert not any("rounded" in message for message in caplog.messages)
    expected = ours(nested, "fast")
    assert (expected - theirs(tmp_path / "exact")).abs().max() < 1e-4
    assert (expected - theirs(tmp_path / "rounded")).abs().max() > 1e-3


@pytest.fixture
def refining(tmp_path: Path) -> Path:
    """A checkpoint whose policies "words" and "neurons" refine."""
    nested = make_nested(tmp_path / "nested")
    policy = read_policies(nested, read_config(nested))["fast"]
    write_policy(nested, replace(policy, name="words", head_refine=2.0))
    layers = [replace(rule, refine=1.5) for rule in policy.layers if rule is not None]
    write_policy(nested, replace(policy, name="neurons", layers=tuple(layers)))
    return nested


def test_a_policy_that_refines_is_refused(refining: Path, tmp_path: Path) -> None:
    """The same bits without refinement can be exported, but that would be another model."""
    with pytest.raises(
        ValueError, match=r"policy 'neurons': each token chooses which neurons .* \(balanced, fast, full, quality\)$"
    ):
        export.export(refining, tmp_path / "out", "dense", "neurons", head_bits=8)
    with pytest.raises(
        ValueError, match=r"policy 'words': each token chooses which words of the output head .* \(--head-bits 8\)"
    ):
        export.export(refining, tmp_path / "out", "dense", "words")
    assert not (tmp_path / "out").exists()


def test_the_whole_head_can_have_one_number_of_bits(refining: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(refining), str(tmp_path / "out"), "--policy", "words", "--head-bits"]
    assert cli.main([*command, "8"]) == 0
    policies = read_policies(refining, read_config(refining))
    write_policy(refining, replace(policies["words"], name="same", head_bits=8, head_refine=None))
    assert (ours(refining, "same") - theirs(tmp_path / "out")).abs().max() < 1e-4
    assert cli.main([*command, "5"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*command[:2], str(tmp_path / "other"), *command[3:], "5"]) == 1
    assert "head_bits: " in capsys.readouterr().err


@NEEDS_GGUF
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_hold_the_same_integers(bits: int) -> None:
    """Each of them in its place: the package gguf reads them back. Scales may be negative, and a block may be of zeros."""
    from gguf import GGMLQuantizationType, quants

    generator = torch.Generator().manual_seed(bits)
    lowest, highest, kind = (-8, 8, "Q4_0") if bits == 4 else (-72, 64, "Q8_0")
    codes = torch.randint(lowest, highest, (2, 5, 96), generator=generator).float()
    scales = torch.randn(2, 5, 3, generator=generator).bfloat16().float()
    codes[1, 2, :32], scales[1, 2, 0] = 0, 0
    steps = scales.repeat_interleave(32, dim=-1)
    blocks = to_blocks(codes * steps, steps)
    assert blocks is not None
    assert blocks[1] == kind
    assert torch.equal(torch.tensor(quants.dequantize(blocks[0], GGMLQuantizationType[kind])), codes * steps)


def test_what_does_not_fit_blocks_is_not_forced_into_them() -> None:
    """Weights that are not rounded, scales that begin inside a block, a scale above fp16, and half a block."""
    codes = torch.ones(1, 64)
    unequal = torch.tensor([1.0, 2.0]).repeat_interleave(torch.tensor([24, 40]))[None]
    for steps in (torch.zeros(1, 64), unequal, torch.full((1, 64), 1e5)):
        assert to_blocks(codes * 1e5, steps) is None
    assert to_blocks(torch.ones(1, 48), torch.ones(1, 48)) is None


def read_by_the_model(directory: Path, policy: str) -> dict[str, Tensor]:
    """Every matrix at the bits that our network reads under the policy, by its name in a GGUF file."""
    model = load_model(directory, torch.float32, CPU)
    chosen = read_policies(directory, model.config)[policy]
    embedding = model.model.embed_tokens
    found = {"token_embd": embedding.weight if isinstance(embedding, NestedEmbedding) else embedding.weight.detach()}
    assert isinstance(model.lm_head, NestedHead)
    found["output"] = model.lm_head.nested.at(chosen.head_bits or torch.inf, torch.float32)
    for index, (layer, rule) in enumerate(zip(model.model.layers, chosen.layers, strict=True)):
        assert rule is not None
        attention, bits = rule.attention_bits or torch.inf, rule.bits or torch.inf
        for name in ("q", "k", "v", "o"):
            projection = layer.get_submodule(f"self_attn.{name}_proj")
            assert isinstance(projection, NestedLinear)
            weights = projection.nested.at(max(8, attention) if name in "kv" else attention, torch.float32)
            if name in "qk":  # llama.cpp rotates neighbouring rows
                halves = weights.view(-1, 2, model.config.head_dim // 2, weights.shape[1])
                weights = halves.transpose(1, 2).reshape(weights.shape)
            found[f"blk.{index}.attn_{'output' if name == 'o' else name}"] = weights
        experts = layer.get_submodule("mlp.experts")
        assert isinstance(experts, NestedExperts)
        gate, up = experts.gate_up_proj.at(bits, torch.float32).squeeze(0).chunk(2)
        down = experts.down_proj.at(bits, torch.float32).squeeze(0)
        found |= {f"blk.{index}.ffn_{name}": weights for name, weights in (("gate", gate), ("up", up), ("down", down))}
    return found


@NEEDS_GGUF
@pytest.mark.parametrize(
    ("top_bits", "tied", "policy", "integers"),
    [
        (16, True, "full", {}),
        (16, True, "fast", {"attn_q": "Q8_0", "ffn_up": "Q4_0", "output": "Q4_0", "token_embd": "BF16"}),
        (8, True, "full", {"attn_q": "Q8_0", "ffn_up": "Q8_0", "token_embd": "Q8_0"}),
        (
            8,
            False,
            "balanced",
            {"attn_q": "Q4_0", "attn_k": "Q8_0", "ffn_down": "Q8_0", "output": "Q4_0", "token_embd": "Q8_0"},
        ),
    ],
)
def test_gguf_has_the_integers_that_the_policy_reads(
    tmp_path: Path, top_bits: int, tied: bool, policy: str, integers: dict[str, str]
) -> None:
    from gguf import GGUFReader, quants

    nested = make_nested(tmp_path / "nested", top_bits=top_bits, num_experts=1, tie_word_embeddings=tied, dtype=torch.bfloat16)
    export.export(nested, tmp_path / "out", "gguf", policy)
    matrices = {
        one.name.removesuffix(".weight"): one for one in GGUFReader(tmp_path / "out/model.gguf").tensors if len(one.shape) > 1
    }
    expected = read_by_the_model(nested, policy)
    if "output" not in matrices:
        del expected["output"]
    assert matrices.keys() == expected.keys()
    for name, stored in matrices.items():
        assert stored.tensor_type.name == integers.get(name.split(".")[-1], stored.tensor_type.name)
        found = torch.tensor(quants.dequantize(stored.data, stored.tensor_type)).view_as(expected[name])
        assert ((found - expected[name]).abs() <= 2.0**-11 * expected[name].abs() + 1e-6).all(), name


@NEEDS_GGUF
def test_groups_that_end_inside_a_block_are_written_in_floating_point(tmp_path: Path) -> None:
    """Four experts of 24 neurons: their groups of columns are 24 wide. Only down_proj has them side by side."""
    from gguf import GGUFReader

    nested = make_nested(tmp_path / "nested", num_experts=4)
    export.export(nested, tmp_path / "out", "gguf", "fast")
    types = {one.name: one.tensor_type.name for one in GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F32", "Q4_0")


@NEEDS_GGUF
@pytest.mark.parametrize("top_bits", [16, 8], ids=["whole weights", "planes alone"])
def test_llama_cpp_generates_what_the_policy_does(tmp_path: Path, top_bits: int) -> None:
    """llama.cpp rounds activations to 8 bits, so each of its tokens must be as likely as the best one, or nearly so."""
    pytest.importorskip("llama_cpp")
    from loadtests.common.llama_cpp_peer import LlamaCpp

    nested = make_nested(tmp_path / "nested", num_experts=1, top_bits=top_bits)
    model = load_model(nested, torch.float32, CPU)
    for policy in ("quality", "fast"):
        export.export(nested, tmp_path / policy, "gguf", policy)
        tokens = LlamaCpp(tmp_path / policy / "model.gguf", 1, 1, 64).greedy(PROMPT, 12)
        tables = make_tables(model, [read_policies(nested, model.config)[policy]])
        with torch.inference_mode():
            logits = model(StepInputs.whole_sequences(torch.tensor([PROMPT + tokens])), None, tables).logits[
                len(PROMPT) - 1 : -1
            ]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        behind = (logits.amax(dim=1) - chosen) / logits.std(dim=1)
        assert behind.max() < 0.2, policy
