"""The compiled CPU step over nested weights: each token reads its own precision, and has the same bits in any company."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ladimo.checkpoint import load_model, load_to_serve, read_policies
from ladimo.model.backends.torch_backend import TorchBackend
from ladimo.model.cpu import build
from ladimo.model.cpu.native_step import NativeStep, Unsupported
from ladimo.model.experts import hidden_channels
from ladimo.model.inputs import StepInputs
from ladimo.model.nested.layers import NestedExperts, NestedHead, NestedLinear
from ladimo.model.nested.refinement import WHOLE, Part, count_refined
from ladimo.model.precision import NESTED_BITS
from ladimo.model.quantization import GROUP
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import EXACT, PHI2, make_dense, make_moe, make_nested
from tests.ladimo.native import Cached, prompts
from tests.ladimo.stepping import Row, Stepper, make_tables

pytestmark = pytest.mark.skipif(build.library() is None, reason="there is no compiled CPU kernel here")

WIDER: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 512, "num_attention_heads": 6}
# Beside the plain one: experts that need padding and experts that need none, several blocks per matrix, biases, a dense layer.
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "wider": WIDER,
    "unpadded": {"num_experts": 3, "tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "dense_layer": {"dense_layers": (1,)},
    "no_gate": PHI2,
    "no_gate_wider": {**PHI2, **WIDER, "num_key_value_heads": 6},
    "no_gate_dense_layer": {"dense_layers": (1,), **PHI2},
    "no_gate_planes_only": {"top_bits": 8, **PHI2},
    "planes_only": {"top_bits": 8, **WIDER},
    "planes_only_tied": {"top_bits": 8, "tie_word_embeddings": True},
}
BITS = (4, 8, None)


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[MoeTransformer, list[RoutingPolicy]]:
    """The model, with the four policies of its checkpoint, one whose bits differ from layer to layer, and one that refines.
    Where the top is 8 bits, without `full`, which is `quality` there, and without neurons to refine."""
    model = load_model(path, dtype, torch.device("cpu"))
    planes_only = model.config.nested_top_bits is not None
    rules = tuple(
        None if layer is None else LayerRule(2, renormalize=False, bits=BITS[index % 3], attention_bits=BITS[(index + 1) % 3])
        for index, layer in enumerate(model.config.layers)
    )
    refining = tuple(None if rule is None else replace(rule, top_k=3, bits=4, attention_bits=8, refine=1.2) for rule in rules)
    if planes_only:
        refining = tuple(rule and replace(rule, refine=None) for rule in refining)
    several = [RoutingPolicy("mixed", "", rules, 8), RoutingPolicy("refined", "", refining, 4, 1.0)]
    stored = [policy for policy in read_policies(path, model.config).values() if not (planes_only and policy.name == "full")]
    return model, [*stored, *several]


def round_groups(x: Tensor) -> Tensor:
    """Round activations [T, K] to 8 bits per group, as the step does beside planes."""
    groups: Tensor = F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    step = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-20) / 121  # MOST_ROUNDED of activations.h
    rounded: Tensor = (groups / step).round() * step
    return rounded.flatten(-2)[..., : x.shape[-1]]


def round_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a nested layer: the inputs of the tokens that read planes, rounded."""
    if len(args) == 1:
        return args
    x, bits = args
    reads_planes = (bits <= max(NESTED_BITS)) | (module.weight is None)
    return torch.where(reads_planes[:, None], round_groups(x), x), bits


