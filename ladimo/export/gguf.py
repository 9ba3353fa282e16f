"""Export to a GGUF file for llama.cpp.

The file holds what another target writes for transformers, under llama.cpp's names. A plain LLaMA and Mixtral become the
architecture `llama`, GLM4-MoE becomes `glm4moe`. `llama` expects the rows of the query and key projections in the interleaved
order of the original LLaMA code. transformers stores the two halves of each head one after the other. `_interleaved` changes
the order.

Matrices have the type of the stored weights. Where a policy reads 4 or 8 bits of nested weights, they become Q4_0 and Q8_0 with
the same integers.
"""

import importlib.util
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ladimo.export.checking import Check
from ladimo.export.dense import DenseTarget
from ladimo.export.gguf_blocks import Q4_0, Q8_0, to_blocks
from ladimo.export.gguf_tokenizer import add_tokenizer, find_splitting
from ladimo.export.glm4_moe import Glm4MoeTarget
from ladimo.export.hugging_face import HuggingFaceTarget
from ladimo.export.mixtral import MixtralTarget
from ladimo.export.policy_view import PolicyView, StepsView
from ladimo.model.config import RopeConfig
from ladimo.model.families import read_rope
from ladimo.model.layers import rope_inverse_frequencies

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERT_NAMES = {
    "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps",
}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
EXPERT = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight")
ROUTER = "ffn_gate_inp"
# Words, numbers, spaces, marks, code and other scripts: what tokenizers split differently.
SAMPLE = (
    "The model's 12345 words: I'll  say\n\n\tdef f(x):\n    return x**2 #1\r\nna\u00efve caf\u00e9, \u4f60\u597d \U0001f600!!\n"
)
# By what share of itself a weight changes at most in a file.
ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-10, Q4_0: 2.0**-10, Q8_0: 2.0**-10}
SMALLEST_SCALE = 128 * 2.0**-25  # half of what fp16 can tell apart, times the largest integer
FILE_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Architecture:
    """interleaved: whether rows of queries and keys are interleaved. scaled_rope: whether a file can scale the frequencies.
    biases: whether the attention can have biases. second_norm: the name of the norm before the FFN."""

    name: str
    interleaved: bool
    scaled_rope: bool
    biases: bool
    second_norm: str


LLAMA = Architecture("llama", interleaved=True, scaled_rope=True, biases=True, second_norm="ffn_norm")
GLM4_MOE = Architecture("glm4moe", interleaved=False, scaled_rope=False, biases=True, second_norm="post_attention_norm")
QWEN3 = Architecture("qwen3", interleaved=False, scaled_rope=False, biases=False, second_norm="ffn_norm")
# By model type of transformers.
ARCHITECTURES = {"llama": LLAMA, "qwen2": LLAMA, "qwen3": QWEN3, "mixtral": LLAMA, "glm4_moe": GLM4_MOE}


