"""What policies cost while prompts are computed. A prompt is bound by arithmetic, so the cost is time, and it depends on the
processor: `measure` finds what a multiply-add costs at each number of bits, `costs` what follows for policies."""

from ladimo.prefill.costs import FormCosts, highest_cost, prefill_frontier, prefill_time_ratio

__all__ = ["FormCosts", "highest_cost", "prefill_frontier", "prefill_time_ratio"]