class RoundedBackend(TorchBackend):
    """Torch on the weights that the planes stand for, with activations rounded as the compiled step rounds them."""

    @staticmethod
    def apply_experts(  # type: ignore[override]
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        up_bias: Tensor | None = None,
    ) -> Tensor:
        whole = isinstance(gate_up_proj, nn.Parameter)
        out = torch.zeros_like(hidden_states)
        inputs = hidden_states if whole else round_groups(hidden_states)
        for expert in range(len(down_proj)):
            bias = None if up_bias is None else up_bias[expert]
            inner = hidden_channels(F.linear(inputs, gate_up_proj[expert]), bias)
            weight = torch.where(topk_ids == expert, topk_weights, 0).sum(dim=1, keepdim=True)
            out += weight * F.linear(inner if whole else round_groups(inner), down_proj[expert])
        return out

    @staticmethod
    def apply_refined(
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        gate_up: Any,
        down: Any,
        norms: Tensor,
        refine: Tensor,
        up_bias: Tensor | None = None,
        part: Part = WHOLE,
    ) -> tuple[Tensor, Tensor]:
        """The low plane of down is multiplied with activations that are not rounded."""
        dtype, inputs, out = hidden_states.dtype, round_groups(hidden_states), torch.zeros_like(hidden_states)

        def hidden(bits: float) -> Tensor:
            bias = None if up_bias is None else up_bias[:, None]
            return hidden_channels(torch.einsum("td,efd->etf", inputs, gate_up.at(bits, dtype)), bias)

        weight = torch.stack([torch.where(topk_ids == e, topk_weights, 0).sum(dim=1) for e in range(len(norms))])  # [E, T]
        at4, at8, runs = hidden(4), hidden(8), (weight > 0).unsqueeze(-1)
        scores = at4.abs() * norms.unsqueeze(1) * runs
        mean = scores.sum(dim=(0, 2)) / runs.sum(dim=(0, 2)) / norms.shape[1]
        refined = (scores >= (refine * mean).view(1, -1, 1)) & runs
        inner, at4_down = torch.where(refined, at8, at4), down.at(4, dtype)
        for expert in range(len(norms)):
            low = F.linear(inner[expert] * refined[expert], (down.at(8, dtype) - at4_down)[expert])
            out += weight[expert].unsqueeze(-1) * (F.linear(round_groups(inner[expert]), at4_down[expert]) + low)
        return out, count_refined(refined.transpose(0, 1).flatten(1))


def round_like_the_step(model: MoeTransformer) -> None:
    RoundedBackend().prepare(model)
    head = model.lm_head
    assert isinstance(head, NestedHead)
    exact = head.refined

    def rounded(x: Tensor, bits: Tensor, refine: Tensor) -> tuple[Tensor, Tensor]:
        return exact(torch.where(bits[:, None] <= max(NESTED_BITS), round_groups(x), x), bits, refine)

    head.refined = rounded  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, NestedLinear):
            module.register_forward_pre_hook(round_inputs)


def all_logits(steps: Stepper, num_policies: int) -> list[Tensor]:
    """Logits [60, V] per policy, of the same prompt: in chunks and decoded, all policies in each step."""
    rows = [Row(list(prompts(1)[0]), 1 + index) for index in range(num_policies)]
    parts = [steps.step(prefill=[(row, 7 + row.policy) for row in rows])]
    parts.append(steps.step(prefill=[(row, 40 - row.policy) for row in rows]))
    parts += [steps.step(decode=rows) for _ in range(13)]
    return [torch.cat(list(own)) for own in zip(*parts, strict=True)]


def check_every_policy(path: Path, threads: int) -> None:
    """Each policy is near torch with the same rounding, and far from what torch computes under the other policies.

    A sum that lies between two integers may be rounded the other way. That moves a few tokens, so the median is compared.
    """
    model, policies = load(path)
    native = all_logits(Cached(model, NativeStep(model, "float32", threads, wake_threads_from=0), policies), len(policies))
    round_like_the_step(model)
    expected = all_logits(Stepper(model, make_tables(model, policies), num_blocks=256), len(policies))
    for place, ours in enumerate(native):
        distances = [float((ours - theirs).norm(dim=1).median()) for theirs in expected]
        own = distances.pop(place)
        assert own < min(distances) / 5
        assert own < 0.02 * float(ours.norm(dim=1).median())


@pytest.mark.parametrize(("name", "threads"), [*((name, 2) for name in MODELS), ("wider", 1)])
def test_every_policy_reads_its_own_precision(tmp_path: Path, name: str, threads: int) -> None:
    check_every_policy(make_nested(tmp_path, **MODELS[name]), threads)


@pytest.mark.parametrize("name", ["wider", "no_gate_wider"])
@pytest.mark.usefixtures("width")
def test_every_precision_in_vectors_of_every_width(tmp_path: Path, name: str) -> None:
    check_every_policy(make_nested(tmp_path, **MODELS[name]), 2)


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    """The planes are the same in both dtypes, because the weights are stored in bf16 anyway."""
    directory = make_nested(tmp_path, dtype=torch.bfloat16)
    logits = []
    for dtype, format in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        model, policies = load(directory, dtype)
        logits.append(all_logits(Cached(model, NativeStep(model, format, 2), policies), len(policies)))
    for exact, near in zip(*logits, strict=True):
        assert F.cosine_similarity(exact, near, dim=-1).median() > 0.999
        assert not torch.equal(exact, near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "wider", "dense_layer", "no_gate"])
