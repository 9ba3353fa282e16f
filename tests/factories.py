"""Tiny models, checkpoints and a tokenizer for tests. Everything is seeded; nothing is downloaded.

    save_tokenizer(path)                 a byte-level tokenizer: one token per byte, then BOS and EOS
    make_dense(path, **config)           a random dense LLaMA written by transformers, tokenizer beside it
    make_moe(path, ...)                  a converted checkpoint: FFNs split into experts, random gates, policies, frontier
    make_nested(path, ...)               one set of weights at 4 bits, 8 bits and whole

Random weights are drawn wide (initializer_range 0.2), so that logits are far apart and rounding cannot change a greedy token.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ladimo.checkpoint import (
    FRONTIER,
    TensorReader,
    copy_tokenizer,
    moe_config_json,
    read_config,
    read_json,
    write_json,
    write_policy,
    write_tensors,
)
from ladimo.convert.rounding.gptq import choose_scales, round_nearest
from ladimo.convert.source import model_parameters
from ladimo.model.config import MoeLayerConfig, moe_layers_to_json
from ladimo.model.nested.layers import EMBEDDING, TIED_HEAD, matrix_named
from ladimo.model.nested.weights import (
    NestedWeights,
    codes_to_rounding,
    low_plane,
    low_rounded_down,
    plane_to_nibbles,
    read_planes,
    rounded_down,
)
from ladimo.model.precision import NESTED_BITS
from ladimo.model.router import make_router, weight_dtype
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import Frontier, FrontierPoint, LayerRule, RoutingPolicy

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 256, 257
VOCAB_SIZE = 258
CONTEXT = 256
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# FFNs without a gate, and biases everywhere; attention and FFN read one norm.
PHI2: dict[str, Any] = {"model_type": "phi", "num_key_value_heads": 4}
HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# For heads of 8 channels, of which 6 are rotated.
PARTIAL_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.2, 1.9],
    "long_factor": [1.5, 4.0, 9.0],
}


def make_tokenizer(chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer in which every byte is a token, so every string survives encoding. It adds BOS in front."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(path: Path, chat_template: str = CHAT_TEMPLATE) -> None:
    make_tokenizer(chat_template).save_pretrained(path)


def make_dense(
    path: Path,
    *,
    model_type: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Write a random dense model: hidden size 32, FFN size 96, 3 layers, 4 query heads, 2 key/value heads.

    `model_type` is a family like LLaMA. `config` replaces fields of the configuration.
    """
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**fields, **config}))
        for name, parameter in model.named_parameters():  # all norms are 1 and all biases 0 at first, which would hide mistakes
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    save_tokenizer(path)
    return path


# An exact split of an FFN: its experts run in the order of their numbers, each with the weight one.
EXACT = {"router": "none", "expert_weight": "one"}


