"""Converted models for other programs: one file per target, all of them reading the same `DenseView`.

A target is an object with a name, a line of help and `write`. Another one calls `register`; the command line then knows it.
"""

import shutil
from pathlib import Path
from typing import Protocol

from ladimo.checkpoint import read_config, read_policies, resolve_directory
from ladimo.export.dense import DenseTarget
from ladimo.export.dense_view import DenseView
from ladimo.export.gguf import GgufTarget


class Target(Protocol):
    """Writes the model for one kind of program."""

    name: str
    help: str

    def write(self, view: DenseView, out: Path) -> None:
        """Fill the empty directory `out`. Raises ValueError for a model that the target cannot hold."""


_TARGETS: dict[str, Target] = {}


def register(target: Target) -> None:
    """Make a target known under its name. A target of the same name is replaced."""
    _TARGETS[target.name] = target


for _target in (DenseTarget(), GgufTarget()):
    register(_target)


def targets() -> dict[str, Target]:
    """The known targets by name."""
    return dict(_TARGETS)


def export(model: str | Path, out: Path, target: str, policy: str) -> None:
    """Write `model`, run under the policy of this name, to the directory `out`, which appears whole or not at all.

    Raises ValueError when `out` exists, a name is unknown, or the target cannot hold what the policy does.
    """
    if target not in _TARGETS:
        raise ValueError(f"target {target!r}: supported: {', '.join(_TARGETS)}")
    if out.exists():
        raise ValueError(f"{out}: exists already")
    directory = resolve_directory(model)
    config = read_config(directory)
    policies = read_policies(directory, config)
    if policy not in policies:
        raise ValueError(f"policy {policy!r}: {model} has {', '.join(policies)}")
    view = DenseView(directory, config, policies[policy])
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _TARGETS[target].write(view, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