class GgufTarget:
    """The target `gguf`."""

    name = "gguf"
    help = "model.gguf for llama.cpp, as dense, mixtral or glm4"
    forms: tuple[HuggingFaceTarget, ...] = (DenseTarget(), MixtralTarget(), Glm4MoeTarget())

    def check(self, view: PolicyView) -> None:
        """Raises ValueError if the package gguf is missing, or none of the forms that llama.cpp knows fits the view."""
        self._form(view)
        if importlib.util.find_spec("gguf") is None:
            raise ValueError("the package gguf is not installed (pip install 'ladimo[bench]')")

    def write(self, view: PolicyView, out: Path) -> None:
        """Write model.gguf. Raises ValueError as `add_tokenizer` does."""
        if find_splitting(view.directory) is None:
            logger.warning("gguf: the tokenizer is not one that can be written for llama.cpp, so the file takes token ids")
        form = self._form(view)
        config = form.config(view)
        tensors, steps = form.tensors(_exact(view, PolicyView), config), None
        if view.source.nested_bits:
            steps = form.tensors(_exact(view, StepsView), config)
        write_gguf(out / "model.gguf", config, tensors, FILE_TYPES[view.dtype], view.directory, steps)

    def verify(self, check: Check, out: Path) -> None:
        """Check the same tensors in transformers, the numbers in the file, and the file itself in llama.cpp if llama-cpp-python
        is installed."""
        form = self._form(check.view)
        with TemporaryDirectory(dir=out) as copy:
            form.write(check.view, Path(copy))
            form.verify(check, Path(copy))
        view = check.view
        config = form.config(view)
        tensors = form.tensors(_exact(view, PolicyView), config)
        integers = _check_tensors(out / "model.gguf", config, tensors)
        if importlib.util.find_spec("llama_cpp") is None:
            logger.warning("llama-cpp-python is not installed, so the file itself was not run")
            return
        model = _load(out / "model.gguf", check.ids.shape[1])
        try:
            _check_tokens(model, check.view.directory)
            # llama.cpp rounds activations to the type of the matrices, and to 8 bits where these are integers.
            check.compare(_logits(model, check.ids), "llama.cpp", view.dtype != torch.float32, integers)
        finally:
            model.close()

    def _form(self, view: PolicyView) -> HuggingFaceTarget:
        reasons = []
        for form in self.forms:
            try:
                config = form.config(view)
                if config["model_type"] not in ARCHITECTURES:
                    raise ValueError(f"it is written as {config['model_type']}, for which there is no GGUF form here")
                architecture = ARCHITECTURES[config["model_type"]]
                if view.source.attention_bias and not architecture.biases:
                    raise ValueError("llama.cpp reads no biases in the attention for it, the model has some")
                if view.source.rope.type != "default" and not architecture.scaled_rope:
                    raise ValueError(f"llama.cpp reads only plain RoPE for it, the model has type {view.source.rope.type}")
            except ValueError as error:
                reasons.append(f"as {form.name}: {error}")
            else:
                return form
        raise ValueError("; ".join(reasons))


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    weights: str,
    tokenizer: Path | None = None,
    steps: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write a model of a type in `ARCHITECTURES`. `config`: its config.json. `tensors`: its tensors with the names
    on disk. `weights`: the type of matrices in the file, which is F32, F16, BF16, Q8_0 or Q4_0. `tokenizer`: the directory of
    its tokenizer; None for a file without one. `steps`: of weights that are rounded already, those of `to_blocks`, in the order
    of `tensors`. Where their blocks fit, the matrix gets the type of these."""
    import gguf

    architecture = ARCHITECTURES[config["model_type"]]
    heads, rope = config["num_attention_heads"], read_rope(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * config.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope.theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer, tokenizer, config["vocab_size"])
    if config["model_type"] == "mixtral":
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "glm4_moe":
        _add_glm4_moe(writer, config)
    if rope.type != "default":
        assert architecture.scaled_rope
        writer.add_tensor("rope_freqs.weight", _rope_factors(rope, head_dim).numpy())
    quantization = gguf.GGMLQuantizationType[weights]
    if steps is not None:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    grids = repeat(None) if steps is None else (grid for _, grid in _arranged(config, steps))
    for (name, tensor), grid in zip(_arranged(config, tensors), grids, strict=steps is not None):
        is_matrix = tensor.ndim > 1 and ROUTER not in name
        blocks = to_blocks(tensor, grid) if grid is not None and is_matrix else None
        if blocks is None:
            stored = quantization if is_matrix else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), stored), raw_dtype=stored)
        else:
            writer.add_tensor(name, blocks[0], raw_dtype=gguf.GGMLQuantizationType[blocks[1]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_glm4_moe(writer: Any, config: Mapping[str, Any]) -> None:
    import gguf

    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_nextn_predict_layers(0)


def _exact(view: PolicyView, kind: type[PolicyView]) -> PolicyView:
    """The same model in fp32, which holds all that any bits stand for."""
    return kind(view.directory, view.source, view.policy, torch.float32)


def _arranged(config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors as a file has them, in fp32, under llama.cpp's names."""
    architecture = ARCHITECTURES[config["model_type"]]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for name, tensor in _stacked(tensors):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        matrix = tensor.float()
        if architecture.interleaved and (".q_proj." in name or ".k_proj." in name):
            matrix = _interleaved(matrix, head_dim)
        yield _gguf_name(name, architecture), matrix.contiguous()


