"""What policies cost in prompts: the sums, the frontier for prompts, and the measurement, by a clock that the tests set."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ladimo.checkpoint import read_config
from ladimo.model.config import ModelConfig
from ladimo.policy import PREFILL, Frontier, FrontierPoint, LayerRule, RoutingPolicy
from ladimo.prefill import FormCosts, highest_cost, prefill_frontier, prefill_time_ratio
from ladimo.prefill.costs import PROMPT
from ladimo.prefill.measure import ROUNDS, measure_form_costs
from tests.factories import make_nested

COSTS = FormCosts("a processor", "bfloat16", bits4=0.5, bits8=0.75, refined=2.0)


@pytest.fixture(scope="module")
def nested_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers are one expert each, as a conversion makes them; the first one is dense."""
    return make_nested(tmp_path_factory.mktemp("prefill") / "nested", num_experts=1, dense_layers=(0,))


@pytest.fixture
def config(nested_dir: Path) -> ModelConfig:
    return read_config(nested_dir)


def policy(config: ModelConfig, name: str = "p", head_bits: int | None = None, **numbers: float) -> RoutingPolicy:
    rule = LayerRule(1, renormalize=False, **numbers)  # type: ignore[arg-type]
    return RoutingPolicy(name, "", tuple(None if layer is None else rule for layer in config.layers), head_bits)


def experts(config: ModelConfig) -> tuple[float | None, ...]:
    return tuple(None if layer is None else 1.0 for layer in config.layers)


def test_the_time_is_the_sum_of_the_parts_at_their_bits(config: ModelConfig) -> None:
    attention, ffn, head = config.attention_parameters, config.ffn_parameters, config.head_parameters / PROMPT
    whole = config.dense_parameters + head

    def ratio(rows: float = 0.0, head_bits: int | None = None, **numbers: float) -> float:
        return prefill_time_ratio(policy(config, "p", head_bits, **numbers), config, experts(config), rows, COSTS)

    assert ratio() == pytest.approx(1)
    assert ratio(bits=8) == pytest.approx(1 - 2 * 0.25 * ffn / whole)  # the first layer is dense
    assert ratio(attention_bits=4) == pytest.approx(1 - 2 * 0.5 * attention / whole)
    assert ratio(head_bits=4) == pytest.approx(1 - 0.5 * head / whole)
    refined = 2.0 * 30 * config.hidden_size / whole
    assert ratio(30, bits=4, refine=1.0) == pytest.approx(1 - 2 * 0.5 * ffn / whole + refined)
    assert ratio(30, bits=4) == ratio(bits=4)  # only words were refined, for one token of the prompt


def test_a_model_without_whole_weights_reads_8_bits_where_a_policy_asks_for_all(config: ModelConfig) -> None:
    planes = replace(config, nested_top_bits=8)

    def ratio(config: ModelConfig, head_bits: int | None = None, **numbers: float) -> float:
        return prefill_time_ratio(policy(config, "p", head_bits, **numbers), config, experts(config), 0, COSTS)

    assert ratio(planes, bits=4) < ratio(planes) < ratio(config)
    all_layers = replace(planes, layers=(planes.layers[1],) * 3)
    assert ratio(all_layers) == ratio(all_layers, 8, bits=8, attention_bits=8)


def test_a_model_of_one_form_pays_by_its_multiply_adds(moe_dir: Path) -> None:
    config = read_config(moe_dir)
    half = tuple(None if layer is None else layer.num_experts / 2 for layer in config.layers)
    rule = RoutingPolicy("p", "", tuple(None if layer is None else LayerRule(2) for layer in config.layers))
    active = config.active_parameters_ratio(half) * config.dense_parameters
    head = config.head_parameters / PROMPT
    expected = (active + head) / (config.dense_parameters + head)
    assert prefill_time_ratio(rule, config, half, 0, None) == pytest.approx(expected)