@pytest.mark.usefixtures("width")
def test_whole_weights_are_those_of_a_checkpoint_without_planes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """In every bit: whoever reads all bits does not notice the planes."""
    whole = LayerRule(4, renormalize=False)

    def logits(directory: Path) -> Tensor:
        model = load_model(directory, dtype, torch.device("cpu"))
        policy = RoutingPolicy("whole", "", tuple(None if layer is None else whole for layer in model.config.layers))
        steps = Cached(model, NativeStep(model, str(dtype).removeprefix("torch."), 2), [policy])
        row = Row(list(prompts(1)[0]))
        return torch.cat(steps.step(prefill=[(row, 59)]) + steps.step(decode=[row]))

    fields: dict[str, Any] = {"dense_layers": (), **MODELS[name]}
    plain = make_moe(tmp_path / "plain", top_k=4, layer=EXACT, **fields)
    assert torch.equal(logits(make_nested(tmp_path / "nested", **fields)), logits(plain))


@pytest.mark.parametrize(
    ("format", "fields"),
    [
        ("float32", {}),
        ("bfloat16", {}),
        ("bfloat16", {"top_bits": 8}),
        ("bfloat16", PHI2),
    ],
    ids=["float32", "bfloat16", "planes_only", "no_gate"],
)
@pytest.mark.usefixtures("width")
def test_a_token_has_the_same_bits_in_any_company(tmp_path: Path, format: str, fields: dict[str, Any]) -> None:
    """Alone or among tokens of all precisions, in one chunk or several, decoded or recomputed, on one thread or three."""
    dtype = torch.bfloat16 if format == "bfloat16" else torch.float32
    model, policies = load(make_nested(tmp_path, intermediate_size=256, **fields), dtype)
    sequences = prompts(10)

    def rows() -> list[Row]:
        return [Row(list(tokens), 1 + index % len(policies)) for index, tokens in enumerate(sequences)]

    alone = Cached(model, NativeStep(model, format, 1), policies)
    expected = []
    for row in rows():
        first = alone.step(prefill=[(row, 30)])
        expected.append(torch.cat(first + [alone.step(decode=[row])[0] for _ in range(30)]))
    together = Cached(model, NativeStep(model, format, 3, wake_threads_from=0), policies, block_size=16)
    chunked = rows()
    chunks: list[list[Tensor]] = [[] for _ in chunked]
    counts = torch.tensor([[7] * 10, [1, 20, 3, 8, 1, 1, 5, 2, 9, 30], [43, 30, 17, 3, 2, 1, 1, 9, 40, 20]])
    for counts_of_step in [*counts.tolist(), (60 - counts.sum(dim=0)).tolist()]:
        asked = list(zip(chunked, counts_of_step, strict=True))
        for own, logits in zip(chunks, together.step(prefill=asked), strict=True):
            own.append(logits)
    for own, whole in zip(chunks, expected, strict=True):
        assert torch.equal(torch.cat(own), whole)
    again = rows()
    together.step(prefill=[(row, 30) for row in again])
    for place in range(30, 40):
        for logits, whole in zip(together.step(decode=again), expected, strict=True):
            assert torch.equal(logits[0], whole[place])


@pytest.mark.parametrize("tied", [True, False])
def test_more_bits_than_the_top_are_the_top(tmp_path: Path, tied: bool) -> None:
    """Where only planes are stored, all bits are 8 bits, in every bit of the logits, and in a batch with others, too."""
    directory = make_nested(tmp_path, top_bits=8, tie_word_embeddings=tied)
    model, _ = load(directory)
    policies = [read_policies(directory, model.config)[name] for name in ("full", "quality", "fast")]
    full, quality, fast = all_logits(Cached(model, NativeStep(model, "bfloat16", 2), policies), len(policies))
    assert torch.equal(full, quality)
    assert not torch.allclose(full, fast, atol=1e-2)


