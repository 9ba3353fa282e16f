"""The compiled forward step against torch, and what it promises beyond: a token's bits depend on its own sequence alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ladimo.checkpoint import load_to_serve
from ladimo.model.config import ModelConfig
from ladimo.model.cpu import build
from ladimo.model.cpu.arena import Arena
from ladimo.model.cpu.native_step import NativeStep
from ladimo.model.cpu.packing import Packer, pack
from ladimo.model.cpu.pool import Pool
from ladimo.model.inputs import RoutingTables, StepInputs
from ladimo.model.moe import ExpertLayer
from ladimo.model.quantization import GROUP, dequantize, find_format, quantize
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import PARTIAL_LONGROPE, VOCAB_SIZE, make_dense, make_moe
from tests.ladimo.native import Cached, load, prompts
from tests.ladimo.stepping import Row, Stepper, make_tables

pytestmark = pytest.mark.skipif(build.library() is None, reason="there is no compiled CPU kernel here")

MODELS: dict[str, dict[str, Any]] = {
    "linear_router": {},
    "sigmoid_with_bias": {"layer": {"score_function": "sigmoid", "selection_bias": True}},
    "glu_router": {"layer": {"router": "glu"}},
    "mlp_router": {"layer": {"router": "mlp", "router_hidden_size": 7}},
    "table_router": {"layer": {"router": "table", "router_hidden_size": 5, "expert_weight": "one"}, "top_k": 3},
    "no_router": {"layer": {"router": "none", "expert_weight": "one"}, "top_k": 3},
    "scores_divided": {"layer": {"score_norm_top_k": 2}},
    "fixed_experts": {"layer": {"score_function": "sigmoid", "fixed_experts": 1}},
    "six_experts": {"num_experts": 6},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 10},
    "phi2": {"model_type": "phi", "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi4_mini": {"model_type": "phi3", "rope_parameters": PARTIAL_LONGROPE},
    "output_bias": {"attention_bias": True},
    "mha_tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "mqa_wide_heads": {"head_dim": 80, "num_key_value_heads": 1},
}


@pytest.mark.parametrize(
    ("name", "block_size"),
    [*((name, size) for name in MODELS for size in (4, 16)), ("linear_router", 24), ("linear_router", 32)],
)
@pytest.mark.usefixtures("width")
def test_logits_are_torchs(tmp_path: Path, name: str, block_size: int) -> None:
    """Prompts, chunks, decoding and all of them mixed, each row under another policy."""
    model, policies = load(make_moe(tmp_path, **MODELS[name]))
    reference = Stepper(model, make_tables(model, policies), block_size)
    native = Cached(model, NativeStep(model, "float32", 2), policies, block_size)

    def run(steps: Stepper) -> list[Tensor]:
        rows = [Row(list(tokens), 1 + index % len(policies)) for index, tokens in enumerate(prompts(5))]
        logits = steps.step(prefill=[(rows[0], 20), (rows[1], 7)])
        logits += steps.step(decode=rows[:2], prefill=[(rows[2], 33), (rows[3], 1)])
        logits += steps.step(prefill=[(rows[1], 21)])
        logits += steps.step(prefill=[(rows[4], 40)])
        for _ in range(6):
            logits += steps.step(decode=rows)
        return logits

    for ours, theirs in zip(run(native), run(reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


RULES = {
    "top1": LayerRule(1),
    "all": LayerRule(4, renormalize=False),
    "mass": LayerRule(4, mass=0.6, renormalize=False),
    "floor": LayerRule(4, floor=0.2),
    "mass_and_floor": LayerRule(3, mass=0.7, floor=0.1),
    "relative_floor": LayerRule(4, relative_floor=0.7),
    "both_floors": LayerRule(4, floor=0.1, relative_floor=0.9, renormalize=False),
    "mask": LayerRule(2, experts=(0, 3)),
    "static": LayerRule(3, renormalize=False, experts=(1, 2, 3)),
    "mask_smaller_than_k": LayerRule(4, mass=0.5, experts=(2,)),
}


@pytest.mark.parametrize("layer", [{}, {"score_function": "sigmoid", "selection_bias": True}, {"score_norm_top_k": 2}])
def test_experts_are_torchs_under_every_rule(tmp_path: Path, layer: dict[str, Any]) -> None:
    """All rules in one batch, a padded row among them: it chooses nothing."""
    model, _ = load(make_moe(tmp_path, layer=layer))
    policies = [
        RoutingPolicy(name, "", tuple(None if moe is None else rule for moe in model.config.layers))
        for name, rule in RULES.items()
    ]
    steps = Stepper(model, make_tables(model, policies), num_blocks=256)
    native = Cached(model, NativeStep(model, "float32", 2), policies)
    rows = [Row(list(tokens), index + 1) for index, tokens in enumerate(prompts(len(RULES)))]
    rows.append(Row(prompts(1)[0], policy=0))
    inputs = steps.inputs(prefill=[(row, 50) for row in rows])
    with torch.no_grad():
        expected = model(inputs, steps.kv_cache, steps.tables)
    logits, ids, _ = native.native(inputs, native.kv_cache, native.tables)
    assert expected.expert_ids is not None and ids is not None
    assert torch.equal(ids, expected.expert_ids)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=2e-5)
    assert (ids[:, -50:] == -1).all()
    assert len({tuple(part.flatten().tolist()) for part in ids.split(50, dim=1)}) == len(rows)


@pytest.mark.parametrize(
    ("format", "kv_heads", "head_dim"),
    [
        ("float32", 2, None),
        ("float32", 4, 16),
        ("bfloat16", 2, None),
        ("bfloat16", 4, None),
        ("bfloat16", 2, 16),
        ("int8", 2, None),
        ("int4", 2, None),
    ],
)
@pytest.mark.usefixtures("width")
def test_a_token_has_the_same_bits_in_any_company(tmp_path: Path, format: str, kv_heads: int, head_dim: int | None) -> None:
    """Alone or among others, in one chunk or several, decoded or recomputed, on one thread or three. With 4 key heads, a head
    of a decoded token has one query. Heads of 16 channels are read where they are, or copied, others are copied."""
    sizes: dict[str, Any] = {"head_dim": head_dim} if head_dim else {}
    model, policies = load(make_moe(tmp_path, intermediate_size=256, num_key_value_heads=kv_heads, **sizes), torch.bfloat16)
    sequences = prompts(9)
    alone = Cached(model, NativeStep(model, format, 1), policies)
    expected = []
    for index, tokens in enumerate(sequences):
        row = Row(list(tokens), 1 + index % len(policies))
        first = alone.step(prefill=[(row, 30)])[0]
        expected.append(torch.cat([first, *(alone.step(decode=[row])[0] for _ in range(30))]))
    together = Cached(model, NativeStep(model, format, 3, wake_threads_from=0), policies, block_size=16)
    rows = [Row(list(tokens), 1 + index % len(policies)) for index, tokens in enumerate(sequences)]
    chunks: list[list[Tensor]] = [[] for _ in rows]
    for counts in ([7] * 9, [1] * 8 + [20], [22, 30, 17, 3, 2, 1, 1, 9, 33], [30, 22, 35, 49, 50, 51, 51, 43, 0]):
        counts[8] = min(counts[8], 60 - rows[8].computed)
        asked = [(row, count) for row, count in zip(rows, counts, strict=True) if count]
        for (row, _), logits in zip(asked, together.step(prefill=asked), strict=True):
            chunks[rows.index(row)].append(logits)
    for parts, whole in zip(chunks, expected, strict=True):
        assert torch.equal(torch.cat(parts), whole[: sum(map(len, parts))])
    again = [Row(list(tokens), 1 + index % len(policies), blocks=[]) for index, tokens in enumerate(sequences)]
    together.step(prefill=[(row, 30) for row in again])
    for place in range(30, 40):
        for logits, whole in zip(together.step(decode=again), expected, strict=True):
            assert torch.equal(logits[0], whole[place])


@pytest.mark.usefixtures("width")
def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    model, policies = load(make_moe(tmp_path), torch.bfloat16)
    exact, _ = load(tmp_path)
    exact.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()}, assign=True)
    inputs = Cached(model, NativeStep(model, "bfloat16", 1), policies)
    logits = inputs.step(prefill=[(Row(prompts(1)[0]), 60)])[0]
    expected = Stepper(exact, make_tables(exact, policies)).step(prefill=[(Row(prompts(1)[0]), 60)])[0]
    close = F.cosine_similarity(logits, expected, dim=-1)
    assert close.median() > 0.999
    assert not torch.equal(logits, expected)


@pytest.mark.parametrize(("format", "least"), [("int8", 0.995), ("int4", 0.8)])
@pytest.mark.usefixtures("width")
def test_integer_weights_compute_what_they_stand_for(tmp_path: Path, format: str, least: float) -> None:
    """Against torch on the rounded weights only the rounding of activations is left; against the weights as they were, more."""
    model, policies = load(make_dense(tmp_path, intermediate_size=128))
    native = Cached(model, NativeStep(model, format, 2), policies)
    tokens = prompts(1)[0]
    ours = native.step(prefill=[(Row(list(tokens), 0), 60)])[0]

    def torchs() -> Tensor:
        steps = Stepper(model, make_tables(model, []))
        return steps.step(prefill=[(Row(list(tokens), 0), 60)])[0]

    original = torchs()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.copy_(dequantize(*quantize(parameter, find_format(format))))
    rounded = torchs()
    assert F.cosine_similarity(ours, rounded, dim=-1).min() > 0.99
    assert F.cosine_similarity(ours, original, dim=-1).median() > least
    assert (ours - rounded).norm() < (ours - original).norm()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_rounding_is_within_half_a_step(format: str) -> None:
    weights = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    weights[3, :GROUP] = 0
    form = find_format(format)
    integers, scales = quantize(weights, form)
    assert integers.max() <= form.highest and integers.min() == form.lowest
    error = (dequantize(integers, scales) - weights).abs().unflatten(1, (-1, GROUP))
    step = scales.unsqueeze(2).abs()
    inside = weights.unflatten(1, (-1, GROUP)).abs() <= step * form.highest
    assert (error <= step * 0.5001)[inside].all()
    assert (dequantize(integers, scales)[3, :GROUP] == 0).all()


def test_a_static_subset_reads_only_its_experts(tmp_path: Path) -> None:
    """At any batch size: the other experts hold what would spoil every number."""
    model, _ = load(make_moe(tmp_path, dense_layers=(), layer={"router": "none", "expert_weight": "one"}))
    subset = RoutingPolicy("half", "", (LayerRule(2, renormalize=False, experts=(0, 1)),) * 3)
    tokens = prompts(9)

    def logits() -> Tensor:
        steps = Cached(model, NativeStep(model, "float32", 2), [subset])
        rows = [Row(list(one)) for one in tokens]
        steps.step(prefill=[(row, 20) for row in rows])
        return torch.cat(steps.step(decode=rows))

    whole = logits()
    for layer in model.model.layers:
        assert isinstance(layer.mlp, ExpertLayer)
        layer.mlp.experts.gate_up_proj[2:] = torch.nan
        layer.mlp.experts.down_proj[2:] = torch.nan
    assert torch.equal(logits(), whole)


def test_only_wanted_logits(tmp_path: Path) -> None:
    model, policies = load(make_moe(tmp_path))
    steps = Cached(model, NativeStep(model, "float32", 1), policies)
    inputs = steps.inputs(prefill=[(Row(prompts(1)[0]), 30)])
    whole = steps.native(inputs, steps.kv_cache, steps.tables).logits
    some = StepInputs(**{**{f: getattr(inputs, f) for f in inputs.__slots__}, "logit_indices": torch.tensor([29, 3])})
    assert torch.equal(steps.native(some, steps.kv_cache, steps.tables).logits, whole[[29, 3]])
    none = StepInputs(
        **{**{f: getattr(inputs, f) for f in inputs.__slots__}, "logit_indices": torch.tensor([], dtype=torch.int64)}
    )
    assert steps.native(none, steps.kv_cache, steps.tables).logits.shape == (0, VOCAB_SIZE)


def test_released_weights_are_gone_and_the_step_still_works(tmp_path: Path) -> None:
    model, policies = load(make_moe(tmp_path))
    expected = Cached(model, NativeStep(model, "float32", 1), policies).step(prefill=[(Row(prompts(1)[0]), 9)])[0]
    released = NativeStep(model, "float32", 1, release=True)
    assert all(weight.numel() == 0 for weight in model.model.layers.parameters())
    steps = Cached(model, released, policies)
    assert torch.equal(steps.step(prefill=[(Row(prompts(1)[0]), 9)])[0], expected)


def test_weights_are_in_memory_once(tmp_path: Path) -> None:
    """Also those of an embedding that is the output head, too."""
    model, policies = load(make_dense(tmp_path, tie_word_embeddings=True, intermediate_size=128), torch.bfloat16)
    expected = Cached(model, NativeStep(model, "bfloat16", 1), policies).step(prefill=[(Row(prompts(1)[0], 0), 9)])[0]
    stored = sum(weight.nbytes for weight in model.parameters())
    step = NativeStep(model, "bfloat16", 1, release=True)
    assert model.model.embed_tokens.weight.numel() == 0
    assert step.weight_bytes < 1.1 * stored
    assert torch.equal(Cached(model, step, policies).step(prefill=[(Row(prompts(1)[0], 0), 9)])[0], expected)


def test_a_block_of_the_cache_is_one_piece_of_memory(tmp_path: Path) -> None:
    """With all of its layers, so that few tokens touch few pages."""
    model, policies = load(make_moe(tmp_path))
    steps = Cached(model, NativeStep(model, "float32", 1), policies)
    row, caches = Row(prompts(1)[0]), (steps.kv_cache.k, steps.kv_cache.v)
    for cache in caches:
        cache.zero_()
    steps.step(prefill=[(row, 9)])
    for cache in caches:
        per_block = cache.flatten().view(cache.shape[1], -1)
        assert per_block.any(dim=1).nonzero().flatten().tolist() == sorted(row.blocks[:3])


def test_without_a_compiler_torch_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "which", lambda name: None)
    with pytest.raises(build.BuildError, match="no C compiler"):
        build.compiled(tmp_path)
    build._find.cache_clear()
    try:
        assert build.library() is None
        directory = make_dense(tmp_path)
        assert load_to_serve(directory, "cpu").backend.name == "torch"
        with pytest.raises(ValueError, match="quantize int8: there is no compiled kernel"):
            load_to_serve(directory, "cpu", "auto", "int8")
    finally:
        build._find.cache_clear()


def test_a_build_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "step.c").write_text("int main(void) { return nothing; }")
    with pytest.raises(build.BuildError, match="nothing"):
        build.compiled(tmp_path / "cache", code=build.Code(tmp_path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_was_compiled_is_used_again(tmp_path: Path) -> None:
    code = build.Code(tmp_path)
    (tmp_path / "step.c").write_text('#include "step.h"\nint one(void) { return ONE; }')
    (tmp_path / "step.h").write_text("#define ONE 1")
    first = build.compiled(tmp_path / "cache", code=code)
    made = first.stat().st_mtime_ns
    assert build.compiled(tmp_path / "cache", code=code) == first
    assert first.stat().st_mtime_ns == made
    (tmp_path / "step.h").write_text("#define ONE 2")
    assert build.compiled(tmp_path / "cache", code=code) != first


def test_models_the_kernel_cannot_run_are_left_to_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_to_serve(make_dense(tmp_path / "half"), "cpu", "float16")
    assert (model.backend.name, model.backend.dtype) == ("torch", torch.float16)
    assert "float16" in caplog.text
    odd = make_dense(tmp_path / "odd", hidden_size=48, num_attention_heads=4)
    with pytest.raises(ValueError, match="hidden_size 48 is not a multiple of 32"):
        load_to_serve(odd, "cpu", "auto", "int8")


def packer() -> Packer:
    code = build.library()
    assert code is not None
    return Packer(Pool(code, 2), Arena())


def test_packing_is_a_permutation() -> None:
    weights = torch.arange(80 * 6, dtype=torch.float32).view(80, 6)
    packed = pack(weights, "float32", packer())
    assert (packed.rows, packed.panels, packed.cols) == (80, 5, 6)
    assert packed.data is not None
    words = packed.data.view(torch.float32)
    assert torch.equal(words[: 64 * 6].view(6, 64), weights[:64].t())
    assert torch.equal(words[64 * 6 :].view(6, 16), weights[64:].t())


@pytest.mark.parametrize(("format", "parts"), [("int8", 1), ("int4", 2)])
def test_packing_rounds_as_quantize_does(format: str, parts: int) -> None:
    """Scales are numbers of bf16. Of two scales with nearly the same error, either may be taken."""
    weights = torch.randn(80, 96, generator=torch.Generator().manual_seed(0))
    weights[3, :GROUP] = 0
    weights[70, GROUP : 2 * GROUP] *= 1e-3
    expected, scales = quantize(weights, find_format(format))
    packed = pack(weights, format, packer())
    assert packed.data is not None and packed.scales is not None and packed.scales.dtype == torch.bfloat16
    bytes_of = packed.data.view(torch.uint8)
    ours = torch.empty(80, 96)
    for first, rows in ((0, 64), (64, 16)):
        words = bytes_of[first * 96 // parts :][: rows * 96 // parts].view(-1, rows, 4).transpose(0, 1)  # [rows, words, bytes]
        columns = torch.stack((words & 15, words >> 4), dim=2) - 8 if format == "int4" else words.to(torch.int16) - 128
        steps = packed.scales[first * 3 :][: rows * 3].view(3, rows).t()
        ours[first : first + rows] = dequantize(columns.to(torch.int8).reshape(rows, 96), steps.float())
    assert (scales == scales.bfloat16()).all()
    theirs = dequantize(expected, scales)

    def errors(rounded: Tensor) -> Tensor:
        squares: Tensor = (rounded - weights).square().unflatten(1, (-1, GROUP))
        return squares.sum(dim=2)

    torch.testing.assert_close(errors(ours), errors(theirs), rtol=1e-5, atol=1e-12)
    assert (ours == theirs).float().mean() > 0.99


def test_tables_and_config_are_what_the_kernel_assumes() -> None:
    tables = RoutingTables.empty(3, 2, 4, "cpu")
    assert tables.rows.dtype == torch.float32 and tables.allowed.dtype == torch.bool
    assert tables.rows.is_contiguous() and tables.allowed.is_contiguous()
    assert ModelConfig.__dataclass_fields__["rms_norm_eps"].type is float


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "auto", torch.float32),
        (torch.float16, "auto", torch.float32),
    ],
)
def test_what_the_server_computes_in(tmp_path: Path, stored: torch.dtype, asked: str, expected: torch.dtype) -> None:
    model = load_to_serve(make_dense(tmp_path, dtype=stored), "cpu", asked)
    assert (model.backend.name, model.backend.dtype) == ("native", expected)
    assert load_to_serve(tmp_path, "cpu", asked, "int8").backend.quantize == "int8"