def test_the_frontier_for_prompts_drops_what_only_saves_bytes(config: ModelConfig) -> None:
    """Refined neurons save bytes, not time."""
    policies = {
        "full": policy(config, "full"),
        "eight": policy(config, "eight", 8, bits=8, attention_bits=8),
        "refined": policy(config, "refined", 4, bits=4, attention_bits=4, refine=1.0),
        "four": policy(config, "four", 4, bits=4, attention_bits=4),
    }
    rows = {"refined": 300.0}  # of 576

    def point(name: str, perplexity: float, batch: int = 1) -> FrontierPoint:
        read = policies[name].bytes_ratio(config, experts(config), rows.get(name, 0.0))
        return FrontierPoint(batch, name, 1.0, perplexity, perplexity / 9, experts(config), read)

    stored = Frontier(
        (point("four", 11), point("refined", 10.4), point("eight", 10.3), point("full", 10), point("full", 10, 32))
    )
    assert policies["refined"].refined_rows(config, experts(config), stored.points[1].bytes_ratio) == pytest.approx(300)
    found = prefill_frontier(stored, policies, config, COSTS)
    assert [(one.batch, one.policy) for one in found.points] == [(PREFILL, name) for name in ("four", "eight", "full")]
    assert [one.policy for one in found.beaten] == ["refined"]
    beaten = found.find("refined")
    assert beaten is not None and beaten.cost == beaten.prefill_time_ratio
    assert found.choose(0).policy == "four" and found.is_prefill and not stored.is_prefill
    assert Frontier.from_dict(found.to_dict()).points == found.points
    # Without integer products, as on a GPU, fewer bits take longer, and only the dense model is left.
    slow = FormCosts("a GPU", "bfloat16", bits4=1.4, bits8=1.6, refined=3.0)
    assert [one.policy for one in prefill_frontier(stored, policies, config, slow).points] == ["full"]
    with pytest.raises(ValueError, match="names the policy 'eight', which the checkpoint lacks"):
        prefill_frontier(stored, {name: policies[name] for name in ("full", "four", "refined")}, config, COSTS)


def test_a_policy_without_figures_costs_at_most(config: ModelConfig) -> None:
    all_refined = policy(config, "p", 4, bits=4, refine=0.0)
    rows = all_refined.most_refined_rows(config)
    most = prefill_time_ratio(all_refined, config, experts(config), rows, COSTS)
    assert highest_cost(all_refined, config, COSTS, prefill=True) == most
    assert highest_cost(all_refined, config, None, prefill=False) == all_refined.bytes_ratio(config, experts(config), rows)


def test_the_fastest_step_counts(config: ModelConfig) -> None:
    """Whole weights take 4 s, 8 bits 3, 4 bits 2, and 5 with every neuron refined. In most rounds other work adds to that."""
    seconds = [4.0, 3.0, 2.0, 5.0]
    now = 0.0

    def times() -> Iterator[float]:
        nonlocal now
        for number in range(ROUNDS):
            for taken in seconds:
                yield now
                now += taken + (0.0 if number == 3 else 1.0 + number)
                yield now

    ticks = times()
    threads = torch.get_num_threads()
    found = measure_form_costs(config, torch.bfloat16, "cpu", tokens=20, clock=lambda: next(ticks))
    assert next(ticks, None) is None
    assert torch.get_num_threads() == threads
    assert (found.bits8, found.bits4) == (0.75, 0.5)
    # With these, a policy that refines every neuron of all layers takes 5/4 of the time, but for what the head takes.
    everything = replace(config, layers=(config.layers[1],) * 3)
    refined = policy(everything, "p", 4, bits=4, attention_bits=4, refine=0.0)
    ratio = prefill_time_ratio(refined, everything, (1.0,) * 3, 3 * 3 * config.intermediate_size, found)
    assert ratio == pytest.approx(1.25, rel=0.02)
    assert "thread" in found.processor and found.to_dict()["processor"] == found.processor
