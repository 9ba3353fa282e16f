"""What targets in Hugging Face layout have in common. Legend: D hidden_size, W width of an FFN."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ladimo.checkpoint import write_json, write_tensors
from ladimo.export.checking import Check
from ladimo.export.layer_forms import RoutedExperts
from ladimo.export.policy_view import Ffn, PolicyView

Tensors = Iterator[tuple[str, Tensor]]


class HuggingFaceTarget(ABC):
    """A model type of transformers. `config` refuses what it cannot express; `ffn_tensors` writes the rest."""

    name: str
    help: str

    @abstractmethod
    def config(self, view: PolicyView) -> dict[str, Any]:
        """The content of config.json. Raises ValueError if the model type cannot compute what the view computes."""

    @abstractmethod
    def ffn_tensors(self, view: PolicyView, layer: int, config: dict[str, Any]) -> Tensors:
        """The tensors of a layer's FFN or experts, with the names on disk."""

    def attention_tensors(self, view: PolicyView) -> Tensors:
        """All other tensors."""
        return view.common_tensors()

    def check(self, view: PolicyView) -> None:
        """Raises ValueError if the model type cannot compute what the view computes."""
        self.config(view)

    def write(self, view: PolicyView, out: Path) -> None:
        """Write config.json, the weights and the tokenizer into the directory `out`."""
        config = self.config(view)
        write_json(out / "config.json", config)
        write_tensors(out, self.tensors(view, config))
        view.copy_tokenizer(out)

    def verify(self, check: Check, out: Path) -> None:
        """Compare the logits of transformers with our own. Raises ValueError if they differ, or if transformers lacks a tensor
        or knows nothing of one."""
        from transformers import AutoModelForCausalLM

        with _quiet():
            model, found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found[problem]:
                raise ValueError(f"transformers reports {problem.replace('_', ' ')}: {sorted(found[problem])[0]}")
        with torch.inference_mode():
            logits = model.eval()(check.ids, use_cache=False).logits.flatten(0, 1)
        check.compare(logits, f"transformers with target {self.name!r}", check.view.is_rounded)

    def tensors(self, view: PolicyView, config: dict[str, Any]) -> Tensors:
        """All tensors, with the names on disk."""
        yield from self.attention_tensors(view)
        for layer in range(view.source.num_hidden_layers):
            yield from self.ffn_tensors(view, layer, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def routed_layers(view: PolicyView, shared: bool = False) -> dict[int, RoutedExperts]:
    """The layers that choose by token. `shared`: whether the model type has shared experts with a gate of their own.

    Raises ValueError if there are no such layers, and for a shared expert that the model type cannot have.
    """
    routed = view.routed
    if not routed:
        raise ValueError(f"policy {view.policy.name!r} runs the same experts for every token, so the model has no router")
    for layer, form in routed.items():
        if form.shared_width and not shared:
            raise ValueError(f"{view.name(layer)}: has a shared expert with a gate, the target has none")
    return routed


def same_everywhere(view: PolicyView, routed: dict[int, RoutedExperts]) -> RoutedExperts:
    """The one form of all routed layers, for model types that have one number of experts and one top-k.

    Raises ValueError naming two layers that differ.
    """
    (first, form), *others = routed.items()
    for layer, other in others:
        for what, a, b in (
            ("experts per token", form.top_k, other.top_k),
            ("experts to choose from", len(form.choices), len(other.choices)),
            ("neurons in its shared expert", form.shared_width, other.shared_width),
        ):
            if a != b:
                raise ValueError(f"{view.name(layer)} has {b} {what}, layer {first} has {a}; they must be equal")
        if form.normalised != other.normalised:
            raise ValueError(f"{view.name(layer)} and layer {first} weigh experts differently")
    return form


def plain_softmax(view: PolicyView, shared: bool = False) -> RoutedExperts:
    """The form of a model that routes by softmax alone, the same in all routed layers. Raises ValueError for any other."""
    routed = routed_layers(view, shared)
    for layer, form in routed.items():
        if form.score_function != "softmax":
            raise ValueError(f"{view.name(layer)}: scores by {form.score_function}, the target by softmax")
        if form.selection_bias:
            raise ValueError(f"{view.name(layer)}: has a selection bias, the target has none")
    return same_everywhere(view, routed)


def refuse_parts(view: PolicyView, *known: str) -> None:
    """Raises ValueError for a part of the model that the target lacks. `known`: the parts, of those below, that it has."""
    source = view.source
    parts = {
        "output bias": (source.attention_output_bias, "a bias on the attention's output"),
        "head norms": (source.qk_norm == "head", "norms of queries and keys"),
        "norms": (source.qk_norm == "all", "norms of queries and keys over all heads"),
        "partial rotary": (source.rotary_dim < source.head_dim, "heads that are rotated in part"),
        "no gate": (source.ffn_kind == "gelu", "FFNs without a gate"),
        "longrope": (source.rope.type == "longrope", "RoPE of type longrope"),
    }
    for part, (present, what) in parts.items():
        if present and part not in known:
            raise ValueError(f"the model has {what}, which the target lacks")


def dense_tensors(prefix: str, ffn: Ffn) -> Tensors:
    """The three matrices of an FFN under `prefix`."""
    for name, matrix in zip(("gate", "up", "down"), ffn, strict=True):
        yield f"{prefix}{name}_proj.weight", matrix


def expert_width(view: PolicyView) -> int:
    """The neurons of the widest routed expert. Narrower ones are padded with zeros."""
    widths = [moe.moe_intermediate_size for index, moe in enumerate(view.source.layers) if moe and index in view.routed]
    return max(widths)


def expert_tensors(prefix: str, experts: Ffn, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Tensors:
    """Experts [N, ...] as one tensor per matrix, numbered from 0."""
    for number in range(len(experts[0])):
        for name, matrices in zip(names, experts, strict=True):
            yield f"{prefix}experts.{number}.{name}.weight", matrices[number]
