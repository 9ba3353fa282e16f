"""Exports converted models for other programs. There is one file per target, and every target reads the same `PolicyView`.

A target is an object with a name, a line of help and the methods of `Target`. After `register` the command line knows it.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from ladimo.checkpoint import read_config, read_policies, resolve_directory
from ladimo.export.checking import Check
from ladimo.export.dense import DenseTarget
from ladimo.export.gguf import GgufTarget
from ladimo.export.glm4_moe import Glm4MoeTarget
from ladimo.export.hugging_face import HuggingFaceTarget
from ladimo.export.mimo_v2 import MimoV2Target
from ladimo.export.mixtral import MixtralTarget
from ladimo.export.policy_view import PolicyView
from ladimo.export.qwen2_moe import Qwen2MoeTarget
from ladimo.policy import RoutingPolicy

logger = logging.getLogger(__name__)


class Target(Protocol):
    """Writes the model in the format of one kind of program."""

    name: str
    help: str

    def check(self, view: PolicyView) -> None:
        """Raises ValueError for a model that the format cannot represent. Reads no large tensor."""

    def write(self, view: PolicyView, out: Path) -> None:
        """Write the files into the empty directory `out`. Only called if `check` raises nothing."""

    def verify(self, check: Check, out: Path) -> None:
        """Read the written files back in another program. Raises ValueError if it does not compute what our network does."""


_TARGETS: dict[str, Target] = {}


def register(target: Target) -> None:
    """Make a target known under its name. It replaces an earlier target of the same name."""
    _TARGETS[target.name] = target


for _target in (DenseTarget(), Glm4MoeTarget(), MimoV2Target(), Qwen2MoeTarget(), MixtralTarget(), GgufTarget()):
    register(_target)


def targets() -> dict[str, Target]:
    """The known targets by name."""
    return dict(_TARGETS)


def export(model: str | Path, out: Path, target: str, policy: str, head_bits: int | None = None, float32: bool = False) -> None:
    """Write `model` as it runs under the named policy, and check that another program computes the same with the files.

    `head_bits`: how many bits of the output head are read, for every word, instead of what the policy says. `float32`: write
    all weights in fp32, so that those that a policy reads at fewer bits are not rounded. The directory `out` appears when it is
    complete and checked, or not at all. Raises ValueError if `out` exists, a name is unknown, the target cannot represent the
    model under this policy, or the check fails.
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
    chosen = policies[policy]
    if head_bits is not None:
        chosen = replace(chosen, head_bits=head_bits, head_refine=None)
        chosen.validate(config)
    if chosen.refines:
        raise ValueError(_refusal(chosen, policies))
    view = PolicyView(directory, config, chosen, torch.float32 if float32 else None)
    _check(view, target)
    if view.is_rounded and isinstance(_TARGETS[target], HuggingFaceTarget):
        logger.info("weights are rounded to %s; --float32 writes them exactly", str(view.dtype).removeprefix("torch."))
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _TARGETS[target].write(view, partial)
        _TARGETS[target].verify(Check(view), partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refusal(policy: RoutingPolicy, policies: Mapping[str, RoutingPolicy]) -> str:
    """Why a policy that refines cannot be exported, and what can."""
    neurons = any(rule is not None and rule.refine is not None for rule in policy.layers)
    what = "neurons" if neurons else "words of the output head"
    others = ", ".join(name for name, other in policies.items() if not other.refines)
    advice = f"export one that does not ({others})" if others else "export a policy that does not"
    if not neurons:
        advice = f"give the whole head one number of bits (--head-bits 8), or {advice}"
    return f"policy {policy.name!r}: each token chooses which {what} it reads at more bits, which no target can hold; {advice}"


def _check(view: PolicyView, target: str) -> None:
    """Raises ValueError if the target cannot represent the view, and says which targets can."""

    def refusal(name: str) -> ValueError | None:
        try:
            _TARGETS[name].check(view)
        except ValueError as error:
            return error
        return None

    error = refusal(target)
    if error is not None:
        able = [name for name in _TARGETS if refusal(name) is None]
        hint = f"try --target {' or '.join(able)}" if able else "no target can express that"
        raise ValueError(f"target {target!r}: {error}; {hint}") from error
