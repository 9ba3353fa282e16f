"""What a server's steps did during a test, from the counters of its /metrics: tokens, distinct experts and bytes per step."""

from collections.abc import Mapping

import httpx

Samples = Mapping[str, float]  # sums over all labels, by the name of the sample


async def read_samples(http: httpx.AsyncClient) -> Samples:
    """The samples of /metrics, summed over their labels. Empty if the server has no such page."""
    try:
        reply = await http.get("/metrics")
    except httpx.HTTPError:
        return {}
    sums: dict[str, float] = {}
    for line in reply.text.splitlines() if reply.status_code == 200 else ():
        if not line.startswith("#") and " " in line:
            name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
            try:
                sums[name] = sums.get(name, 0.0) + float(value)
            except ValueError:  # another server's page may have time stamps or other additions
                continue
    return sums


def step_figures(before: Samples, after: Samples) -> dict[str, float | None]:
    """Means over the steps between two readings. None: the server does not tell.

    tokens_per_step. distinct_experts_per_step: by expert layer. gigabytes_per_step: of nested weights.
    """

    def rise(name: str) -> float:
        return after.get(f"ladimo_{name}", 0.0) - before.get(f"ladimo_{name}", 0.0)

    def ratio(amount: str, by: str) -> float | None:
        return rise(amount) / rise(by) if rise(amount) > 0 and rise(by) > 0 else None

    read = ratio("weight_bytes_total", "engine_step_seconds_count")
    return {
        "tokens_per_step": ratio("step_tokens_sum", "step_tokens_count"),
        "distinct_experts_per_step": ratio("layer_distinct_experts_per_step_sum", "layer_distinct_experts_per_step_count"),
        "gigabytes_per_step": None if read is None else read / 1e9,
    }
