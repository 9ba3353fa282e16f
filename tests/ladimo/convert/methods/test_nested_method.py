"""Method nested: the checkpoint that it writes, the policies that it chooses, and that both are measured as they are served."""

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ladimo.checkpoint import TensorReader, load_model, read_config, read_frontier, read_json, read_policies, write_json
from ladimo.convert.data.calibration import Encoder, evaluation_blocks
from ladimo.convert.evaluate_checkpoint import evaluate_checkpoint
from ladimo.convert.evaluation.measure import Measurement, measure
from ladimo.convert.evaluation.variants import Rules, policy_of
from ladimo.convert.methods.nested import bit_candidates
from ladimo.convert.pipeline import convert
from ladimo.convert.policies.candidates import ConvertedModel
from ladimo.convert.policies.frontier import measure_frontier
from ladimo.convert.reprofile import reprofile
from ladimo.convert.rounding.moments import LayerMoments, head_moments, layer_moments
from ladimo.convert.source import model_parameters
from ladimo.convert.streamed_model import StreamedModel
from ladimo.export import export
from ladimo.model.attention.layer import Attention
from ladimo.model.config import ModelConfig
from ladimo.model.inputs import StepInputs
from ladimo.policy import LayerRule
from tests.factories import PHI2, make_dense
from tests.ladimo.convert.conftest import Made, killed, make_text, small_recipe
from tests.ladimo.stepping import make_tables

CPU = torch.device("cpu")


