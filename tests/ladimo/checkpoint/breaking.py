"""Breaking checkpoints, and what is said of broken ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ladimo.checkpoint import (
    load_model,
)

CPU = torch.device("cpu")


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


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file
