"""A wrong source is refused before any work, by file and field."""

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ladimo.checkpoint import read_json, write_json
from ladimo.convert.pipeline import convert
from ladimo.convert.source import check_source
from tests.factories import make_dense
from tests.ladimo.convert.conftest import small_recipe

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def dense(dense_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dense_dir, tmp_path / "dense")


def refused(dense: Path, *parts: str) -> None:
    """Refused in one line that names every part, and by `convert` before anything is written."""
    before = sorted(dense.parent.rglob("*"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        convert(str(dense), dense.parent / "moe", small_recipe(), None)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(dense.parent.rglob("*")) == before


def edit_tensors(dense: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> str:
    file = dense / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    return str(file)


def edit_header(dense: Path, edit: Callable[[dict[str, Any]], object], length: int | None = None) -> str:
    """Rewrite the header of model.safetensors, and the length it claims to have; the tensors' bytes stay."""
    file = dense / "model.safetensors"
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + raw[8 + size :])
    return str(file)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_sound_source_is_accepted(tmp_path: Path, family: str, tied: bool) -> None:
    config = check_source(make_dense(tmp_path, model_type=family, tie_word_embeddings=tied, max_shard_size="30KB"))
    assert config.tie_word_embeddings is tied


@pytest.mark.parametrize("length", [2**63, 2**40, 10**6, 100, 1, 0])
def test_a_header_of_absurd_length(dense: Path, length: int) -> None:
    file = edit_header(dense, lambda header: None, length)
    refused(dense, file, "header")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("data_offsets", [0, 12288], "offset"),  # overlaps another
        ("data_offsets", [12288, 0], "offset"),
        ("data_offsets", [-4, 12284], "-4"),
        ("data_offsets", [2**62, 2**63], "offset"),
        ("data_offsets", [1, 2, 3], "header"),
        ("shape", [96, 31], "shape"),
        ("shape", [2**40, 2**40], "overflow"),
        ("shape", "wide", "header"),
        ("dtype", "F33", "F33"),
    ],
)
def test_a_header_with_one_wrong_field(dense: Path, field: str, value: object, named: str) -> None:
    refused(dense, edit_header(dense, lambda header: header[UP].update({field: value})), named)


def test_a_header_with_a_missing_field(dense: Path) -> None:
    refused(dense, edit_header(dense, lambda header: header[UP].pop("shape")), "shape")


def test_bytes_behind_the_last_tensor(dense: Path) -> None:
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0\0")
    refused(dense, str(file), "not fully covered")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("value", "named"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, dtype: torch.dtype, value: float, named: str) -> None:
    """One value anywhere, in a shard that no stage before the last layer would read."""
    dense = make_dense(tmp_path / "dense", dtype=dtype, max_shard_size="30KB")
    name = "model.layers.2.mlp.down_proj.weight"
    shard = dense / read_json(dense / "model.safetensors.index.json")["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][7, 11] = value
    save_file(tensors, shard)
    refused(dense, str(shard), name, named)


def test_quantised_weights_are_named(dense: Path) -> None:
    file = edit_tensors(dense, lambda tensors: tensors.__setitem__(UP, tensors[UP].to(torch.int8)))
    refused(dense, file, UP, "int8", "float32, float16, bfloat16")


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.scale"]
)
def test_a_tensor_that_the_configuration_does_not_know(dense: Path, name: str) -> None:
    """Left out, it would give another model than the file holds."""
    refused(dense, edit_tensors(dense, lambda tensors: tensors.__setitem__(name, torch.ones(4))), name, "config.json")


def test_a_tensor_that_older_releases_stored_is_ignored(dense: Path) -> None:
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit_tensors(dense, lambda tensors: tensors.__setitem__(name, torch.ones(4)))
    check_source(dense)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"model_type": "gpt2"},
            ["model_type is 'gpt2'; supported: llama, mistral, qwen2"],
        ),
        ({"model_type": "gemma3"}, ["'gemma3'"]),
        ({"model_type": None}, ["model_type is None"]),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}, ["hidden_size 32", "num_attention_heads 5"]),
        ({"hidden_size": 2**30}, ["hidden_size must be at most"]),
        ({"hidden_size": 2**24}, ["model.embed_tokens.weight", "[258, 32]"]),
        ({"vocab_size": -258}, ["vocab_size", "-258"]),
        ({"intermediate_size": 2**24}, ["model.layers.0.mlp.gate_proj.weight", "[96, 32]"]),
        ({"num_attention_heads": 2**14, "num_key_value_heads": 1, "head_dim": 2**14}, ["num_attention_heads * head_dim"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"num_hidden_layers": 2}, ["model.layers.2."]),
        ({"num_hidden_layers": 4}, ["model.layers.3.", "is missing"]),
        ({"max_position_embeddings": 10**12}, ["max_position_embeddings"]),
        ({"rms_norm_eps": math.nan}, ["rms_norm_eps", "nan"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": math.nan}}, ["rope_theta", "nan"]),
        ({"attention_bias": True}, ["model.layers.0.self_attn.q_proj.bias is missing"]),
        ({"tie_word_embeddings": None, "hidden_act": "relu"}, ["hidden_act is 'relu'"]),
    ],
)
def test_absurd_configurations(dense: Path, fields: dict[str, Any], named: list[str]) -> None:
    file = dense / "config.json"
    file.write_text(json.dumps({**read_json(file), **fields}))
    refused(dense, str(dense), *named)


@pytest.mark.parametrize(
    ("family", "fields", "works"),
    [
        ("mistral", {"sliding_window": 4096}, True),
        ("mistral", {"sliding_window": None, "max_position_embeddings": 10_000}, True),
        ("mistral", {"sliding_window": 255}, False),
        ("mistral", {"max_position_embeddings": 4097}, False),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, True),
        ("qwen2", {"sliding_window": 256, "use_sliding_window": True}, True),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True}, False),
        ("llama", {"sliding_window": 8}, True),  # means nothing there
    ],
)
def test_a_window_is_accepted_only_without_effect(tmp_path: Path, family: str, fields: dict[str, Any], works: bool) -> None:
    dense = make_dense(tmp_path / "dense", model_type=family)
    config = {**read_json(dense / "config.json"), **fields}
    if "sliding_window" not in fields:
        del config["sliding_window"]  # then it is the family's
    write_json(dense / "config.json", config)
    if works:
        check_source(dense)
    else:
        refused(dense, str(dense / "config.json"), "sliding_window", family, "max_position_embeddings")


def test_a_tokenizer_of_another_model(dense: Path) -> None:
    raw = read_json(dense / "tokenizer.json")
    vocab = raw["model"]["vocab"]
    vocab |= {f"more{number}": 300 + number for number in range(300)}
    write_json(dense / "tokenizer.json", raw)
    refused(dense, str(dense), "tokenizer", "vocab_size is 258")


def test_no_tokenizer(dense: Path) -> None:
    for file in dense.glob("tokenizer*"):
        file.unlink()
    refused(dense, str(dense), "has no tokenizer")
