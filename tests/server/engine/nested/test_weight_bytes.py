"""The bytes of weights that a step of a nested model reads: each plane once, whoever wants it."""

from pathlib import Path

import pytest

from ladimo.checkpoint import read_config
from ladimo.model.config import ModelConfig
from ladimo.policy import LayerRule, RoutingPolicy
from server.engine.weight_bytes import WeightBytes
from tests.factories import make_moe, make_nested


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_config(make_nested(tmp_path_factory.mktemp("nested")))


def policy(config: ModelConfig, bits: int | None) -> RoutingPolicy:
    rule = LayerRule(4, bits=bits, attention_bits=bits)
    return RoutingPolicy(f"bits-{bits}", "", (rule,) * config.num_hidden_layers, bits)


def test_a_plane_is_read_once(config: ModelConfig) -> None:
    counter = WeightBytes(config)
    whole, at8, at4 = (policy(config, bits) for bits in (None, 8, 4))

    def read(*policies: RoutingPolicy) -> float:
        return counter.of_step(policies, 0)

    assert read(at4) < read(at8) < read(whole)
    assert read(at4, at8) == read(at8, at8) == read(at8)  # the low plane lies below the high one
    assert read(whole, at4) == pytest.approx(read(whole) + read(at4))  # the whole weights are bytes of their own
    assert read(whole, at4, at8) == read(whole, at8)


def test_one_token_reads_what_its_policy_costs(config: ModelConfig) -> None:
    counter, experts = WeightBytes(config), (4.0,) * config.num_hidden_layers
    whole = counter.of_step([policy(config, None)], 0)
    for bits in (4, 8):
        one = policy(config, bits)
        for rows in (0, 10):
            assert counter.of_step([one], rows) / whole == pytest.approx(one.bytes_ratio(config, experts, rows), rel=1e-6)


def test_where_the_top_is_8_bits_a_mixed_step_reads_what_full_reads(tmp_path: Path) -> None:
    """All bits are 8 bits there, and whatever others want lies below."""
    config = read_config(make_nested(tmp_path, top_bits=8))
    counter = WeightBytes(config)
    top, at8, at4 = (policy(config, bits) for bits in (None, 8, 4))
    assert counter.of_step([top, at4, at8], 0) == counter.of_step([top], 0) == counter.of_step([at8], 0)
    assert top.bytes_ratio(config, (4.0,) * config.num_hidden_layers, 0) == pytest.approx(0.53, abs=0.01)


def test_a_model_of_one_precision_counts_nothing(tmp_path: Path) -> None:
    config = read_config(make_moe(tmp_path, dense_layers=()))
    assert WeightBytes(config).of_step([RoutingPolicy("p", "", (LayerRule(2),) * config.num_hidden_layers)], 0) == 0