@pytest.fixture(
    scope="module", params=[{}, {"tie_word_embeddings": True}, PHI2], ids=["head of its own", "tied head", "no gate"]
)
def nested(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("nested")
    dense = make_dense(
        root / "dense",
        max_position_embeddings=32,
        intermediate_size=90,
        dtype=torch.bfloat16,
        **request.param,
    )
    # Of random weights without a gate, most neurons must be refined for it to pay.
    recipe = small_recipe(method="nested", **({"nested.refine": 0.2} if request.param is PHI2 else {}))
    text = make_text(root / "text.txt")
    assert convert(str(dense), root / "out", recipe, [text])
    return Made(dense, text, root / "out", recipe)


def test_the_checkpoint_holds_the_source_and_little_more(nested: Made) -> None:
    dense, own = TensorReader(nested.dense), TensorReader(nested.out)
    for name, _ in model_parameters(read_config(nested.dense)):
        if ".mlp." not in name:
            assert torch.equal(dense.get(name), own.get(name)), name
    down = own.get("model.layers.1.mlp.experts.down_proj")
    assert torch.equal(down[0], dense.get("model.layers.1.mlp.down_proj.weight"))
    sizes = [sum(tensor.nbytes for tensor in map(reader.stored, reader.files)) for reader in (dense, own)]
    assert sizes[1] < 1.25 * sizes[0]
    assert read_config(nested.out).nested_bits == (4, 8)
    assert not list(nested.out.parent.glob("*.partial"))


def test_full_is_the_dense_model(nested: Made) -> None:
    ids = torch.arange(32).view(1, 32)
    logits = []
    for directory in (nested.dense, nested.out):
        model = load_model(directory, torch.float32, CPU)
        full = read_policies(directory, model.config)["full"]
        logits.append(model(StepInputs.whole_sequences(ids), None, make_tables(model, [full])).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_policies_are_cheaper_in_bytes_and_keep_their_promise(nested: Made) -> None:
    """The figures are those of the model as it is loaded to serve, bits of the head included."""
    model = load_model(nested.out, torch.float32, CPU)
    policies, frontier = read_policies(nested.out, model.config), read_frontier(nested.out)
    report = read_json(nested.out / "report.json")
    entries = {entry["policy"]: entry for entry in report["policies"]}
    costs = [entries[name]["bytes_ratio"] for name in ("full", "quality", "balanced", "fast")]
    assert costs[0] == pytest.approx(1, abs=1e-6)
    assert costs == sorted(costs, reverse=True)
    for entry in entries.values():  # fewer bits save bytes, but every weight is still multiplied
        assert entry["decode_bytes_ratio"] == entry["bytes_ratio"]
        assert entry["prefill_operations_ratio"] == pytest.approx(1)
        assert entry["prefill_time_ratio"] > 0
    assert entries["full"]["prefill_time_ratio"] == pytest.approx(1)
    assert costs[1] == pytest.approx(0.53, abs=0.01)
    assert 0.28 < costs[3] < 0.33
    assert frontier is not None
    assert all(point.bytes_ratio == entries[point.policy]["bytes_ratio"] for point in frontier.points)
    chosen = frontier.for_batch(1).choose(0.0)
    assert chosen.bytes_ratio == min(entry["bytes_ratio"] for entry in entries.values())
    blocks = evaluation_blocks(Encoder(nested.out, model.config), nested.text, 200)
    found = evaluate_checkpoint(str(nested.out), nested.text, tokens=200)
    for entry in found["policies"]:
        tables = make_tables(model, [policies[entry["policy"]]])
        logits = model(StepInputs.whole_sequences(blocks), None, tables).logits.view(*blocks.shape, -1)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()).item()
        assert entry["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3), entry["policy"]


def test_the_report_speaks_of_bytes(nested: Made) -> None:
    said = (nested.out / "report.md").read_text()
    assert "of the dense model's weight bytes" in said
    processor = read_json(nested.out / "report.json")["conditions"]["prefill_costs"]["processor"]
    assert f"in a prompt's step on {processor}" in said
    assert "active parameters" not in said.split("## Policies")[0]
    assert "Bits of the FFN per layer and policy" in (nested.out / "report.html").read_text()
    assert "TOP1" not in said


def test_a_stopped_conversion_goes_on_to_the_same_result(nested: Made, tmp_path: Path) -> None:
    for pattern in ("*/layers/1/done.json", "*/head.json", "*/nested.json", "*/damages.json"):
        with killed.at(pattern):
            convert(str(nested.dense), tmp_path / "out", nested.recipe, [nested.text])
    assert convert(str(nested.dense), tmp_path / "out", nested.recipe, [nested.text])
    for name in ("model.safetensors", "routing/frontier.json", "routing/policies/balanced.json"):
        assert (tmp_path / "out" / name).read_bytes() == (nested.out / name).read_bytes()


def test_profile_chooses_again(nested: Made, tmp_path: Path) -> None:
    before = {name: policy.version for name, policy in read_policies(nested.out, read_config(nested.out)).items()}
    report = reprofile(str(nested.out), make_text(tmp_path / "other.txt", seed=3))
    after = read_policies(nested.out, read_config(nested.out))
    assert after["full"].version == before["full"]
    assert {entry["policy"] for entry in report["policies"]} >= {"full", "quality", "balanced", "fast"}


def test_moments_are_of_what_each_matrix_multiplies(nested: Made) -> None:
    """With these moments the error of a changed matrix is what the model's own inputs give."""
    model = StreamedModel(nested.dense, CPU)
    blocks = torch.arange(64).view(2, 32)
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, given: seen.update({name: given[0].flatten(0, -2)})

    attention, mlp = model.layer(1).self_attn, model.ffn(1)
    assert isinstance(attention, Attention)
    parts = {"attention": attention.v_proj, "output": attention.o_proj, "ffn": mlp.up_proj, "hidden": mlp.down_proj}
    hooks = [part.register_forward_pre_hook(watch(name)) for name, part in parts.items()]
    moments: dict[int, LayerMoments] = {}
    hidden_states = layer_moments(model, blocks, moments.__setitem__)
    for hook in hooks:
        hook.remove()
    for name, inputs in seen.items():
        torch.testing.assert_close(getattr(moments[1], name), inputs.t() @ inputs, rtol=1e-4, atol=1e-3)
    assert head_moments(model, hidden_states).shape == (model.config.hidden_size,) * 2
    measured = measure(model, None, blocks, [(None,) * model.config.num_hidden_layers])
    assert math.isfinite(next(iter(measured.values())).perplexity)


def change(part: str, index: int, damage: float, saved: float, refined: bool = False) -> dict[str, Any]:
    return {"part": part, "index": index, "refined": refined, "damage": damage, "saved": saved}


def test_the_solver_takes_the_least_damage_per_byte_first(nested: Made) -> None:
    """Layer 1's FFN costs nothing and goes first. Layer 0's is refined first, and reads 4 bits alone at the end. Refining layer
    2's does not pay, so it changes at once. The head stays refined. The named policies and those for batches have no neurons to
    refine."""
    config: ModelConfig = read_config(nested.out)
    depth = config.num_hidden_layers
    changes = [
        change("ffn", 0, 0.01, 0.08, refined=True),
        change("ffn", 0, 0.9, 0.1),
        change("ffn", 1, 0.0, 0.08, refined=True),
        change("ffn", 1, 0.0, 0.1),
        change("ffn", 2, 0.3, 0.05, refined=True),
        change("ffn", 2, 0.35, 0.1),
        *(change("attention", index, 0.1, 0.05) for index in range(depth)),
        change("head", depth, 0.01, 0.19, refined=True),
        change("head", depth, 0.7, 0.2),
    ]
    found = bit_candidates(config, changes, small_recipe(method="nested", **{"nested.points": 50}))
    rules = sorted(found.rules.values(), key=lambda variant: sum((rule.bits or 16) == 4 for rule in variant if rule))
    assert len(set(rules)) == len(rules)
    first = next(variant for variant in rules if any(rule and rule.bits == 4 for rule in variant))
    assert [rule and (rule.bits, rule.refine) for rule in first] == [(8, None), (4, None), (8, None), (8, None)]
    seen = {place: {(rule.bits, rule.refine) for variant in rules if (rule := variant[place])} for place in range(depth + 1)}
    assert (4, 1.5) in seen[0] and (4, 8.0) in seen[depth]
    assert all(refine is None for place in (1, 2) for _, refine in seen[place])
    cheapest = [rule and (rule.bits, rule.refine) for rule in found.rules["fast"]]
    assert cheapest == [(4, None)] * depth + [(4, 8.0)]
    assert {rule and rule.refine for name, some in found.rules.items() if "refined" not in name for rule in some[:-1]} == {None}
    assert any("saved" in name for name in found.rules) and any("refined" in name for name in found.rules)


def test_policies_refine_what_a_token_needs(nested: Made) -> None:
    """The measured bytes of a policy that refines lie above those of the same bits alone."""
    config = read_config(nested.out)
    policies = read_policies(nested.out, config)
    refining = [name for name, policy in policies.items() if any(rule and rule.refine for rule in policy.layers)]
    assert refining
    frontier = read_frontier(nested.out)
    assert frontier is not None
    points = {point.policy: point for point in frontier.points}
    for name in set(refining) & set(points):
        unrefined = policies[name].bytes_ratio(config, (1.0,) * config.num_hidden_layers, 0.0)
        assert unrefined is not None and points[name].cost > unrefined


def test_a_batch_reads_what_its_tokens_refine_together(nested: Made) -> None:
    """Measured: more than one token, less than if all tokens refined different rows, or every row."""
    config, policies = read_config(nested.out), read_policies(nested.out, read_config(nested.out))
    experts = (1.0,) * config.num_hidden_layers
    kinds = set()
    for entry in read_json(nested.out / "report.json")["policies"]:
        policy = policies[entry["policy"]]
        alone, every = (policy.bytes_ratio(config, experts, rows) for rows in (0.0, policy.most_refined_rows(config)))
        kinds.add(policy.refines)
        assert alone is not None and every is not None
        if not policy.refines:
            assert entry["batch_bytes_ratio"] == entry["decode_bytes_ratio"] == alone
            continue
        apart = alone + 32 * (entry["decode_bytes_ratio"] - alone)
        assert entry["decode_bytes_ratio"] < entry["batch_bytes_ratio"] <= every
        assert entry["batch_bytes_ratio"] < apart
    assert kinds == {False, True}


def test_policies_that_refine_neurons_are_for_single_requests(nested: Made) -> None:
    """In batches they save bytes but no time. Even if no policy is as accurate at their cost, the frontier for batches has none
    of them."""
    config, changes = read_config(nested.out), read_json(nested.out / "report.json")["changes"]
    candidates = bit_candidates(config, changes, nested.recipe)

    class Known:
        """A model whose policies are the more accurate the more they read."""

        def __init__(self) -> None:
            self.config, self.reference = config, candidates.rules["full"]

        def measure(self, blocks: torch.Tensor, variants: Iterable[Rules]) -> dict[Rules, Measurement]:
            experts, rows = (1.0,) * config.num_hidden_layers, 10.0
            found = {}
            for rules in variants:
                refined = rows if any(rule and rule.refine is not None for rule in rules) else 0.0
                read = policy_of("rules", "", rules, config).bytes_ratio(config, experts, refined)
                assert read is not None
                found[rules] = Measurement(10 - read, experts, experts, refined, refined, 1.0, 0.0)
            return found

    model = cast(ConvertedModel, Known())
    frontier = measure_frontier(model, candidates, torch.zeros(1, 2, dtype=torch.int64)).frontier
    neurons = {name for name, rules in candidates.rules.items() if any(rule and rule.refine is not None for rule in rules[:-1])}
    assert neurons and neurons < {point.policy for point in frontier.for_batch(1).points}
    assert {point.policy for point in frontier.for_batch(32).points} == set(candidates.rules) - neurons


def test_named_policies_route_if_the_recipe_says_so(nested: Made) -> None:
    """`balanced` and `fast` then refine neurons, `quality` does not, and the cheapest policy still exists."""
    config, changes = read_config(nested.out), read_json(nested.out / "report.json")["changes"]
    plain = bit_candidates(config, changes, nested.recipe).rules
    routed = bit_candidates(config, changes, nested.recipe.override({"nested.route": True})).rules
    assert not any(rule and rule.refine for name in ("balanced", "fast") for rule in plain[name][:-1])
    assert all(any(rule and rule.refine for rule in routed[name][:-1]) for name in ("balanced", "fast"))
    assert (routed["full"], routed["quality"], routed["saved-100"]) == (plain["full"], plain["quality"], plain["fast"])
    with pytest.raises(ValueError, match=r"nested\.route: needs nested\.top_bits = 16"):
        nested.recipe.override({"nested.route": True, "nested.top_bits": 8})


def test_refinement_can_be_turned_off(nested: Made, tmp_path: Path) -> None:
    """As the guide says: with a floor that no neuron reaches, no policy refines neurons."""
    out = tmp_path / "out"
    assert convert(str(nested.dense), out, small_recipe(method="nested", **{"nested.refine": 1000.0}), [nested.text])
    for policy in read_policies(out, read_config(out)).values():
        assert all(rule is None or rule.refine is None for rule in policy.layers)


def test_a_perplexity_guard_is_kept(nested: Made, tmp_path: Path) -> None:
    """The cheapest measured policy within the ratio is added, as every method does."""
    out = tmp_path / "out"
    assert convert(str(nested.dense), out, small_recipe(method="nested", max_perplexity_ratio=1.01), [nested.text])
    entries = {entry["policy"]: entry for entry in read_json(out / "report.json")["policies"]}
    assert entries["ratio-1.01"]["perplexity_ratio"] <= 1.01
    assert entries["ratio-1.01"]["bytes_ratio"] < 0.54


def test_only_some_layers_are_refused(source: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers: is 0; method nested rounds every layer"):
        convert(str(source), tmp_path / "out", small_recipe(method="nested", layers="0"), [text])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def planes(nested: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The same source, of which only the planes are kept."""
    recipe = small_recipe(method="nested", **{"nested.top_bits": 8})
    out = tmp_path_factory.mktemp("planes") / "out"
    assert convert(str(nested.dense), out, recipe, [nested.text])
    return Made(nested.dense, nested.text, out, recipe)


def test_a_checkpoint_of_planes_is_half_as_large(planes: Made) -> None:
    dense, own = TensorReader(planes.dense), TensorReader(planes.out)
    sizes = [sum(tensor.nbytes for tensor in map(reader.stored, reader.files)) for reader in (dense, own)]
    assert sizes[1] < 0.6 * sizes[0]
    config = read_config(planes.out)
    assert (config.nested_bits, config.nested_top_bits) == ((4, 8), 8)
    floats = [name for name in own.files if own.get(name).is_floating_point()]
    assert not [name for name in floats if not any(part in name for part in ("norm", "scales", "bias"))]
    said = (planes.out / "report.md").read_text()
    assert "The whole weights are not stored: `full` is the dense model at 8 bits" in said
    assert "all bits" not in said


def test_policies_of_planes_are_measured_against_the_source(planes: Made) -> None:
    """`full` is 8 bits, and says so. Figures are relative to the dense source, wherever it is now."""
    model = load_model(planes.out, torch.float32, CPU)
    policies = read_policies(planes.out, model.config)
    entries = {entry["policy"]: entry for entry in read_json(planes.out / "report.json")["policies"]}
    costs = [entries[name]["bytes_ratio"] for name in ("full", "quality", "balanced", "fast")]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4
    assert costs[0] == pytest.approx(0.53, abs=0.01)
    whole = replace(
        policies["full"], layers=tuple(LayerRule.full(layer) for layer in model.config.layers if layer), head_bits=None
    )
    assert whole.bytes_ratio(model.config, (1.0,) * 3, 0.0) == pytest.approx(costs[0])
    assert {rule and (rule.bits, rule.attention_bits, rule.refine) for rule in policies["full"].layers} == {(8, 8, None)}
    assert not [name for name, policy in policies.items() if any(rule and rule.refine for rule in policy.layers)]
    for where in (None, planes.dense):
        found = evaluate_checkpoint(str(planes.out), planes.text, policy="full", tokens=200, dense=where)
        source = evaluate_checkpoint(str(planes.dense), planes.text, tokens=200)
        (full,) = found["policies"]
        assert found["dense"]["perplexity"] == pytest.approx(source["policies"][0]["perplexity"], rel=1e-4)
        assert full["perplexity_ratio"] == pytest.approx(full["perplexity"] / found["dense"]["perplexity"])
        assert 0 < full["kl"] < 0.05 and full["perplexity_ratio"] != 1


def test_planes_without_their_source(planes: Made, tmp_path: Path) -> None:
    """They are measured alone; what is relative to the source is null, and `profile` asks for it."""
    copy = shutil.copytree(planes.out, tmp_path / "copy")
    raw = read_json(copy / "provenance.json")
    write_json(copy / "provenance.json", {**raw, "source": {**raw["source"], "path": str(tmp_path / "gone")}})
    found = evaluate_checkpoint(str(copy), planes.text, policy="fast", tokens=200)
    assert found["dense"]["perplexity"] is None and found["policies"][0]["kl"] is None
    with pytest.raises(ValueError, match="its dense source is needed"):
        reprofile(str(copy), planes.text)
    report = reprofile(str(copy), make_text(tmp_path / "other.txt", seed=3), planes.dense)
    entries = {entry["policy"]: entry for entry in report["policies"]}
    assert entries["full"]["perplexity_ratio"] != 1 and entries["full"]["bytes_ratio"] == pytest.approx(0.53, abs=0.01)


def test_planes_are_exported(planes: Made, tmp_path: Path) -> None:
    """As a dense model with the weights that the policy's bits stand for."""
    model = load_model(planes.out, torch.float32, CPU)
    ids = torch.arange(32).view(1, 32)
    for name in ("full", "quality"):
        export(planes.out, tmp_path / name, "dense", name)
        written = load_model(tmp_path / name, torch.float32, CPU)
        policy = read_policies(planes.out, model.config)[name]
        unrefined = replace(policy, head_refine=None)
        ours = model(StepInputs.whole_sequences(ids), None, make_tables(model, [unrefined])).logits
        theirs = written(StepInputs.whole_sequences(ids), None, make_tables(written, [])).logits
        assert F.cosine_similarity(ours, theirs, dim=-1).min() > 0.999  # written in bf16
        assert read_config(tmp_path / name).nested_top_bits is None


def test_top_bits_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested.top_bits: must be 8 or 16, got 4"):
        small_recipe(method="nested", **{"nested.top_bits": 4})
