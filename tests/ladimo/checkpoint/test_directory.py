"""What lies beside the weights: policies, frontier, tokenizer. Files are written whole or not at all."""

import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ladimo.checkpoint import (
    FRONTIER,
    POLICIES,
    content_hash,
    copy_tokenizer,
    read_config,
    read_frontier,
    read_json,
    read_policies,
    resolve_directory,
    write_json,
    write_policy,
    write_text,
)
from ladimo.policy import LayerRule, RoutingPolicy
from tests.ladimo.checkpoint.breaking import edit_config, refused, rewrite

NORM = "model.norm.weight"


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
