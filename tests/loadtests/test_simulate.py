"""The simulation: virtual time over the server's own code, and the answer to how many machines a load needs."""

import json
from pathlib import Path

import pytest

from ladimo.checkpoint import read_config, read_frontier, read_policies
from loadtests import simulate
from loadtests.load.arrivals import Arrival
from loadtests.load.figures import Objectives, summary
from loadtests.load.machine import NO_OVERHEAD, Machine, Overhead, VirtualClock, simulated_core
from loadtests.load.workload import Lengths, Planned, parse_routing, plan
from server.engine.config import EngineConfig
from server.policies.costs import StepCosts
from server.policies.store import PolicyStore
from server.policies.targets import AtAccuracy, Automatic, Objective, Target

CONFIG = EngineConfig(max_num_seqs=4, max_model_len=64, block_size=4)
STEP, TOKEN = 0.02, 0.0002  # of a step at price 1, and of a prompt token


def known_costs() -> StepCosts:
    """A decode step takes STEP times its price, a prompt token TOKEN times its price."""
    costs = StepCosts()
    for _ in range(40):
        for price in (0.5, 0.75, 1.0):
            for rows in (1, 2, 4):
                costs.observe({price: rows}, {}, STEP * price)
            costs.observe({}, {price: 16}, 16 * TOKEN * price)
            costs.observe({}, {price: 32}, 32 * TOKEN * price)
    return costs


def served(
    moe_dir: Path, planned: list[Planned], default: Target, max_queue: int = 64, overhead: Overhead = NO_OVERHEAD
) -> dict[str, object]:
    config = read_config(moe_dir)
    frontier = read_frontier(moe_dir)
    assert frontier is not None
    store, clock = PolicyStore(config, read_policies(moe_dir, config), frontier.for_batch(1), default), VirtualClock()
    machine = Machine(simulated_core(store, known_costs(), CONFIG, clock, overhead), store, clock, max_queue)
    return summary(machine.run(planned), Objectives(ttft=1000))


def planned(gap: float, count: int) -> list[Planned]:
    due = [Arrival(gap * number) for number in range(count)]
    return plan(due, list(range(3, 200)), Lengths(16, 16), Lengths(11, 11), [parse_routing("default")], 0.0, 64, 0)


def test_alone_a_request_takes_what_its_steps_cost(moe_dir: Path) -> None:
    figures = served(moe_dir, planned(10.0, 3), AtAccuracy(1.0))
    frontier = read_frontier(moe_dir)
    assert frontier is not None
    price = frontier.for_batch(1).choose(1.0).cost
    assert figures["p99_ttft_ms"] == pytest.approx(1000 * 16 * TOKEN * price, rel=0.05)
    assert figures["mean_tpot_ms"] == pytest.approx(1000 * STEP * price, rel=0.05)
    assert figures["mean_accuracy"] == 1.0


def test_http_adds_to_every_request_and_token(moe_dir: Path) -> None:
    plain = served(moe_dir, planned(10.0, 3), AtAccuracy(1.0))
    heavy = served(moe_dir, planned(10.0, 3), AtAccuracy(1.0), overhead=Overhead(request=0.5, token=0.01))
    assert heavy["p99_ttft_ms"] == pytest.approx(plain["p99_ttft_ms"] + 510, rel=0.01)  # type: ignore[operator]
    assert heavy["mean_tpot_ms"] == pytest.approx(plain["mean_tpot_ms"] + 10, rel=0.01)  # type: ignore[operator]


def test_errors_are_shares_of_what_was_measured() -> None:
    zeros = dict.fromkeys(simulate.COMPARED, 0.0)
    found = simulate.errors({**zeros, "output_throughput": 90.0}, {**zeros, "output_throughput": 100.0})
    assert found == {**dict.fromkeys(simulate.COMPARED), "output_throughput": pytest.approx(-0.1)}


def test_a_full_machine_waits_and_refuses_and_the_knob_helps(moe_dir: Path) -> None:
    """Four at once take 10 steps of 15 ms and their prompts. So the machine can do about 24 requests per second."""
    load = planned(1 / 35, 500)
    fixed = served(moe_dir, load, AtAccuracy(1.0), max_queue=20)
    assert fixed["errors"] and isinstance(fixed["good_share"], float) and fixed["good_share"] < 0.75
    eased = served(moe_dir, load, Automatic(Objective(ttft_ms=1000)), max_queue=20)
    assert isinstance(eased["good_share"], float) and eased["good_share"] > fixed["good_share"] + 0.05
    assert isinstance(eased["mean_accuracy"], float) and eased["mean_accuracy"] < 0.9
    assert served(moe_dir, load, Automatic(Objective(ttft_ms=1000)), max_queue=20) == eased, "it follows from its arguments"


def test_the_command_answers_and_validates_itself(moe_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [str(moe_dir), "--rate", "40", "--seconds", "1", "--prompt-tokens", "8-16", "--output-tokens", "4-8"]
    flags += [
        "--max-num-seqs",
        "4",
        "--goodput",
        "ttft:5000",
        "--device",
        "cpu",
        "--validate",
        "--json",
        str(tmp_path / "out.json"),
    ]
    simulate.main(flags)
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    assert set(record["answers"]) == {"fixed", "automatic control"}
    for answer in record["answers"].values():
        assert answer["machines"] == 1
        assert {run["requests"] for run in answer["runs"].values()} == {record["requests"]}
        assert all(run["completed"] == record["requests"] for run in answer["runs"].values())
        assert set(answer["errors"]) == {"simulated", "simulated, costs of the run"}
    assert "fixed: 1 machines; inside the objectives 1.000, mean accuracy 1.000" in out
    with pytest.raises(SystemExit):
        simulate.main([*flags, "--goodput", "e2el:5"])
