"""How many machines does this load need, with and without automatic control? A simulation over measured step costs.

    python -m loadtests.simulate MODEL --rate 40 --seconds 300 --poisson --goodput ttft:2000 tpot:100
    python -m loadtests.simulate MODEL --trace azure.csv --speed 1 --seconds 600 --goodput ttft:2000 --validate

It first runs the engine on this machine for some seconds to learn what its steps cost. Then it simulates the load on 1, 2, 3
... machines, which take turns, until `--share` of the requests meet the objectives. The scheduler, admission and automatic
control are those of the server; only the time of a step comes from the costs. HTTP is left out, unless `--request-ms` and
`--token-ms` say what it adds. `--validate` also runs the engine for real, on one machine's part of the load. It shows the run
beside two simulations: one with the costs that were learned before, and one with those of the run itself. The first tells how
far the answer can be trusted, the second how much of its error is a drift of the machine.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ladimo.checkpoint import read_config, read_frontier, read_policies
from loadtests.common.conditions import conditions
from loadtests.common.records import command_line, finish
from loadtests.load.client import Outcome
from loadtests.load.figures import parse_objectives, show, summary
from loadtests.load.machine import NO_OVERHEAD, Machine, Overhead, RealClock, VirtualClock, simulated_core
from loadtests.load.workload import Lengths, Planned, parse_lengths, parse_routing, plan
from loadtests.load_test import add_schedule, schedule
from server.engine.build import build_core
from server.engine.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.messages import Submit
from server.engine.request import GenerationRequest, SamplingParams
from server.policies.costs import StepCosts
from server.policies.load_meter import LoadMeter
from server.policies.store import PolicyStore
from server.policies.targets import AtAccuracy, Automatic, Objective, Target

ACCURACIES = (1.0, 0.5, 0.0)  # whose steps are measured
CALIBRATION_TOKENS = 16
COMPARED = ("good_share", "mean_accuracy", "output_throughput", "p50_ttft_ms", "p90_ttft_ms", "mean_tpot_ms")


def learn(core: EngineCore, store: PolicyStore, prompt_tokens: int, clock: RealClock) -> StepCosts:
    """Run batches of 1, 2, 4 ... requests under several policies. Returns what their steps cost."""
    meter, number = LoadMeter(store.price), 0
    policies = [store.resolve(state=store.set_default({"accuracy": accuracy})).policy for accuracy in ACCURACIES]
    for rounds in range(2):
        for policy in policies:
            batch = 1
            while batch <= core.limits.max_num_seqs:
                for _ in range(batch):
                    number += 1
                    prompt = tuple((number * 7 + place * 13) % core.limits.vocab_size for place in range(prompt_tokens))
                    sampling = SamplingParams(max_tokens=CALIBRATION_TOKENS, temperature=0.0, ignore_eos=True)
                    core.handle(Submit(GenerationRequest(f"c{number}", prompt, sampling, policy)))
                while core.has_work:
                    stats = core.step().stats
                    if rounds:  # the first round warms up
                        meter.observe(stats, clock())
                batch *= 2
    return meter.costs


def machines_needed(
    parts: "Parts", planned: Sequence[Planned], default: Target, args: argparse.Namespace
) -> tuple[int | None, dict[str, Any]]:
    """The smallest number of machines at which enough requests meet the objectives, and the figures there. None: even the
    largest number is not enough."""
    figures: dict[str, Any] = {}
    for machines in range(1, args.max_machines + 1):
        outcomes: list[Outcome] = []
        for part in range(machines):
            outcomes += parts.simulate(planned[part::machines], default)
        figures = summary(sorted(outcomes, key=lambda outcome: outcome.due), args.goodput)
        if figures["good_share"] >= args.share:
            return machines, figures
    return None, figures


def errors(simulated: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, float | None]:
    """By how much a simulation is off, as a share of the measured figure. None where one of them is missing or 0."""
    return {
        name: simulated[name] / measured[name] - 1 if simulated[name] is not None and measured[name] else None
        for name in COMPARED
    }


class Parts:
    """A model's policies, and what its steps cost."""

    def __init__(
        self, directory: Path, config: EngineConfig, max_queue: int, frontier_batch: int, overhead: Overhead = NO_OVERHEAD
    ) -> None:
        self._overhead = overhead
        self._model, self._config, self._max_queue = read_config(directory), config, max_queue
        self._policies = read_policies(directory, self._model)
        frontier = read_frontier(directory)
        self._frontier = None if frontier is None else frontier.for_batch(frontier_batch)
        self.costs = StepCosts()

    def store(self, default: Target | None = None) -> PolicyStore:
        return PolicyStore(self._model, self._policies, self._frontier, default)

    def simulate(self, planned: Sequence[Planned], default: Target, costs: StepCosts | None = None) -> list[Outcome]:
        """`costs` None: those that were learned before."""
        clock, store = VirtualClock(), self.store(default)
        core = simulated_core(store, costs or self.costs, self._config, clock, self._overhead)
        return Machine(core, store, clock, self._max_queue).run(planned)

    def run(self, core: EngineCore, planned: Sequence[Planned], default: Target) -> tuple[list[Outcome], StepCosts]:
        """The same for real, and what the steps cost in this run."""
        machine = Machine(core, self.store(default), RealClock(), self._max_queue)
        return machine.run(planned), machine.meter.costs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    add_schedule(parser)
    parser.add_argument("--prompt-tokens", type=parse_lengths, default=Lengths(64, 64), metavar="LOW-HIGH")
    parser.add_argument("--output-tokens", type=parse_lengths, default=Lengths(32, 32), metavar="LOW-HIGH")
    parser.add_argument("--goodput", nargs="+", default=["ttft:2000"], metavar="ttft:MS", help="objectives: ttft:MS tpot:MS")
    parser.add_argument("--share", type=float, default=0.9, help="of the requests that must meet them")
    parser.add_argument("--min-accuracy", type=float, default=0.0, help="the floor of automatic control")
    parser.add_argument("--accuracy", type=float, default=1.0, help="without automatic control")
    parser.add_argument("--max-machines", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--frontier-batch", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--request-ms", type=float, default=0.0, help="what HTTP adds for each request, in the simulation")
    parser.add_argument("--token-ms", type=float, default=0.0, help="what HTTP adds for each token, in the simulation")
    parser.add_argument("--validate", action="store_true", help="run one machine's part for real, too; takes --seconds twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the record to a file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    logging.getLogger("server").setLevel(logging.WARNING)
    try:
        args.goodput = parse_objectives(args.goodput)
        record = measure(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    record |= {
        "benchmark": "simulate",
        "command": command_line("simulate", argv),
        "conditions": {**conditions(), "seed": args.seed},
    }
    for name, answer in record["answers"].items():
        figures = answer["figures"]
        print(
            f"{name}: {answer['machines'] or f'more than {args.max_machines}'} machines; inside the objectives "
            f"{show(figures['good_share'])}, mean accuracy {show(figures['mean_accuracy'])}"
        )
        for run, figures in answer.get("runs", {}).items():
            print(f"  {run:<28} " + ", ".join(f"{name} {show(figures[name])}" for name in COMPARED))
        for run, off in answer.get("errors", {}).items():
            shown = ", ".join(f"{name} {share:+.0%}" for name, share in off.items() if share is not None)
            print(f"  error of {run:<19} {shown}")
    finish(record, args.json)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    objectives = args.goodput
    target = Objective(objectives.tpot, objectives.ttft, args.min_accuracy)
    if target.itl_ms is None and target.ttft_ms is None:
        raise ValueError("--goodput: automatic control needs ttft or tpot")
    config = EngineConfig(args.device, max_num_seqs=args.max_num_seqs, max_step_tokens="auto", prefix_caching=False)
    overhead = Overhead(args.request_ms / 1000, args.token_ms / 1000)
    parts = Parts(args.model, config, args.max_queue, args.frontier_batch, overhead)
    core = build_core(args.model, config)
    parts.costs = learn(core, parts.store(), args.prompt_tokens.high, RealClock())
    text = [number % (core.limits.vocab_size - 3) + 3 for number in range(20_000)]
    arrivals = schedule(args)
    routing = [parse_routing("default")]
    planned = plan(arrivals, text, args.prompt_tokens, args.output_tokens, routing, 0.0, core.limits.max_model_len, args.seed)
    if not planned:
        raise ValueError("no request arrives in this time")
    answers: dict[str, dict[str, Any]] = {}
    for name, default in (("fixed", AtAccuracy(args.accuracy)), ("automatic control", Automatic(target))):
        machines, figures = machines_needed(parts, planned, default, args)
        answers[name] = {"machines": machines, "figures": figures}
        if args.validate:
            part = planned[:: machines or args.max_machines]
            outcomes, costs = parts.run(core, part, default)
            measured = summary(outcomes, objectives)
            runs = {
                "simulated": summary(parts.simulate(part, default), objectives),
                "simulated, costs of the run": summary(parts.simulate(part, default, costs), objectives),
            }
            answers[name]["runs"] = {"measured": measured, **runs}
            answers[name]["errors"] = {kind: errors(figures, measured) for kind, figures in runs.items()}
    return {"requests": len(planned), "answers": answers}


if __name__ == "__main__":
    main()
