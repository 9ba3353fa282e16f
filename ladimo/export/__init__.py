"""Exports converted models for other programs. There is one file per target, and every target reads the same `DenseView`.

A target is an object with a name, a line of help and the method `write`. After `register` the command line knows it.
"""

import shutil
from pathlib import Path
from typing import Protocol

from ladimo.checkpoint import read_config, read_policies, resolve_directory
from ladimo.export.dense import DenseTarget
from ladimo.export.dense_view import DenseView
from ladimo.export.gguf import GgufTarget


class Target(Protocol):
    """Writes the model in the format of one kind of program."""

    name: str
    help: str

    def write(self, view: DenseView, out: Path) -> None:
        """Write the files into the empty directory `out`. Raises ValueError for a model that the format cannot represent."""


_TARGETS: dict[str, Target] = {}


def register(target: Target) -> None:
    """Make a target known under its name. It replaces an earlier target of the same name."""
    _TARGETS[target.name] = target


for _target in (DenseTarget(), GgufTarget()):
    register(_target)


def targets() -> dict[str, Target]:
    """The known targets by name."""
    return dict(_TARGETS)


def export(model: str | Path, out: Path, target: str, policy: str) -> None:
    """Write `model` as it runs under the named policy. The directory `out` appears when it is complete, or not at all.

    Raises ValueError if `out` exists, a name is unknown, or the target cannot represent the model under this policy.
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