def _check_tensors(file: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> bool:
    """Compare the file's tensors with what it was to hold. Returns whether some are integers.

    Raises ValueError if one differs by more than its type rounds.
    """
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, tensor in _arranged(config, tensors):
        kind = stored[name].tensor_type.name
        found = torch.tensor(gguf.quants.dequantize(stored[name].data, stored[name].tensor_type))
        allowed = ROUNDING.get(kind, 0.0) * tensor.abs() + SMALLEST_SCALE
        if not bool(((found.view_as(tensor) - tensor).abs() <= allowed).all()):
            raise ValueError(f"{file.name}: the tensor {name} does not hold the model's weights in type {kind}")
    return any(tensor.tensor_type.name in (Q4_0, Q8_0) for tensor in stored.values())


def _stacked(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, with the experts of a layer joined to one tensor [E, ...] under the name of its kind."""
    pending: dict[str, list[Tensor]] = {}
    for name, tensor in tensors:
        found = EXPERT.fullmatch(name)
        if found is None:
            yield name, tensor
            continue
        layer, number, kind = found.groups()
        stack = pending.setdefault(f"blk.{layer}.{EXPERT_NAMES[kind]}.weight", [])
        assert len(stack) == int(number), "experts come in their order"
        stack.append(tensor)
        for finished in [name for name in pending if not name.startswith(f"blk.{layer}.")]:
            yield finished, torch.stack(pending.pop(finished))
    for finished, stack in pending.items():
        yield finished, torch.stack(stack)


def _gguf_name(name: str, architecture: Architecture) -> str:
    if name.startswith("blk."):
        return name
    stem, kind = name.rsplit(".", 1)
    if stem in ENDS:
        return f"{ENDS[stem]}.{kind}"
    _, _, index, rest = stem.split(".", 3)
    if kind == "e_score_correction_bias":
        return f"blk.{index}.exp_probs_b.bias"
    ours = architecture.second_norm if rest == "post_attention_layernorm" else LAYER_NAMES[rest]
    return f"blk.{index}.{ours}.{kind}"


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of [heads * head_dim, ...]: in each head, row i + head_dim / 2 follows row i."""
    halves = weight.view(-1, 2, head_dim // 2, *weight.shape[1:])
    return torch.stack(halves.unbind(dim=1), dim=2).view_as(weight)


def _rope_factors(rope: RopeConfig, head_dim: int) -> Tensor:
    """What llama.cpp divides the plain frequencies by: [head_dim / 2]."""
    return rope_inverse_frequencies(RopeConfig(rope.theta), head_dim) / rope_inverse_frequencies(rope, head_dim)


def _load(file: Path, context: int) -> Any:
    """The file in llama.cpp, with a cache in fp32, as ours."""
    import llama_cpp

    kinds = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(str(file), n_ctx=context, n_batch=context, logits_all=True, verbose=False, **kinds)


def _logits(model: Any, ids: Tensor) -> Tensor:
    """What llama.cpp computes: ids [B, S] -> logits [B * S, V]."""
    found = []
    for row in ids.tolist():
        model.reset()
        model.eval(row)
        found.append(torch.from_numpy(model.scores[: len(row)].copy()))
    return torch.cat(found)


def _check_tokens(model: Any, directory: Path) -> None:
    """Raises ValueError if llama.cpp reads a text as other tokens than the model's own tokenizer."""
    if find_splitting(directory) is None:
        return
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(directory)(SAMPLE, add_special_tokens=False).input_ids
    found = model.tokenize(SAMPLE.encode(), add_bos=False, special=False)
    if found != expected:
        place = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(found))
        raise ValueError(f"llama.cpp reads a text as other tokens than the tokenizer, from token {place} on")
