"""One set of weights at 4 bits, at 8 bits and whole: what a checkpoint keeps, and what each token of a batch reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ladimo.checkpoint import (
    TensorReader,
    load_model,
    load_to_serve,
    read_config,
    read_json,
    read_policies,
    write_json,
    write_tensors,
)
from ladimo.convert.rounding.gptq import ErrorFeedback, choose_planes, choose_scales, round_nearest
from ladimo.model.backends.torch_backend import TorchBackend
from ladimo.model.inputs import RoutingTables, StepInputs, StepOutput, refined_rows
from ladimo.model.nested.weights import (
    STEPS,
    codes_to_rounding,
    low_plane,
    low_rounded_down,
    plane_to_nibbles,
    planes_from_nibbles,
    read_planes,
    rounded_down,
)
from ladimo.model.quantization import GROUP
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import LayerRule, RoutingPolicy
from tests.factories import PHI2, make_dense, make_nested, nested_weights


def matrix(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 5), st.integers(1, 80), st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rounding_survives_the_checkpoint(rows: int, cols: int, seed: int, dtype: torch.dtype) -> None:
    """Whichever integers next to the weights the conversion chose, and next to what is left, the planes have them again."""
    weights = matrix(rows, cols, seed).to(dtype)
    scales, drawn = choose_scales(weights), torch.Generator().manual_seed(seed)

    def choice(lowest: Tensor) -> Tensor:
        return torch.minimum(lowest + torch.randint(0, 2, lowest.shape, generator=drawn, dtype=torch.int8), torch.tensor(7))

    high = choice(rounded_down(weights, scales))
    low = choice(low_rounded_down(weights, high, scales))
    kept = (
        codes_to_rounding(high, rounded_down(weights, scales)),
        codes_to_rounding(low, low_rounded_down(weights, high, scales)),
    )
    planes = read_planes(weights, kept[0], scales, kept[1])
    for plane, codes in zip(planes, (high, low), strict=True):
        assert torch.equal(plane.format.to_integers(plane.data)[:, : codes.shape[1]], codes)


def test_the_planes_stand_for_the_weights() -> None:
    weights = matrix(6, 70)
    scales = choose_scales(weights)
    codes = round_nearest(weights, scales)
    high, low = read_planes(weights, codes_to_rounding(codes, rounded_down(weights, scales)), scales)
    steps = scales.float().repeat_interleave(GROUP, dim=1)[:, :70]
    assert torch.equal(high.to_dtype(torch.float32), codes[:, :70] * steps)
    both = high.to_dtype(torch.float32) + low.to_dtype(torch.float32)
    # A weight a whole step above its integer is out of the low plane's reach by half of the plane's own step.
    assert ((both - weights).abs() <= steps.abs() / STEPS * 1.001).all()
    assert (both - weights).square().mean() < (high.to_dtype(torch.float32) - weights).square().mean() / 20


def test_shapes_that_do_not_belong_together() -> None:
    weights = matrix(4, 64)
    scales = choose_scales(weights)
    rounding = codes_to_rounding(round_nearest(weights, scales), rounded_down(weights, scales))
    with pytest.raises(ValueError, match="^rounding is torch.uint8"):
        read_planes(matrix(4, 96), rounding, scales)
    with pytest.raises(ValueError, match="low_rounding is torch.uint8"):
        read_planes(weights, rounding, scales, rounding[:, :4])
    with pytest.raises(ValueError, match="low_rounding is torch.int8"):
        read_planes(weights, rounding, scales, rounding.to(torch.int8))
    with pytest.raises(ValueError, match="scales are"):
        read_planes(weights, rounding, scales[:, :1])
    with pytest.raises(ValueError, match="scales are torch.float32"):
        read_planes(weights, rounding, scales.float())


def test_feedback_moves_the_output_less_than_rounding_to_the_nearest() -> None:
    """At 4 bits and at 8 bits."""
    weights, mixing = matrix(48, 96, 1), matrix(96, 96, 2)
    inputs = matrix(2000, 96, 3) @ mixing  # correlated, as real inputs are
    scales = choose_scales(weights)
    high, low = choose_planes(weights, scales, ErrorFeedback.of(inputs.T @ inputs))
    steps = scales.float().repeat_interleave(GROUP, dim=1)

    def error(codes: Tensor) -> float:
        return F.linear(inputs, codes * steps - weights).square().mean().item()

    assert error(high) < 0.7 * error(round_nearest(weights, scales))
    nearest = error(high + low_plane(weights, high, scales) / STEPS)
    assert nearest < 0.1 * error(high)
    assert error(high + low / STEPS) < 0.7 * nearest


def test_the_order_of_the_columns_does_not_matter() -> None:
    """Because those with the largest inputs are rounded first, wherever they are in their group of columns."""
    weights, inputs = matrix(20, 96, 1), matrix(500, 96, 3) @ matrix(96, 96, 2)
    within = torch.randperm(GROUP, generator=torch.Generator().manual_seed(0))
    shuffled = (torch.arange(0, 96, GROUP)[:, None] + within).flatten()

    def planes(order: Tensor) -> tuple[Tensor, Tensor]:
        feedback = ErrorFeedback.of(inputs[:, order].T @ inputs[:, order])
        return choose_planes(weights[:, order], choose_scales(weights[:, order], feedback.importance), feedback)

    for plane, again in zip(planes(torch.arange(96)), planes(shuffled), strict=True):
        assert (plane[:, shuffled] == again).float().mean() > 0.99


def test_scales_fit_the_columns_that_matter() -> None:
    weights, importance = matrix(20, 64), torch.ones(64)
    importance[::7] = 100.0

    def error(scales: Tensor) -> float:
        steps = scales.float().repeat_interleave(GROUP, dim=1)
        return float(((round_nearest(weights, scales) * steps - weights).square() * importance).sum())

    assert error(choose_scales(weights, importance)) < error(choose_scales(weights)) * 0.97


def test_a_checkpoint_that_says_nothing_of_the_low_plane_has_the_nearest_one(tmp_path: Path) -> None:
    """As all checkpoints before it was chosen by the conversion: they serve what they served."""
    directory = make_nested(tmp_path)
    reader = TensorReader(directory)
    tensors = {name: reader.get(name) for name in reader.files}
    old = {name: tensor for name, tensor in tensors.items() if not name.endswith("low_rounding")}
    assert len(old) < len(tensors)
    policies = list(read_policies(directory, read_config(directory)).values())
    ids, rows = torch.arange(40).view(1, 40), torch.arange(40) % len(policies) + 1

    def found() -> Tensor:
        return logits(load_model(directory, torch.float32, torch.device("cpu")), policies, ids, rows)

    nearest = found()  # `make_nested` writes down that it is the nearest
    write_tensors(directory, iter(old.items()))
    assert torch.equal(found(), nearest)
    down = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name not in old}
    write_tensors(directory, iter((tensors | down).items()))
    assert not torch.allclose(found(), nearest, atol=1e-3)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 1000))
def test_planes_survive_the_checkpoint(rows: int, half: int, seed: int) -> None:
    """Where they are all that it keeps, as a stack of matrices: each code, and its scale."""
    drawn = torch.Generator().manual_seed(seed)
    high, low = (torch.randint(-8, 8, (2, rows, 2 * half), generator=drawn, dtype=torch.int8) for _ in range(2))
    scales = torch.rand(2, rows, -(-half // 16), generator=drawn).bfloat16()
    planes = planes_from_nibbles(plane_to_nibbles(high), plane_to_nibbles(low), scales)
    steps = scales.float().repeat_interleave(GROUP, dim=2)[..., : 2 * half]
    for plane, codes, step in zip(planes, (high, low), (steps, steps / STEPS), strict=True):
        assert torch.equal(plane.to_dtype(torch.float32), codes * step)


def test_stored_planes_that_do_not_belong_together() -> None:
    plane, scales = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"low is torch.uint8 \[4, 16\], must be uint8 \[4, 32\]"):
        planes_from_nibbles(plane, plane[:, :16], scales)
    with pytest.raises(ValueError, match="high is torch.int8"):
        planes_from_nibbles(plane.to(torch.int8), plane, scales)
    with pytest.raises(ValueError, match="scales are"):
        planes_from_nibbles(plane, plane, scales[:2])


def run(model: MoeTransformer, policies: list[RoutingPolicy], ids: Tensor, policy_ids: Tensor) -> StepOutput:
    config = model.config
    tables = RoutingTables.empty(len(policies) + 1, config.num_hidden_layers, config.max_num_experts, "cpu")
    for row, policy in enumerate(policies, start=1):
        policy.validate(config)
        tables.write(row, *policy.to_rows(config.max_num_experts))
    inputs = StepInputs.whole_sequences(ids)
    inputs = StepInputs(**{**{name: getattr(inputs, name) for name in inputs.__dataclass_fields__}, "policy_ids": policy_ids})
    output: StepOutput = model(inputs, None, tables)
    return output


def logits(model: MoeTransformer, policies: list[RoutingPolicy], ids: Tensor, policy_ids: Tensor) -> Tensor:
    return run(model, policies, ids, policy_ids).logits


@pytest.fixture(
    scope="module",
    params=[{"tie_word_embeddings": True}, {}, PHI2],
    ids=["tied head", "head of its own", "no gate"],
)
def nested_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nested(tmp_path_factory.mktemp("nested"), **request.param)


def bits_policy(model: MoeTransformer, name: str, bits: int | None, attention: int | None, head: int | None) -> RoutingPolicy:
    rule = LayerRule(4, renormalize=False, bits=bits, attention_bits=attention)
    return RoutingPolicy(name, "", (rule,) * model.config.num_hidden_layers, head)


@pytest.mark.parametrize("fields", [{}, PHI2], ids=["gate", "no gate"])
def test_the_top_is_the_dense_model(fields: dict[str, Any], tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", **fields)
    nested = load_model(make_nested(tmp_path / "nested", dense=dense), torch.float32, torch.device("cpu"))
    ids = torch.arange(24).view(2, 12)
    ours = logits(nested, [bits_policy(nested, "full", None, None, None)], ids, torch.ones(24, dtype=torch.int64))
    source = load_model(dense, torch.float32, torch.device("cpu"))
    theirs = source(
        StepInputs.whole_sequences(ids), None, RoutingTables.empty(2, source.config.num_hidden_layers, 1, "cpu")
    ).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_each_part_has_bits_of_its_own(nested_dir: Path) -> None:
    """Fewer bits of any part change the logits, and 8 bits change them less than 4."""
    model = load_model(nested_dir, torch.float32, torch.device("cpu"))
    ids, ones = torch.arange(40).view(2, 20), torch.ones(40, dtype=torch.int64)
    whole = logits(model, [bits_policy(model, "full", None, None, None)], ids, ones)

    def distance(*bits: int | None) -> float:
        return float((logits(model, [bits_policy(model, "p", *bits)], ids, ones) - whole).norm())

    for part in range(3):
        at4, at8 = (distance(*(bits if place == part else None for place in range(3))) for bits in (4, 8))
        assert 0 < at8 < at4 / 3


def test_tokens_of_a_batch_read_what_their_policies_say(nested_dir: Path) -> None:
    model = load_model(nested_dir, torch.float32, torch.device("cpu"))
    policies = list(read_policies(nested_dir, model.config).values())
    ids = torch.arange(24).repeat(len(policies), 1)
    rows = torch.arange(1, len(policies) + 1).repeat_interleave(24)
    together = logits(model, policies, ids, rows).view(len(policies), 24, -1)
    for place in range(len(policies)):
        alone = logits(model, policies, ids[:1], torch.full((24,), place + 1))
        torch.testing.assert_close(together[place], alone, atol=1e-4, rtol=1e-4)
    assert len({tuple(row[-1].tolist()) for row in together}) == len(policies)


def refining(model: MoeTransformer, refine: float | None, head_refine: float | None, bits: int = 4) -> RoutingPolicy:
    rule = LayerRule(4, renormalize=False, bits=bits, attention_bits=8, refine=refine)
    return RoutingPolicy("refining", "", (rule,) * model.config.num_hidden_layers, bits, head_refine)


def test_refining_is_between_four_and_eight_bits(nested_dir: Path) -> None:
    """Refining everything gives 8 bits, refining nothing gives 4, and some neurons and words give something between."""
    model = load_model(nested_dir, torch.float32, torch.device("cpu"))
    ids, ones = torch.arange(60).view(2, 30), torch.ones(60, dtype=torch.int64)
    outputs = {
        name: run(model, [policy], ids, ones)
        for name, policy in {
            "8 bits": refining(model, None, None, bits=8),
            "all": refining(model, 0.0, 1e9),
            "some": refining(model, 0.8, 0.5),
            "none": refining(model, 1e9, None),
            "4 bits": refining(model, None, None),
        }.items()
    }
    torch.testing.assert_close(outputs["all"].logits, outputs["8 bits"].logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs["none"].logits, outputs["4 bits"].logits, atol=1e-4, rtol=1e-4)
    distance = {name: float((output.logits - outputs["8 bits"].logits).norm()) for name, output in outputs.items()}
    assert distance["all"] < distance["some"] < 0.9 * distance["4 bits"]
    config = model.config
    every = (2 if config.ffn_kind == "gelu" else 3) * config.num_hidden_layers * config.intermediate_size + config.vocab_size
    rows = {}
    for name, output in outputs.items():
        assert output.refined_counts is not None
        rows[name] = refined_rows(output.refined_counts, config.neuron_rows)
    assert set(rows["all"].tolist()) == {every}
    assert not any(rows[name].any() for name in ("8 bits", "4 bits", "none"))
    assert 0 < int(rows["some"].min()) <= int(rows["some"].max()) < every
    assert len(set(rows["some"].tolist())) > 1  # a choice of each token


def test_refined_words_keep_their_bias() -> None:
    weights, x, bias = nested_weights(20, 32), matrix(3, 32, 1), matrix(1, 20, 2)[0]
    backend = TorchBackend()
    bits, refine = torch.tensor([8.0, 4.0, 4.0]), torch.tensor([torch.inf, 1e9, torch.inf])
    out, counts = backend.nested_logits(x, weights, bits, refine, bias)
    expected = backend.nested_linear(x, weights, torch.tensor([8.0, 8.0, 4.0]), bias)
    torch.testing.assert_close(out, expected)
    assert counts.sum(dim=1).tolist() == [0, 20, 0]


def test_what_is_refined_is_read(nested_dir: Path) -> None:
    """The share of bytes grows from that of 4 bits to that of 8 bits and the scales, which are read twice."""
    config = read_config(nested_dir)
    model = load_model(nested_dir, torch.float32, torch.device("cpu"))
    experts = (4.0,) * config.num_hidden_layers
    at4, at8 = (refining(model, None, None, bits=bits).bytes_ratio(config, experts, 0.0) for bits in (4, 8))
    every = (2 if config.ffn_kind == "gelu" else 3) * config.num_hidden_layers * config.intermediate_size + config.vocab_size
    refined = [refining(model, 1.0, None).bytes_ratio(config, experts, share * every) for share in (0.0, 0.5, 1.0)]
    assert at4 is not None and at8 is not None
    assert refined[0] == at4
    assert refined[0] < refined[1] < refined[2]  # type: ignore[operator]
    assert refined[2] == pytest.approx(at8, rel=0.12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda policy: policy["layers"][1].update(bits=8, refine=1.0), r"layers\[1\].refine: needs 4 bits, .* bits is 8"),
        (lambda policy: policy["layers"][1].update(refine=-1), r"layers\[1\].refine: must be null or a number of at least 0"),
        (lambda policy: policy.update(head_bits=None, head_refine=3.0), "head_refine: needs 4 bits"),
        (lambda policy: policy["layers"][1].update(bits=5), r"layers\[1\].bits: is 5; .* 4, 8, null"),
        (lambda policy: policy["layers"][0].update(attention_bits=16), r"layers\[0\].attention_bits: is 16"),
        (lambda policy: policy.update(head_bits=2), "head_bits: is 2"),
        (lambda policy: policy.update(head_bits="4"), "head_bits: must be null or an integer"),
    ],
)
def test_bits_that_the_checkpoint_does_not_have(
    nested_dir: Path, change: Callable[[dict[str, object]], None], message: str
) -> None:
    config = read_config(nested_dir)
    raw = read_policies(nested_dir, config)["fast"].to_dict()
    change(raw)
    with pytest.raises(ValueError, match=message):
        RoutingPolicy.from_dict(raw).validate(config)


def test_bits_are_refused_where_there_is_one_precision(moe_dir: Path) -> None:
    config = read_config(moe_dir)
    rule = LayerRule(2, bits=4)
    with pytest.raises(ValueError, match=r"layers\[0\].bits: is 4; .* read at null"):
        RoutingPolicy("p", "", (rule, None, rule)).validate(config)


def test_a_checkpoint_with_its_own_integers_is_not_rounded_again(nested_dir: Path) -> None:
    with pytest.raises(ValueError, match="quantize int4: the checkpoint has 4 and 8 bits of its own"):
        load_to_serve(nested_dir, "cpu", quantize="int4")


def test_a_broken_checkpoint_names_the_matrix(tmp_path: Path) -> None:
    directory = make_nested(tmp_path / "nested")
    raw = read_json(directory / "config.json")
    write_json(directory / "config.json", {**raw, "nested_bits": [4]})
    with pytest.raises(ValueError, match=r"nested_bits must be null, \[\] or \[4, 8\]"):
        read_config(directory)
    write_json(directory / "config.json", {**raw, "nested_bits": [4, 8]})
    reader = TensorReader(directory)
    tensors = {name: reader.get(name) for name in reader.files}
    name = "model.layers.0.self_attn.q_proj.scales"
    write_tensors(directory, iter({**tensors, name: tensors[name][:1]}.items()))
    with pytest.raises(ValueError, match="self_attn.q_proj.weight: scales are"):
        load_model(directory, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": True}, {}, PHI2], ids=["tied head", "head of its own", "no gate"])
def test_planes_without_weights(tmp_path: Path, fields: dict[str, Any]) -> None:
    """The 8 bits are the same as beside whole weights, but that the embedding has 8 bits, too. All bits are 8 bits."""
    dense = make_dense(tmp_path / "dense", **fields)
    whole = load_model(make_nested(tmp_path / "whole", dense=dense), torch.float32, torch.device("cpu"))
    model = load_model(make_nested(tmp_path / "planes", dense=dense, top_bits=8), torch.float32, torch.device("cpu"))
    ids, ones = torch.arange(40).view(2, 20), torch.ones(40, dtype=torch.int64)
    full, at8, at4 = (logits(model, [bits_policy(model, "p", bits, bits, bits)], ids, ones) for bits in (None, 8, 4))
    torch.testing.assert_close(full, at8)
    beside = logits(whole, [bits_policy(whole, "p", 8, 8, 8)], ids, ones)
    assert float((at8 - beside).norm()) < 0.2 * float((at4 - beside).norm())
    rows = whole.model.embed_tokens(ids.flatten())
    assert 0 < float((model.model.embed_tokens(ids.flatten()) - rows).norm()) < 0.02 * float(rows.norm())


def test_a_broken_checkpoint_of_planes(tmp_path: Path) -> None:
    directory = make_nested(tmp_path, top_bits=8)
    config, raw = read_config(directory), read_json(directory / "config.json")
    refined = read_policies(directory, config)["fast"].to_dict()
    refined["layers"][1]["refine"] = 1.0
    with pytest.raises(ValueError, match=r"layers\[1\].refine: neurons cannot be refined, because .* top is 8 bits"):
        RoutingPolicy.from_dict(refined).validate(config)
    for wrong in (4, 16, 8.0, "8"):
        write_json(directory / "config.json", {**raw, "nested_top_bits": wrong})
        with pytest.raises(ValueError, match="nested_top_bits must be null, or 8 beside nested_bits"):
            read_config(directory)
    write_json(directory / "config.json", {**raw, "nested_bits": None})
    with pytest.raises(ValueError, match="nested_top_bits must be null, or 8 beside nested_bits, got 8"):
        read_config(directory)
    write_json(directory / "config.json", {**raw, "moe_layers": [None, *raw["moe_layers"][1:]]})
    with pytest.raises(ValueError, match="nested_top_bits: is 8, but layer 0 is dense"):
        read_config(directory)
    write_json(directory / "config.json", raw)
    reader = TensorReader(directory)
    tensors = {name: reader.get(name) for name in reader.files}
    name = "model.layers.0.self_attn.q_proj.low"
    write_tensors(directory, iter({**tensors, name: tensors[name][:1]}.items()))
    with pytest.raises(ValueError, match="self_attn.q_proj.weight: low is torch.uint8"):
        load_model(directory, torch.float32, torch.device("cpu"))
    write_tensors(directory, iter((other, tensor) for other, tensor in tensors.items() if other != name))
    with pytest.raises(ValueError, match="lacks the tensor model.layers.0.self_attn.q_proj.low"):
        load_model(directory, torch.float32, torch.device("cpu"))
