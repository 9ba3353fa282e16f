"""Our forward pass against transformers' models of each family: whole sequences, prefill, chunks, decode, and all mixed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import load_model, read_config, read_json, read_policies
from ladimo.model.cpu.build import library
from ladimo.model.cpu.native_step import NativeStep
from ladimo.model.families import read_model_config
from ladimo.model.inputs import StepInputs
from ladimo.model.transformer import MoeTransformer
from tests.factories import HALF_ROPE, LINEAR_ROPE, LLAMA3_ROPE, PARTIAL_LONGROPE, VOCAB_SIZE, make_dense
from tests.ladimo.native import Cached
from tests.ladimo.stepping import Row, Stepper, make_tables

CPU = torch.device("cpu")
LENGTH = 75  # beyond the 32 positions that the llama3 rope configuration was "trained" on
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "linear_rope": {"rope_parameters": LINEAR_ROPE},
    "theta_500000": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "attention_bias": {"attention_bias": True},
    "head_dim_16": {"head_dim": 16},
    "sharded": {"max_shard_size": "20KB"},
    "rms_norm_eps": {"rms_norm_eps": 0.1},
    "mistral": {"model_type": "mistral", "head_dim": 16},
    "mistral_window_null": {
        "model_type": "mistral",
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3_default_head_dim": {"model_type": "qwen3", "num_attention_heads": 2, "tie_word_embeddings": True},
    "phi2": {"model_type": "phi", "num_key_value_heads": 4},
    "phi2_grouped": {"model_type": "phi", "head_dim": 16, "rope_parameters": HALF_ROPE},
    "phi3": {"model_type": "phi3"},
    "phi3_partial": {
        "model_type": "phi3",
        "rope_parameters": HALF_ROPE,
    },
    "phi4_mini_long": {"model_type": "phi3", "rope_parameters": PARTIAL_LONGROPE, "original_max_position_embeddings": 32},
    "phi4_mini_short": {
        "model_type": "phi3",
        "rope_parameters": PARTIAL_LONGROPE,
        "original_max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "qwen3_biases": {"model_type": "qwen3", "head_dim": 10, "attention_bias": True, "num_key_value_heads": 4},
}


@pytest.fixture(scope="module", params=CONFIGS)
def dense_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[MoeTransformer, Tensor, Tensor]:
    """Our model, tokens [2, S] and transformers' logits [2, S, V] for them."""
    path = make_dense(tmp_path_factory.mktemp(request.param), **CONFIGS[request.param])
    ids = torch.randint(VOCAB_SIZE, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = theirs(ids).logits
    assert logits.abs().max() > 1  # else the tolerance below would say little
    return load_model(path, torch.float32, CPU), ids, logits


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4


def stepper(model: MoeTransformer) -> Stepper:
    return Stepper(model, make_tables(model, []))


def test_sharded_source_is_sharded(tmp_path: Path) -> None:
    assert len(list(make_dense(tmp_path, **CONFIGS["sharded"]).glob("*.safetensors"))) > 2


@torch.no_grad()
def test_whole_sequences(dense_pair: tuple[MoeTransformer, Tensor, Tensor]) -> None:
    model, ids, theirs = dense_pair
    out = model(StepInputs.whole_sequences(ids, policy_id=0), None, make_tables(model, []))
    assert_same(out.logits, theirs.flatten(0, 1))
    assert out.expert_ids is None


@torch.no_grad()
def test_logit_indices_choose_tokens(dense_pair: tuple[MoeTransformer, Tensor, Tensor]) -> None:
    model, ids, theirs = dense_pair
    chosen = torch.tensor([LENGTH - 1, 3, 2 * LENGTH - 1])
    whole = StepInputs.whole_sequences(ids, policy_id=0)
    inputs = StepInputs(whole.input_ids, whole.positions, whole.policy_ids, num_sequences=2, logit_indices=chosen)
    assert_same(model(inputs, None, make_tables(model, [])).logits, theirs.flatten(0, 1)[chosen])


def test_prefill_in_one_segment(dense_pair: tuple[MoeTransformer, Tensor, Tensor]) -> None:
    model, ids, theirs = dense_pair
    assert_same(stepper(model).step(prefill=[(Row(ids[0].tolist()), LENGTH)])[0], theirs[0])


def test_prefill_in_uneven_chunks(dense_pair: tuple[MoeTransformer, Tensor, Tensor]) -> None:
    model, ids, theirs = dense_pair
    steps, row = stepper(model), Row(ids[0].tolist())
    chunks = [7, 1, 20, 4, 3, 40]
    assert sum(chunks) == LENGTH
    assert_same(torch.cat([steps.step(prefill=[(row, count)])[0] for count in chunks]), theirs[0])


def test_decode_token_by_token(dense_pair: tuple[MoeTransformer, Tensor, Tensor]) -> None:
    """Two sequences advance together, so that their blocks interleave."""
    model, ids, theirs = dense_pair
    steps, rows = stepper(model), [Row(row) for row in ids.tolist()]
    logits = [steps.step(decode=rows) for _ in range(LENGTH)]
    assert not set(rows[0].blocks) & set(rows[1].blocks)
    assert rows[0].blocks != sorted(rows[0].blocks)
    for sequence in range(2):
        assert_same(torch.cat([step[sequence] for step in logits]), theirs[sequence])


@pytest.mark.skipif(library() is None, reason="there is no compiled CPU kernel here")
def test_the_compiled_step_prefills_decodes_and_mixes(dense_pair: tuple[MoeTransformer, Tensor, Tensor]) -> None:
    """Two sequences, of which one starts in chunks while the other is decoded."""
    model, ids, theirs = dense_pair
    steps, (first, second) = Cached(model, NativeStep(model, "float32", 1), []), [Row(row) for row in ids.tolist()]
    found: tuple[list[Tensor], list[Tensor]] = [steps.step(prefill=[(first, 30)])[0]], []
    for count in (20, 7, 1):
        decoded, chunk = steps.step(decode=[first], prefill=[(second, count)])
        found[0].append(decoded)
        found[1].append(chunk)
    for _ in range(LENGTH - 33):
        decoded, other = steps.step(decode=[first, second])
        found[0].append(decoded)
        found[1].append(other)
    for sequence, logits in enumerate(found):
        ours = torch.cat(logits)
        assert_same(ours, theirs[sequence, : len(ours)])


def test_mixed_step(dense_pair: tuple[MoeTransformer, Tensor, Tensor]) -> None:
    """Three decoding rows, a first chunk and a later chunk in one step."""
    model, ids, theirs = dense_pair
    first, second = ids.tolist()
    steps = stepper(model)
    decode = [Row(first), Row(second), Row(first)]
    later = Row(second)
    for row, count in zip([*decode, later], (30, 1, 44, 17), strict=True):
        steps.step(prefill=[(row, count)])
    logits = steps.step(decode=decode, prefill=[(Row(first), 12), (later, 25)])
    for ours, sequence, begin in zip(logits, (0, 1, 0, 0, 1), (30, 1, 44, 0, 17), strict=True):
        assert_same(ours, theirs[sequence, begin : begin + len(ours)])


def test_mixed_step_of_moe_under_different_policies(moe_dir: Path) -> None:
    """Every row of a mixed step gives what it gives alone under its own policy, and the policies do differ."""
    model = load_model(moe_dir, torch.float32, CPU)
    tables = make_tables(model, list(read_policies(moe_dir, model.config).values()))
    tokens = torch.randint(VOCAB_SIZE, (60,), generator=torch.Generator().manual_seed(2)).tolist()

    def rows() -> list[Row]:
        return [Row(list(tokens), policy) for policy in (1, 2, 3, 4, 1, 2)]

    def run(steps: Stepper, rows: list[Row]) -> list[Tensor]:
        for row in rows:
            if row.policy < 3:
                steps.step(prefill=[(row, 20)])
        decode = [row for row in rows if row.computed]
        return steps.step(decode=decode, prefill=[(row, 33) for row in rows if not row.computed])

    together = run(Stepper(model, tables), rows())
    alone = [run(Stepper(model, tables), [row])[0] for row in rows()]
    decoding, prefilling = [alone[i] for i in (0, 1, 4, 5)], [alone[2], alone[3]]
    for ours, theirs in zip(together, [*decoding, *prefilling], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (decoding[0] - decoding[1]).abs().max() > 1e-2
    assert (prefilling[0] - prefilling[1]).abs().max() > 1e-2


@torch.no_grad()
def test_moe_decode_equals_whole_sequence(moe_dir: Path) -> None:
    model = load_model(moe_dir, torch.float32, CPU)
    tables = make_tables(model, list(read_policies(moe_dir, model.config).values()))
    tokens = torch.randint(VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(3))
    for policy in range(1, 5):
        whole = model(StepInputs.whole_sequences(tokens[None], policy), None, tables)
        steps, row = Stepper(model, tables), Row(tokens.tolist(), policy)
        decoded = torch.cat([steps.step(decode=[row])[0] for _ in tokens])
        assert_same(decoded, whole.logits)
        assert whole.expert_ids.shape == (3, 40, 4)
        assert (whole.expert_ids[1] == -1).all()  # layer 1 is dense


def test_older_spelling_of_rope_is_read_alike(tmp_path: Path) -> None:
    """Releases before transformers 5 wrote rope_theta and rope_scaling, some with "type" for "rope_type"."""
    for rope in (LLAMA3_ROPE, LINEAR_ROPE):
        config_file = make_dense(tmp_path, rope_parameters={**rope, "rope_theta": 500000.0}) / "config.json"
        raw = json.loads(config_file.read_text())
        del raw["rope_parameters"]
        raw["rope_theta"] = 500000.0
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
        for name in ("rope_type", "type"):
            older = read_model_config({**raw, "rope_scaling": {**scaling, name: rope["rope_type"]}})
            assert older == read_config(tmp_path)
        assert older.rope.theta == 500000.0


@torch.no_grad()
def test_longrope_without_a_cache_has_the_frequencies_of_the_texts_length(tmp_path: Path) -> None:
    """Over a cache it has those of the context, which the operator may shorten."""
    path = make_dense(tmp_path, **CONFIGS["phi4_mini_long"])
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    whole, short = load_model(path, torch.float32, CPU), load_model(path, torch.float32, CPU, context=32)
    for length in (32, 33):
        ids = torch.randint(VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(1))
        expected = theirs(ids).logits
        assert_same(whole(StepInputs.whole_sequences(ids), None, make_tables(whole, [])).logits, expected.flatten(0, 1))
        cached = stepper(short if length == 32 else whole).step(prefill=[(Row(ids[0].tolist()), length)])[0]
        assert_same(cached, expected[0])
    assert (stepper(whole).step(prefill=[(Row(ids[0].tolist()), 32)])[0] - expected[0, :32]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_earlier_spellings_of_longrope_are_read_alike(kind: str, tmp_path: Path) -> None:
    """As Phi-3 and Phi-4-mini were published."""
    path = make_dense(tmp_path, **CONFIGS["phi4_mini_long"])
    raw = read_json(path / "config.json")
    published = {name: value for name, value in raw.items() if name != "rope_parameters"}
    factors = {name: PARTIAL_LONGROPE[name] for name in ("short_factor", "long_factor")}
    published |= {"rope_scaling": {"type": kind, **factors}, "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    assert read_model_config(published) == read_config(path)
    assert read_config(path).rope.attention_factor > 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"short_factor": [1.0, 1.2]}, "short_factor must have one number for each of the 3 frequencies, it has 2"),
        ({"long_factor": None}, "long_factor must be a list of numbers, got None"),
        ({"long_factor": [1.0, -1.0, 2.0]}, r"long_factor\[1\] must be a positive number, got -1.0"),
        ({"partial_rotary_factor": 0.7}, "partial_rotary_factor 0.7 of head_dim 8 is 5 channels; it must be an even number"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor must be at most 1, got 2.0"),
    ],
)
def test_a_rotary_embedding_that_does_not_fit_is_refused_by_field(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    raw = read_json(make_dense(tmp_path, **CONFIGS["phi4_mini_long"]) / "config.json")
    with pytest.raises(ValueError, match=message):
        read_model_config({**raw, "rope_parameters": {**raw["rope_parameters"], **fields}})


@pytest.mark.parametrize("name", ["self_attn.qkv_proj", "mlp.gate_up_proj"])
def test_fused_projections_with_too_many_rows_are_found(name: str, tmp_path: Path) -> None:
    file = make_dense(tmp_path, **CONFIGS["phi3"]) / "model.safetensors"
    tensors, stored = load_file(file), f"model.layers.1.{name}.weight"
    save_file({**tensors, stored: torch.cat((tensors[stored], tensors[stored][:8]))}, file)
    with pytest.raises(ValueError, match=r"layers\.1\.(self_attn\.v_proj|mlp\.up_proj)\.weight has shape"):
        load_model(tmp_path, torch.float32, CPU)