def make_moe(
    path: Path,
    *,
    dense: Path | None = None,
    seed: int = 0,
    num_experts: int = 4,
    top_k: int = 2,
    dense_layers: Sequence[int] = (1,),
    max_shard_bytes: int = 2**30,
    layer: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write a converted checkpoint of the model in `dense`; None converts a new `make_dense(seed=seed, **config)`.

    The experts are contiguous slices of the dense FFN, and the routers are random. `layer` sets further fields of
    `MoeLayerConfig` for every expert layer. The policies are full, quality, balanced and fast. On the frontier, the costs are
    exact for the given experts per token; the perplexities are invented, but in the right order.
    """
    if dense is None:
        with TemporaryDirectory() as temporary:
            return make_moe(
                path,
                dense=make_dense(Path(temporary), seed=seed, **config),
                seed=seed,
                num_experts=num_experts,
                top_k=top_k,
                dense_layers=dense_layers,
                max_shard_bytes=max_shard_bytes,
                layer=layer,
            )
    source = read_config(dense)
    assert source.intermediate_size % num_experts == 0
    expert_layer = MoeLayerConfig(
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=source.intermediate_size // num_experts,
        ffn_kind=source.ffn_kind,
        **(layer or {}),
    )
    layers = tuple(None if index in dense_layers else expert_layer for index in range(source.num_hidden_layers))
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", moe_config_json(read_json(dense / "config.json"), moe_layers_to_json(layers)))
    write_tensors(path, _moe_tensors(TensorReader(dense), layers, seed), max_shard_bytes)
    copy_tokenizer(dense, path)
    _write_policies(path, layers, top_k)
    return path


def make_nested(
    path: Path,
    *,
    dense: Path | None = None,
    num_experts: int = 4,
    dense_layers: Sequence[int] = (),
    top_bits: int = 16,
    **config: Any,
) -> Path:
    """Write a checkpoint of one set of weights at 4 bits, 8 bits and whole: every layer an exact split of its FFN, in which a
    policy's top_k says how many of the experts run, and rounding to the nearest in the place of a conversion's choice. With
    `top_bits` 8 it has no whole weights."""
    make_moe(path, dense=dense, num_experts=num_experts, top_k=num_experts, dense_layers=dense_layers, layer=EXACT, **config)
    reader = TensorReader(path)
    with torch.device("meta"):
        model = MoeTransformer(read_config(path))
    tensors = {name: reader.get(name) for name in reader.files}
    # All weights of two dimensions or more are nested, but for the embedding; these models have no router.
    tied, planes_only = model.lm_head is None, top_bits == 8
    matrices = [name for name, weight in model.named_parameters() if weight.ndim > 1 and not name.endswith("bias")]
    names = [name for name in matrices if name != EMBEDDING]
    if planes_only and not tied:
        names.append(EMBEDDING)
    for matrix in (*map(matrix_named, names), *([TIED_HEAD] if tied else [])):
        weights = tensors[matrix.weight]
        flat = weights.flatten(0, -2)
        scales = choose_scales(flat)
        high = round_nearest(flat, scales)
        rounding = codes_to_rounding(high, rounded_down(flat, scales))
        low_rounding = codes_to_rounding(low_plane(flat, high, scales), low_rounded_down(flat, high, scales))
        beside = {matrix.rounding: rounding, matrix.low_rounding: low_rounding, matrix.scales: scales}
        if planes_only:
            del tensors[matrix.weight]
            planes = {matrix.high: high, matrix.low: low_plane(flat, high, scales)}
            beside = {name: plane_to_nibbles(codes[:, : flat.shape[1]]) for name, codes in planes.items()}
            beside[matrix.scales] = scales
        tensors |= {name: tensor.view(*weights.shape[:-1], -1) for name, tensor in beside.items()}
    write_tensors(path, iter(tensors.items()))
    raw = read_json(path / "config.json")
    top = {"nested_top_bits": top_bits} if planes_only else {}
    write_json(path / "config.json", {**raw, "nested_bits": list(NESTED_BITS), **top})
    rules: dict[str, dict[str, Any]] = {
        "full": {},
        "quality": {"bits": 8, "attention_bits": 8},
        "fast": {"bits": 4, "attention_bits": 8},
    }
    for name, bits in {**rules, "balanced": {"bits": 8, "attention_bits": 4}}.items():
        rule = LayerRule(num_experts, renormalize=False, **bits)
        head_bits = None if name == "full" else 8 if name == "quality" else 4
        layers = tuple(None if layer is None else rule for layer in model.config.layers)
        write_policy(path, RoutingPolicy(name, "", layers, head_bits))
    return path


def nested_weights(*shape: int, seed: int = 0) -> NestedWeights:
    """Random matrices [..., N, K] with their planes, rounded to the nearest."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5
    flat = weights.flatten(0, -2)
    scales = choose_scales(flat)
    rounding = codes_to_rounding(round_nearest(flat, scales), rounded_down(flat, scales))
    lead = shape[:-1]
    return NestedWeights(weights, *read_planes(weights, rounding.view(*lead, -1), scales.view(*lead, -1)))


def split_ffn(gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Split a SwiGLU FFN into slices: [F, D], [F, D], [D, F] -> gate_up_proj [E, 2F/E, D], down_proj [E, D, F/E]."""
    gates, ups = gate_proj.chunk(num_experts), up_proj.chunk(num_experts)
    gate_up = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
    return gate_up, torch.stack(down_proj.chunk(num_experts, dim=1))


def _moe_tensors(reader: TensorReader, layers: tuple[MoeLayerConfig | None, ...], seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    converted = {f"model.layers.{index}.mlp": layer for index, layer in enumerate(layers) if layer is not None}
    for name, _ in model_parameters(read_config(reader.directory)):
        if name.split(".mlp.")[0] + ".mlp" not in converted:
            yield name, reader.get(name)
    for prefix, layer in converted.items():
        up_proj, down_proj = (reader.get(f"{prefix}.{part}_proj.weight") for part in ("up", "down"))
        if layer.ffn_kind == "gelu":
            gate_up, down = (
                torch.stack(up_proj.chunk(layer.num_experts)),
                torch.stack(down_proj.chunk(layer.num_experts, dim=1)),
            )
            yield f"{prefix}.experts.up_bias", torch.stack(reader.get(f"{prefix}.up_proj.bias").chunk(layer.num_experts))
            yield f"{prefix}.output_bias", reader.get(f"{prefix}.down_proj.bias")
        else:
            gate_up, down = split_ffn(reader.get(f"{prefix}.gate_proj.weight"), up_proj, down_proj, layer.num_experts)
        for name, parameter in make_router(up_proj.shape[1], layer).named_parameters():
            values = torch.randn(parameter.shape, generator=generator) / 4
            yield f"{prefix}.gate.{name}", values.to(weight_dtype(name, down.dtype))
        yield f"{prefix}.experts.gate_up_proj", gate_up
        yield f"{prefix}.experts.down_proj", down


def make_policies(layers: Sequence[MoeLayerConfig | None], top_k: int) -> list[RoutingPolicy]:
    """The policies full, quality, balanced and fast. `full` runs top_k experts per token, and `fast` runs one."""
    rules = {
        "full": LayerRule(top_k=top_k),
        "quality": LayerRule(top_k=top_k, mass=0.8),
        "balanced": LayerRule(top_k=top_k, mass=0.5, renormalize=False),
        "fast": LayerRule(top_k=1),
    }
    return [
        RoutingPolicy(name, f"test policy {name}", tuple(None if layer is None else rule for layer in layers))
        for name, rule in rules.items()
    ]


def rule_row(rule: LayerRule) -> Tensor:
    """The numbers of the rule as kernels read them: [len(RuleNumber)] float32."""
    return torch.tensor(RoutingPolicy("p", "", (rule,)).to_rows(1)[0][0])


def _write_policies(path: Path, layers: tuple[MoeLayerConfig | None, ...], top_k: int) -> None:
    config = read_config(path)
    policies = make_policies(layers, top_k)
    points = []
    for policy, share, perplexity in zip(policies, (1.0, 0.8, 0.5, 0.0), (10.0, 10.4, 11.0, 14.0), strict=True):
        write_policy(path, policy)
        experts = tuple(None if layer is None else 1.0 + share * (top_k - 1) for layer in layers)
        point = FrontierPoint(
            batch=1,
            policy=policy.name,
            active_parameters_ratio=config.active_parameters_ratio(experts),
            perplexity=perplexity,
            perplexity_ratio=perplexity / 9.5,
            experts_per_token=experts,
        )
        points.append(point)
    write_json(path / FRONTIER, Frontier(tuple(reversed(points))).to_dict())
