"""Damage of single layers from gradients: close to the measured one where it is small, corrected where it is large."""

import math
from pathlib import Path

import pytest
import torch

from ladimo.convert.evaluation.measure import measure
from ladimo.convert.ffn.split import contiguous_partition, split_ffn
from ladimo.convert.policies.sensitivity import estimate_damages, rule_damages
from ladimo.convert.streamed_model import StreamedModel
from ladimo.model.config import MoeLayerConfig
from ladimo.model.moe import ExpertLayer
from ladimo.policy import LayerRule
from tests.factories import make_dense

EXPERTS = 8
RULES = [LayerRule(top_k=count, renormalize=False, experts=tuple(range(count))) for count in (1, 4, 7)]


class Model:
    """A dense model whose FFNs are small beside the rest, its exact partitions, and text."""

    def __init__(self, directory: Path, initializer_range: float) -> None:
        path = make_dense(directory, max_position_embeddings=32, initializer_range=initializer_range)
        self.dense = StreamedModel(path, torch.device("cpu"))
        self.blocks = torch.randint(256, (60, 32), generator=torch.Generator().manual_seed(0))
        self.depth = self.dense.config.num_hidden_layers

    def experts(self, index: int) -> ExpertLayer:
        mlp = self.dense.ffn(index)
        partition = contiguous_partition(mlp.up_proj.out_features, EXPERTS)
        config = MoeLayerConfig(EXPERTS, EXPERTS, partition.shape[1], expert_weight="one", router="none")
        return split_ffn(mlp, partition, config, {})

    def measured(self, index: int, rule: LayerRule) -> float:
        reference = (None,) * self.depth
        alone = tuple(rule if layer == index else None for layer in range(self.depth))
        found = measure(self.dense, self.experts, self.blocks, [reference, alone], reference)[alone].kl
        assert found is not None
        return found


@pytest.fixture(scope="module")
def mild(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("mild") / "dense", 0.02)


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("wild") / "dense", 0.1)


def test_small_damage_is_estimated_well(mild: Model) -> None:
    rules = dict.fromkeys(range(mild.depth), RULES)
    found = estimate_damages(mild.dense, mild.experts, rules, mild.blocks, samples=4)
    for index in rules:
        for rule in RULES:
            assert found[index][rule].kl.mean().item() == pytest.approx(mild.measured(index, rule), rel=0.1)


def test_large_damage_is_measured_where_it_is_worst_and_corrects_the_rest(wild: Model) -> None:
    rules = {0: RULES, 1: RULES}
    plain = rule_damages(wild.dense, wild.experts, rules, wild.blocks, samples=4, large=math.inf)
    assert not any(one.measured for own in plain.values() for one in own.values())
    found = rule_damages(wild.dense, wild.experts, rules, wild.blocks, samples=4, large=0.02)
    for index in rules:
        worst, *others = RULES
        assert plain[index][worst].kl < 0.7 * wild.measured(index, worst), "the second order is enough here"
        assert found[index][worst].kl == pytest.approx(wild.measured(index, worst), rel=0.1)
        assert [rule for rule in RULES if found[index][rule].measured] == [worst]
        for rule in others:
            measured = wild.measured(index, rule)
            before, after = (abs(math.log(one[index][rule].kl / measured)) for one in (plain, found))
            assert after < 0.8 * before


def test_damage_does_not_depend_on_which_layers_are_asked_for(mild: Model) -> None:
    whole = estimate_damages(mild.dense, mild.experts, {0: RULES, 1: RULES, 2: RULES}, mild.blocks, samples=1)
    one = estimate_damages(mild.dense, mild.experts, {1: RULES[:1]}, mild.blocks, samples=1)
    assert list(one) == [1]
    assert torch.equal(one[1][RULES[0]].kl, whole[1][RULES[0]].kl)


def test_distinct_experts_are_those_of_a_batch(mild: Model) -> None:
    found = estimate_damages(mild.dense, mild.experts, {1: RULES}, mild.blocks, samples=1)
    assert [found[1][rule].distinct_experts for rule in RULES] == [1.0, 4.0, 7.0]
