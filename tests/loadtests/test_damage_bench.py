"""The benchmark of damage per layer, on a tiny model."""

from pathlib import Path

import pytest

from loadtests.accuracy.damage_bench import agreement, bench, table
from tests.factories import make_dense
from tests.ladimo.convert.conftest import make_text


def test_every_way_gives_a_plan_for_every_budget(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense", max_position_embeddings=32, intermediate_size=90)
    result = bench(dense, make_text(tmp_path / "text.txt"), 2000, (0.9, 0.8, 0.7), tmp_path / "work")
    assert [(row["budget"], row["damage"]) for row in result["plans"]] == [
        (budget, way) for budget in (0.9, 0.8, 0.7) for way in ("measured", "estimated", "corrected")
    ]
    for row in result["plans"]:
        assert row["active_parameters_ratio"] <= row["budget"]
        assert len(row["widths"]) == 3
    assert result["agreement"]["corrected"]["log_correlation"] > 0.9
    assert set(result["seconds"]) == {"measured", "estimated", "corrected"}
    assert len(table(result).splitlines()) == 2 + 3


def test_agreement_is_of_logarithms() -> None:
    found = agreement({0: {1: 0.1, 2: 0.01}, 1: {1: 0.2}}, {0: {1: 0.2, 2: 0.02}, 1: {1: 0.4}})
    assert found["log_correlation"] == pytest.approx(1.0)
    assert found["mean_log_ratio"] == pytest.approx(0.6931, abs=1e-3)
    assert found["sd_log_ratio"] == pytest.approx(0.0, abs=1e-9)