def test_a_model_of_planes_takes_little_memory(tmp_path: Path) -> None:
    """The compiled step keeps at most 0.6 of the dense model in bf16: each plane once, and the head's low plane twice."""
    fields: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "tie_word_embeddings": True}
    dense = make_dense(tmp_path / "dense", dtype=torch.bfloat16, **fields)
    stored = sum(parameter.numel() for parameter in load_model(dense, torch.bfloat16, torch.device("cpu")).parameters())
    planes = make_nested(tmp_path / "nested", dense=dense, num_experts=1, top_bits=8)
    model = load_model(planes, torch.bfloat16, torch.device("cpu"))
    viewed = [ref(buffer._base) for buffer in model.buffers() if buffer._base is not None]
    assert viewed
    step = NativeStep(model, "bfloat16", 1, release=True)
    assert step.weight_bytes <= 0.6 * 2 * stored
    assert not any(base() is not None for base in viewed)  # else their memory would not be free
    assert not [name for name, tensor in model.named_parameters() if tensor.ndim > 1 and tensor.numel()]
    assert all(tensor.numel() == 0 for name, tensor in model.named_buffers() if "rotary" not in name)


def test_only_wanted_logits(tmp_path: Path) -> None:
    """The head's precision is that of the row's token, not that of the row's number."""
    model, policies = load(make_nested(tmp_path))
    steps = Cached(model, NativeStep(model, "float32", 1), policies)
    inputs = steps.inputs(prefill=[(Row(list(prompts(1)[0]), 1 + index), 12) for index in range(len(policies))])
    whole = steps.native(inputs, steps.kv_cache, steps.tables).logits
    wanted = torch.tensor([59, 0, 30, 13, 40, 24])
    some = StepInputs(**{**{f: getattr(inputs, f) for f in inputs.__slots__}, "logit_indices": wanted})
    assert torch.equal(steps.native(some, steps.kv_cache, steps.tables).logits, whole[wanted])


def test_a_precision_that_no_token_wants_is_not_read(tmp_path: Path) -> None:
    """4 bits read neither the low plane, but of keys and values, nor the whole weights. 8 bits do not read the whole ones."""
    model, _ = load(make_nested(tmp_path))
    layers = range(model.config.num_hidden_layers)
    policies = [
        RoutingPolicy(
            f"bits{bits}", "", tuple(LayerRule(4, renormalize=False, bits=bits, attention_bits=bits) for _ in layers), bits
        )
        for bits in NESTED_BITS
    ]

    def logits() -> list[Tensor]:
        return all_logits(Cached(model, NativeStep(model, "float32", 2), policies), len(policies))

    before = logits()
    for module in model.modules():
        if isinstance(module, NestedLinear | NestedExperts):
            for weights in module.parameters(recurse=False):
                if weights.ndim > 1:
                    weights.fill_(torch.nan)
    assert all(torch.equal(*pair) for pair in zip(before, logits(), strict=True))
    for name, buffer in model.named_buffers():
        if name.endswith("_low") and "k_proj" not in name and "v_proj" not in name:
            buffer.fill_(0x77)
    at4, at8 = logits()
    assert torch.equal(at4, before[0])
    assert not torch.equal(at8, before[1])


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": True}, PHI2], ids=["tied", "no_gate"])
def test_the_compiled_step_serves_nested_checkpoints(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Ready to serve, the model has freed its weights and planes, and computes what it computed before."""
    directory = make_nested(tmp_path, **fields)
    model, policies = load(directory)
    steps = Cached(model, NativeStep(model, "float32", 2), policies)
    inputs = steps.inputs(prefill=[(Row(list(prompts(1)[0]), 1 + index), 20) for index in range(len(policies))])
    expected = steps.native(inputs, steps.kv_cache, steps.tables)
    served = load_to_serve(directory, "cpu")
    assert served.backend.name == "native"
    assert served.lm_head is not None
    for part in (served.model.layers, served.lm_head):
        assert all(tensor.numel() == 0 for tensor in part.state_dict().values())
    assert torch.equal(served.step(inputs, steps.kv_cache, steps.tables).logits, expected.logits)


def test_sizes_that_the_planes_cannot_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = make_nested(tmp_path, hidden_size=48)
    assert load_to_serve(directory, "cpu").backend.name == "torch"
    assert "hidden_size 48 is not a multiple of 32" in caplog.text


def test_integer_formats_do_not_replace_the_planes(tmp_path: Path) -> None:
    model, _ = load(make_nested(tmp_path))
    with pytest.raises(Unsupported, match="integers of their own, which int4 cannot replace"):
        NativeStep(model, "int4", 1)
