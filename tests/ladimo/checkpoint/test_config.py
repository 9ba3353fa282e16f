"""Configurations are read as transformers means them, and what is broken is refused by field."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladimo.checkpoint import (
    TensorReader,
    read_config,
    read_json,
)
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.families import read_model_config
from tests.factories import VOCAB_SIZE
from tests.ladimo.checkpoint.breaking import edit_config, load, refused


def test_config_that_does_not_fit_the_weights(dense_copy: Path) -> None:
    edit_config(dense_copy, vocab_size=VOCAB_SIZE + 1)
    refused(lambda: load(dense_copy), "model.embed_tokens.weight", str(VOCAB_SIZE + 1))


# config.json


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"llama"', "[" * 100_000, "1" * 5000, "\udcff{}"])
def test_config_that_is_no_json_object(dense_copy: Path, text: str) -> None:
    (dense_copy / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    refused(lambda: read_config(dense_copy), str(dense_copy / "config.json"))


def test_missing_config(tmp_path: Path) -> None:
    refused(lambda: read_config(tmp_path), str(tmp_path / "config.json"), "no such file")


def test_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    refused(lambda: read_config(tmp_path), str(tmp_path / "config.json"), "cannot be read")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gpt2"}, ["model_type", "gpt2"]),
        ({"model_type": "gemma2"}, ["model_type", "gemma2", "supported: llama, mistral, qwen2"]),
        ({"model_type": None}, ["model_type"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads"]),
        ({"head_dim": 7}, ["head_dim"]),
        ({"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": None}, ["head_dim"]),
        ({"num_hidden_layers": 10**6}, ["num_hidden_layers"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings"]),
        ({"attention_bias": 1}, ["attention_bias"]),
        ({"mlp_bias": "no"}, ["mlp_bias"]),
        *(({"rms_norm_eps": value}, ["rms_norm_eps"]) for value in (0, -1, "1e-6", [1], True, math.inf, math.nan, 10**400)),
        *(({"rope_parameters": value}, ["rope_parameters"]) for value in (3, "linear", [1])),
        *(({"rope_parameters": None, "rope_scaling": value}, ["rope_scaling"]) for value in (3, "linear", [1])),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["rope", "yarn"]),
        ({"rope_parameters": {"rope_type": ["linear"], "factor": 2.0}}, ["rope"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["rope", "factor"]),
        *(({"rope_parameters": {"rope_type": "linear", "factor": value}}, ["factor"]) for value in (0, "2", True, [2])),
        *(({"rope_parameters": {"rope_theta": value}}, ["rope_theta"]) for value in (-1, 0, "1e4", True, [2])),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}}, ["low_freq_factor"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": "x"}}, ["high_freq_factor"]),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 0.5}},
            ["original_max_position_embeddings"],
        ),
    ],
)
def test_config_that_is_no_llama_of_ours(dense_copy: Path, fields: dict[str, Any], named: list[str]) -> None:
    edit_config(dense_copy, **fields)
    refused(lambda: load(dense_copy), str(dense_copy / "config.json"), *named)


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", [0, -1, True, 2**40, "32", 32.0, [32]])
def test_absurd_sizes(dense_copy: Path, name: str, value: object) -> None:
    edit_config(dense_copy, **{name: value})
    refused(lambda: load(dense_copy), str(dense_copy / "config.json"), name, repr(value))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_junk_in_a_config_gives_a_config_or_a_value_error(moe_dir: Path, data: st.DataObject) -> None:
    raw = read_json(moe_dir / "config.json")
    scalars = st.none() | st.booleans() | st.integers(-2, 2**41) | st.just(10**400) | st.floats() | st.text(max_size=5)
    junk = data.draw(scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=5), scalars, max_size=3))
    place = data.draw(st.sampled_from([*raw, *(f"moe_layers.{name}" for name in MoeLayerConfig.__dataclass_fields__)]))
    if place.startswith("moe_layers."):
        raw["moe_layers"][0] |= {place.removeprefix("moe_layers."): junk}
    else:
        raw[place] = junk
    try:
        read_model_config(raw)
    except ValueError as error:
        named = {place.split(".")[-1]} | (
            {"moe_layers"} if place == "num_hidden_layers" else set()
        )  # then one of them is wrong
        assert place in ("model_type", "rope_parameters") or any(name in str(error) for name in named)  # noqa: PT017


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        *(({"num_experts": value}, "num_experts") for value in (0, -1, True, "4", 4.0, None, 2**40)),
        *(({"num_experts_per_tok": value}, "num_experts_per_tok") for value in (0, 5, True, "2")),
        *(({"moe_intermediate_size": value}, "moe_intermediate_size") for value in (0, True, 2.5)),
        *(({"score_norm_top_k": value}, "score_norm_top_k") for value in (0, 5, True, "2")),
        ({"score_function": "relu"}, "score_function"),
        ({"score_function": ["softmax"]}, "score_function"),
        ({"expert_weight": "two"}, "expert_weight"),
        ({"colour": 1}, "colour"),
    ],
)
def test_wrong_moe_layer_is_named(moe_copy: Path, entry: dict[str, Any], named: str) -> None:
    layers = read_json(moe_copy / "config.json")["moe_layers"]
    layers[2] |= entry
    edit_config(moe_copy, moe_layers=layers)
    refused(lambda: load(moe_copy), str(moe_copy / "config.json"), "moe_layers[2]", named)


@pytest.mark.parametrize("layers", [None, [], 3, [None], [3, None, None], [[], None, None], ["x", None, None]])
def test_wrong_moe_layers_are_named(moe_copy: Path, layers: object) -> None:
    edit_config(moe_copy, moe_layers=layers)
    refused(lambda: load(moe_copy), str(moe_copy / "config.json"), "moe_layers")


def test_active_parameters_ratio_counts_weights(moe_dir: Path, dense_dir: Path) -> None:
    """Against the sizes of the stored tensors: all experts on is everything in the file but embeddings and head."""

    def stored(directory: Path) -> int:
        reader = TensorReader(directory)
        return sum(
            math.prod(reader.shape(name)) for name in reader.files if "embed_tokens" not in name and "lm_head" not in name
        )

    config = read_config(moe_dir)
    assert read_config(dense_dir).dense_parameters == config.dense_parameters == stored(dense_dir)
    assert config.active_parameters_ratio((4.0, None, 4.0)) == pytest.approx(stored(moe_dir) / stored(dense_dir))
    one_less = 2 * 3 * 32 * 24 / stored(dense_dir)
    assert config.active_parameters_ratio((3.0, None, 3.0)) == pytest.approx(
        config.active_parameters_ratio((4.0, None, 4.0)) - one_less
    )
    biased = make_dense_config(attention_bias=True)
    assert biased.dense_parameters - make_dense_config().dense_parameters == 3 * (32 + 2 * 16 + 32)
    biased = make_dense_config(model_type="qwen2")
    assert biased.dense_parameters - make_dense_config().dense_parameters == 3 * (32 + 2 * 16)
    assert make_dense_config(model_type="mistral", sliding_window=None).dense_parameters == make_dense_config().dense_parameters


def make_dense_config(**fields: Any) -> ModelConfig:
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3}
    return read_model_config({"model_type": "llama", **sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **fields})


def test_an_unknown_family_of_a_converted_model_is_named_by_its_field(moe_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"^family is 'gpt9'; supported: "):
        read_model_config(read_json(moe_dir / "config.json") | {"family": "gpt9"})
