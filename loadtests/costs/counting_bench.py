"""The cost of counting experts: decode steps of one engine with and without counting, in turn.

    python -m loadtests.costs.counting_bench MODEL [--batch 1,8] [--policy full] [--rounds 9]

There are two figures per batch. The first is the share of the time that is spent in the counting calls, measured in the rounds
with counting. The second is the median ratio of rounds with counting to rounds without. It is noisy on a busy machine. This
works for CPUs only, because calls to a GPU return before the work is done.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ladimo.checkpoint import read_config, read_policies
from ladimo.model.inputs import RoutingTables
from loadtests.common.conditions import OtherLoad, conditions
from loadtests.common.runs import random_prompts, serve
from server.engine.build import build_core
from server.engine.config import EngineConfig


class Clock:
    """Measures the seconds spent in some functions. Nested calls are counted once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def timed(self, function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(*args: Any) -> None:
            started = time.perf_counter()
            self._depth += 1
            function(*args)
            self._depth -= 1
            if not self._depth:
                self.seconds += time.perf_counter() - started

        return run


@contextmanager
def counting(on: bool, clock: Clock) -> Iterator[None]:
    put_off = clock.timed(RoutingTables.defer) if on else lambda *_: None
    with (
        patch.object(RoutingTables, "defer", put_off),
        patch.object(RoutingTables, "settle", clock.timed(RoutingTables.settle)),
    ):
        yield


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a converted checkpoint")
    parser.add_argument("--batch", default="1,8", help="batch sizes")
    parser.add_argument("--policy", default="full")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--tokens", type=int, default=129, help="generated tokens; steps are counted 64 at a time")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    config = read_config(args.model)
    policy = read_policies(args.model, config)[args.policy]
    results = []
    load, begun = OtherLoad(), time.perf_counter()
    for batch in map(int, args.batch.split(",")):
        core = build_core(args.model, EngineConfig(device="cpu", max_num_seqs=batch, prefix_caching=False))
        prompts = random_prompts(batch, args.prompt, config.vocab_size)
        serve(core, [policy], prompts, args.tokens)  # warm-up
        shares, ratios = [], []
        for number in range(args.rounds):
            seconds: dict[bool, float] = {}
            for on in (True, False) if number % 2 == 0 else (False, True):
                clock = Clock()
                with counting(on, clock):
                    started = time.perf_counter()
                    serve(core, [policy], prompts, args.tokens)
                    seconds[on] = time.perf_counter() - started
                if on:
                    shares.append(clock.seconds / seconds[on])
            ratios.append(seconds[True] / seconds[False])
        share, ratio = statistics.median(shares), statistics.median(ratios)
        results.append({"batch": batch, "share": share, "shares": sorted(shares), "ratio": ratio, "ratios": sorted(ratios)})
        print(f"batch {batch:>3}: counting takes {share:.3%} of the time ({min(shares):.3%} to {max(shares):.3%}); ", end="")
        print(f"counted / uncounted {ratio:.4f} ({min(ratios):.4f}-{max(ratios):.4f})")
    other = load.cores(time.perf_counter() - begun)
    print(f"other processes kept {other:.2f} cores busy")
    record = {"benchmark": "counting_bench", "model": str(args.model), "policy": args.policy, "rounds": args.rounds}
    print(json.dumps({**record, "other_load_cores": other, "results": results, **conditions()}))


if __name__ == "__main__":
    main()
