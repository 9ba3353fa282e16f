"""Checkpoint directories: what is written is read back, and what is broken is refused by file and field."""

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ladimo.checkpoint import (
    FRONTIER,
    INDEX,
    POLICIES,
    TensorReader,
    choose_device,
    choose_dtype,
    content_hash,
    copy_tokenizer,
    load_layer,
    load_model,
    load_without_layers,
    read_config,
    read_frontier,
    read_json,
    read_policies,
    resolve_directory,
    stored_dtype,
    write_json,
    write_policy,
    write_tensors,
    write_text,
)
from ladimo.model.config import ModelConfig, MoeLayerConfig
from ladimo.model.families import read_model_config
from ladimo.model.inputs import StepInputs
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import VOCAB_SIZE, make_dense, make_moe
from tests.ladimo.stepping import make_tables

CPU = torch.device("cpu")
NORM = "model.norm.weight"


@pytest.fixture
def dense_copy(dense_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dense_dir, tmp_path / "model")


@pytest.fixture
def moe_copy(moe_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(moe_dir, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_dense(tmp_path / "model", max_shard_size="20KB")


def refused(call: Callable[[], object], *parts: str) -> None:
    """The call raises a ValueError whose one line names every part."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def edit_config(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def load(directory: Path) -> object:
    return load_model(directory, torch.float32, CPU)


# Tensors


@pytest.mark.parametrize("limit", [2**30, 400, 1])
def test_written_tensors_are_read_back(tmp_path: Path, limit: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(i + 1, 10, generator=generator).to(torch.bfloat16) for i in range(8)}
    tensors["transposed"] = torch.randn(6, 4, generator=generator).t()
    write_tensors(tmp_path, iter(tensors.items()), max_shard_bytes=limit)
    files = sorted(file.name for file in tmp_path.iterdir())
    if limit == 2**30:
        assert files == ["model.safetensors"]
    else:
        shards = {400: 3, 1: 9}[limit]
        assert files == [*(f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)), INDEX]
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert read_json(tmp_path / INDEX)["metadata"]["total_size"] == total
    reader = TensorReader(tmp_path)
    assert set(reader.files) == set(tensors)
    for name, tensor in tensors.items():
        assert name in reader
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.get(name).dtype == tensor.dtype
        assert torch.equal(reader.get(name), tensor)
    assert "other" not in reader


def test_a_shard_stays_under_its_limit(tmp_path: Path) -> None:
    write_tensors(tmp_path, ((f"t{i}", torch.zeros(25)) for i in range(10)), max_shard_bytes=300)
    sizes = [sum(t.numel() * 4 for t in load_file(file).values()) for file in tmp_path.glob("*.safetensors")]
    assert sorted(sizes) == [100, 300, 300, 300]


@torch.no_grad()
def test_sharded_moe_is_the_unsharded_one(moe_dir: Path, dense_dir: Path, tmp_path: Path) -> None:
    sharded = make_moe(tmp_path, dense=dense_dir, max_shard_bytes=20_000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    ids = torch.randint(VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(0))
    logits = []
    for directory in (moe_dir, sharded):
        model = load_model(directory, torch.float32, CPU)
        tables = make_tables(model, [read_policies(directory, model.config)["full"]])
        logits.append(model(StepInputs.whole_sequences(ids), None, tables).logits)
    assert torch.equal(*logits)


@torch.no_grad()
def test_layers_loaded_one_by_one_are_the_model(moe_dir: Path) -> None:
    """The making half holds one layer in memory at a time; the pieces must be the whole."""
    whole = load_model(moe_dir, torch.float32, CPU)
    tables = make_tables(whole, [read_policies(moe_dir, whole.config)["balanced"]])
    inputs = StepInputs.whole_sequences(torch.arange(12)[None])
    reader, config = TensorReader(moe_dir), read_config(moe_dir)
    outside = load_without_layers(reader, config, torch.float32, CPU)
    assert len(outside.model.layers) == 0
    hidden_states = outside.model.embed_tokens(inputs.input_ids)
    rope = outside.rotary(inputs.positions, torch.float32)
    for index in range(config.num_hidden_layers):
        layer = load_layer(reader, config, index, torch.float32, CPU)
        hidden_states, _ = layer(hidden_states, rope, inputs, None, tables.rules(inputs.policy_ids))
    assert torch.equal(outside.logits(hidden_states), whole(inputs, None, tables).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = make_dense(tmp_path, dtype=dtype)
    assert stored_dtype(directory) == dtype
    assert choose_dtype("auto", directory, CPU) == torch.float32
    assert choose_dtype("auto", directory, torch.device("cuda")) == dtype
    assert choose_dtype("bfloat16", directory, CPU) == torch.bfloat16
    assert {p.dtype for p in load_model(directory, torch.bfloat16, CPU).parameters()} == {torch.bfloat16}
    refused(lambda: choose_dtype("int8", directory, CPU), "int8", "bfloat16")


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    refused(lambda: choose_device("gpu"), "'gpu'")
    refused(lambda: choose_device("meta"), "'meta'")


# Broken weights


@pytest.mark.parametrize("keep", [0, 4, 7, 100, -1])
def test_truncated_file_is_named(dense_copy: Path, keep: int) -> None:
    file = dense_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(lambda: load(dense_copy), str(file), "truncated")


def test_file_of_another_format_is_named(dense_copy: Path) -> None:
    file = dense_copy / "model.safetensors"
    file.write_bytes(b"PK\x03\x04 a zip archive of pickles" * 100)
    refused(lambda: load(dense_copy), str(file), "safetensors")


def test_no_weights(dense_copy: Path) -> None:
    (dense_copy / "model.safetensors").unlink()
    refused(lambda: load(dense_copy), str(dense_copy), "model.safetensors")


def test_missing_shard_is_named(sharded: Path) -> None:
    load(sharded)
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(lambda: load(sharded), str(shard), "no such file")


def test_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(lambda: load(sharded), str(shard))


def test_shard_without_its_tensor_is_named(sharded: Path) -> None:
    home = TensorReader(sharded).files[NORM]
    save_file({"other": torch.zeros(1), **{k: v for k, v in load_file(home).items() if k != NORM}}, home)
    refused(lambda: load(sharded), str(home), NORM)


def test_index_cannot_point_outside_the_directory(sharded: Path) -> None:
    index = read_json(sharded / INDEX)
    outside = sharded.parent / "outside.safetensors"
    save_file({NORM: torch.zeros(32)}, outside)
    index["weight_map"][NORM] = "../outside.safetensors"
    write_json(sharded / INDEX, index)
    refused(lambda: load(sharded), str(sharded / "outside.safetensors"))


@pytest.mark.parametrize("index", ["[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{", "", "\udcff"])
def test_broken_index_is_named(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index, encoding="utf-8", errors="surrogateescape")
    refused(lambda: load(sharded), str(sharded / INDEX))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


def test_missing_tensor_is_named(dense_copy: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(dense_copy, lambda tensors: tensors.__delitem__(name))
    refused(lambda: load(dense_copy), str(dense_copy), name)


def test_wrong_shape_is_named(dense_copy: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    file = rewrite(dense_copy, lambda tensors: tensors.__setitem__(name, torch.zeros(95, 32)))
    refused(lambda: load(dense_copy), str(file), name, "[95, 32]", "[96, 32]")


def test_quantised_weights_are_refused(dense_copy: Path) -> None:
    """Integers of the right shape would load as numbers that mean nothing without their scales."""
    name = "model.layers.2.mlp.up_proj.weight"
    file = rewrite(dense_copy, lambda tensors: tensors.__setitem__(name, torch.zeros(96, 32, dtype=torch.int8)))
    refused(lambda: load(dense_copy), str(file), name, "int8")


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
        ({"model_type": "gemma2"}, ["model_type", "gemma2", "llama, mistral, qwen2, ladimo_llama"]),
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


# Policies and frontier


def test_policies_are_read_back(moe_dir: Path, moe_copy: Path) -> None:
    config = read_config(moe_dir)
    assert set(read_policies(moe_dir, config)) == {"full", "quality", "balanced", "fast"}
    policy = RoutingPolicy("mine", "ä ✓", (LayerRule(1, mass=0.5), None, LayerRule(2, experts=(1, 3))))
    write_policy(moe_copy, policy)
    again = read_policies(moe_copy, config)["mine"]
    assert again == policy
    assert again.version == policy.version


def test_dense_checkpoint_has_the_policy_full(dense_dir: Path) -> None:
    policies = read_policies(dense_dir, read_config(dense_dir))
    assert {name: policy.layers for name, policy in policies.items()} == {"full": (None, None, None)}
    assert read_frontier(dense_dir) is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "policy"),
        ('{"name": "fast", "layers": [{"top_k": 0}, null, {"top_k": 1}]}', "layers[0].top_k"),
        ('{"name": "fast", "layers": [{"top_k": 1, "mass": NaN}, null, {"top_k": 1}]}', "layers[0].mass"),
        ('{"name": "fast", "layers": [{"top_k": 5}, null, {"top_k": 1}]}', "layers[0].top_k"),
        ('{"name": "fast", "layers": []}', "layers"),
        ('{"name": "slow", "layers": [{"top_k": 1}, null, {"top_k": 1}]}', "slow"),
    ],
)
def test_broken_policy_file_is_named(moe_copy: Path, text: str, named: str) -> None:
    file = moe_copy / POLICIES / "fast.json"
    file.write_text(text)
    refused(lambda: read_policies(moe_copy, read_config(moe_copy)), str(file), named)


def test_missing_policy_full(moe_copy: Path) -> None:
    (moe_copy / POLICIES / "full.json").unlink()
    refused(lambda: read_policies(moe_copy, read_config(moe_copy)), str(moe_copy / POLICIES), "full.json")
    shutil.rmtree(moe_copy / POLICIES)
    refused(lambda: read_policies(moe_copy, read_config(moe_copy)), str(moe_copy / POLICIES), "full.json")


def test_frontier_is_read_back(moe_dir: Path) -> None:
    frontier = read_frontier(moe_dir)
    assert frontier is not None
    assert [point.policy for point in frontier.points] == ["fast", "balanced", "quality", "full"]


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"points": []}', '{"points": [{}]}', '{"points": {}}', "1" * 5000])
def test_broken_frontier_is_named(moe_copy: Path, text: str) -> None:
    (moe_copy / FRONTIER).write_text(text)
    refused(lambda: read_frontier(moe_copy), str(moe_copy / FRONTIER))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '"10"', "1" + "0" * 400])
def test_frontier_without_a_finite_perplexity_is_named(moe_copy: Path, value: str) -> None:
    file = moe_copy / FRONTIER
    file.write_text(re.sub(r'"perplexity": [0-9.]+', f'"perplexity": {value}', file.read_text(), count=1))
    refused(lambda: read_frontier(moe_copy), str(file), "points[0].perplexity")


# Writing


@pytest.mark.parametrize("fault", ["replace", "fsync"])
def test_interrupted_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def fail(*args: object) -> None:
        raise OSError("the disk is full")

    file = tmp_path / "a" / "policy.json"
    write_text(file, "old")
    with monkeypatch.context() as patch:
        if fault == "replace":
            patch.setattr(Path, "replace", fail)
        else:
            patch.setattr("ladimo.checkpoint.files.os.fsync", fail)
        with pytest.raises(OSError, match="disk is full"):
            write_text(file, "new")
        with pytest.raises(OSError, match="disk is full"):
            write_text(tmp_path / "b" / "fresh.json", "new")
    assert file.read_text() == "old"
    assert not (tmp_path / "b" / "fresh.json").exists()
    write_text(file, "new")
    assert file.read_text() == "new"
    assert [entry.name for entry in file.parent.iterdir()] == ["policy.json"]


def test_leftover_of_an_interrupted_write_is_no_policy(moe_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("the machine stopped")

    config = read_config(moe_copy)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="stopped"):
            write_policy(moe_copy, RoutingPolicy("mine", "", (LayerRule(1), None, LayerRule(1))))
    assert set(read_policies(moe_copy, config)) == {"full", "quality", "balanced", "fast"}


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"perplexity": math.nan})
    assert read_json(tmp_path / "a.json") == {"old": 1}


# Directories


def test_directory_is_resolved(dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_directory(dense_dir) == dense_dir
    assert resolve_directory(str(dense_dir)) == dense_dir
    for name in ("no-such-model", "./a/b", "/no/such/model", "/missing", "~/model", str(dense_dir / "config.json")):
        refused(partial(resolve_directory, name), name, "no such directory")

    def unreachable(*args: object, **options: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    refused(lambda: resolve_directory("meta-llama/Llama-2-7b"), "meta-llama/Llama-2-7b", "ConnectionError")


def test_hub_download_takes_no_code(dense_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(dense_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_directory("owner/model") == dense_dir
    assert asked["name"] == "owner/model"
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".pth", "*")) for pattern in asked["allow_patterns"])


def test_tokenizer_is_copied(dense_dir: Path, tmp_path: Path) -> None:
    copy_tokenizer(dense_dir, tmp_path)
    copied = {file.name for file in tmp_path.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= copied
    assert not copied & {"config.json", "model.safetensors"}


def test_content_hash(dense_dir: Path, dense_copy: Path) -> None:
    """Equal for equal content wherever it lies; another for any changed byte of config or weights, not of other files."""
    assert content_hash(dense_copy) == content_hash(dense_dir)
    (dense_copy / "README.md").write_text("a card")
    assert content_hash(dense_copy) == content_hash(dense_dir)
    rewrite(dense_copy, lambda tensors: tensors[NORM].add_(1e-3))
    changed = content_hash(dense_copy)
    assert changed != content_hash(dense_dir)
    edit_config(dense_copy, rms_norm_eps=1e-5)
    assert content_hash(dense_copy) not in (changed, content_hash(dense_dir))
