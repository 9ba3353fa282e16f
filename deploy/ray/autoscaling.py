"""How many replicas the load needs: by the requests in the system, and by the objective of automatic control."""

from collections.abc import Callable, Mapping
from typing import Any

PRESSURE = "ladimo_objective_pressure"


def objective_pressure(status: Mapping[str, Any] | None, price_at: Callable[[float], float]) -> float:
    """How many replicas the load of this one needs to meet its targets at accuracy 1.

    `status`: of automatic control; None while it is off, and then this is 0. Its largest signal says how far the load is over
    what meets the targets now. The price of the accuracy that control has set says how much more accuracy 1 costs.
    """
    if status is None:
        return 0.0
    worst = max(status["signals"].values(), default=0.0)
    return float(worst * price_at(1.0) / price_at(status["accuracy"]))


def desired_replicas(context: Any) -> tuple[float, dict[str, Any]]:
    """Ray Serve's autoscaling policy of this application: the larger of both needs. Ray Serve applies the bounds, delays and
    factors of its AutoscalingConfig. `context`: its AutoscalingContext.

    A replica that has not reported its pressure counts as one without any.
    """
    queue = context.total_num_requests / context.config.get_target_ongoing_requests()
    pressure = (context.aggregated_metrics or {}).get(PRESSURE, {})
    return max(queue, sum(pressure.values())), {}
