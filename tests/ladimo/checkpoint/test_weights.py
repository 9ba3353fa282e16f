"""Weights: what is written is read back, and what is broken is refused by file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ladimo.checkpoint import (
    INDEX,
    TensorReader,
    choose_device,
    choose_dtype,
    load_layer,
    load_model,
    load_without_layers,
    read_config,
    read_json,
    read_policies,
    stored_dtype,
    write_json,
    write_tensors,
)
from ladimo.model.inputs import StepInputs
from tests.factories import VOCAB_SIZE, make_dense, make_moe
from tests.ladimo.checkpoint.breaking import load, refused, rewrite
from tests.ladimo.stepping import make_tables

CPU = torch.device("cpu")
NORM = "model.norm.weight"


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
        hidden_states, added, *_ = layer(hidden_states, rope, inputs, None, tables.rules(inputs.policy_ids))
        hidden_states = hidden_states + added
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
