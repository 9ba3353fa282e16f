"""What happens to a request's accuracy when the server is about to refuse requests, or when its deadline is near.

Automatic control reacts within a second; this acts on the single request. Whoever allows less accuracy gets less instead of a
refusal. The last places of the queue are for requests that accept the accuracy of automatic control.
"""

import asyncio

from server.api.admission import Admission, retry_after
from server.errors import QueueFull
from server.policies.route import Route
from server.policies.store import PolicyStore
from server.policies.tiers import Tier

PRESSED_SHARE = 0.9  # of the queue: from here on it is kept for requests that accept less accuracy


def under_pressure(route: Route, tier: Tier, deadline: float | None, store: PolicyStore, admission: Admission) -> Route:
    """The route, or one of lower accuracy that the request allows. Does nothing while automatic control is off.

    `deadline`: the event loop's time by which the answer must be complete. A tier that goes before others keeps its places.

    Raises QueueFull, naming the accuracy at which the request would be served.
    """
    queue = admission.queue
    if store.objective is None or queue is None:
        return route
    if route.floor is not None and route.accuracy is not None and route.floor < route.accuracy:
        if queue.share > PRESSED_SHARE:
            return store.lowered(route, route.floor, "queue")
        if deadline is not None and admission.answer_seconds(route.policy.name) > deadline - asyncio.get_running_loop().time():
            return store.lowered(route, route.floor, "deadline")
        return route
    level = store.resolve().accuracy
    assert level is not None
    accuracy = route.highest_accuracy
    accepts = route.floor is not None or (accuracy is not None and accuracy <= level)
    if queue.share > PRESSED_SHARE and not accepts and tier.priority >= 0 and level < 1:
        message = f"the queue is nearly full; at accuracy {level:g} or less this request would be served now"
        seconds = admission.meter.wait_seconds(queue)
        admission.refuse(QueueFull(message, retry_after=retry_after(seconds), accuracy=level))
    return route
