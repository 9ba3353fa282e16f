"""Checkpoints that a test may change."""

import shutil
from pathlib import Path

import pytest

from tests.factories import make_dense


@pytest.fixture
def dense_copy(dense_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dense_dir, tmp_path / "model")


@pytest.fixture
def moe_copy(moe_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(moe_dir, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_dense(tmp_path / "model", max_shard_size="20KB")
