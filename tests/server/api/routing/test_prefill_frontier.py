"""`--frontier-batch prefill`: an accuracy chooses by the time of prompts on the machine that serves."""

from pathlib import Path

import httpx
import pytest

from ladimo.policy import PREFILL
from server.launch import build_services
from server.settings import read_settings
from tests.factories import make_nested
from tests.server.real import serving_model


async def test_the_server_times_prompts_and_says_where(tmp_path: Path) -> None:
    nested = make_nested(tmp_path / "nested")
    async with serving_model(nested, "--frontier-batch", "prefill") as address, httpx.AsyncClient(base_url=address) as client:
        routing = (await client.get("/v1/routing")).json()
        costs = routing["prefill_costs"]
        assert routing["frontier_batch"] == PREFILL
        assert "thread" in costs["processor"]
        assert min(costs["bits4"], costs["bits8"]) > 0
        assert {point["batch"] for point in routing["frontier"]} == {PREFILL}
        assert routing["frontier"][-1]["policy"] == "full"
        # Those that others beat have figures, too.
        ratios = {policy["name"]: policy["figures"]["prefill_time_ratio"] for policy in routing["policies"]}
        assert ratios["full"] == pytest.approx(1)
        assert set(ratios) == {"full", "quality", "balanced", "fast"}
        body = {"model": "model", "prompt": "a", "max_tokens": 1, "routing": {"accuracy": 0}}
        answer = (await client.post("/v1/completions", json=body)).json()
        assert answer["routing"]["policy"] == routing["frontier"][0]["policy"]


def test_a_model_of_one_form_is_not_timed(moe_dir: Path) -> None:
    services = build_services(read_settings([str(moe_dir), "--device", "cpu", "--frontier-batch", "prefill"]))
    store = services.store
    assert store.form_costs is None and store.frontier is not None and store.frontier.is_prefill
    assert store.price("full") == store.price_at(1.0)


@pytest.mark.parametrize("wrong", ["0", "prompts"])
def test_a_batch_size_or_prefill(wrong: str) -> None:
    assert read_settings(["m", "--frontier-batch", "32"]).frontier_batch == 32
    with pytest.raises(ValueError, match=r"^--frontier-batch .*'prefill'$"):
        read_settings(["m", "--frontier-batch", wrong])
