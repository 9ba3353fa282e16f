"""What happens to a request's accuracy when the server is about to refuse requests, or when its deadline is near.

Automatic control reacts within a second; this acts on the single request. Whoever allows less accuracy gets less instead of a
refusal. The last places of the queue are for requests that accept the accuracy of automatic control. A request whose first
token would miss the target at any accuracy is refused at once.
"""

import asyncio

from server.api.admission import Admission, retry_after
from server.errors import QueueFull
from server.policies.route import Route
from server.policies.store import PolicyStore
from server.policies.tiers import Tier

PRESSED_SHARE = 0.9  # of the queue: from here on it is kept for requests that accept less accuracy


def meet_deadline(
    route: Route, deadline: float | None, token_limit: int | None, store: PolicyStore, admission: Admission
) -> Route:
    """The route, or one of the highest accuracy at which the answer would come in time. Does nothing while automatic control
    is off, and for requests in phases.

    A request that does not allow so little accuracy gets the lowest that it allows. `deadline`: the event loop's time by which
    the answer must be complete. `token_limit`: the most tokens that the request asks for.

    Raises QueueFull if the request does not allow any less, naming the accuracy at which the answer would come in time.
    """
    if store.objective is None or deadline is None or route.accuracy is None or route.phases:
        return route
    left = deadline - asyncio.get_running_loop().time()

    def late(price: float) -> float:
        return admission.answer_seconds(price, token_limit) - left

    too_late = late(store.price(route.policy.name))
    if too_late <= 0:
        return route
    in_time = next((each for each in store.accuracies if each < route.accuracy and late(store.price_at(each)) <= 0), None)
    if route.floor is not None and route.floor < route.accuracy:
        return store.moved(route, max(in_time or 0.0, route.floor), "deadline")
    if route.floor is None and in_time is not None:
        message = f"the answer would come too late; at accuracy {in_time:g} or less it would be in time"
        admission.refuse(QueueFull(message, retry_after=retry_after(too_late), accuracy=in_time))
    return route


def under_pressure(route: Route, tier: Tier, priority: int, store: PolicyStore, admission: Admission) -> Route:
    """The route, or one of lower accuracy that the request allows. Does nothing while automatic control is off.

    The pressure is how full the queue is, or the least wait over the target of the first token, if this is more. A tier that
    goes before others keeps its places. A request that lets others go first (`priority` above 0) has no target.

    Raises QueueFull if the request would be late at any accuracy, because it would only make others late, too. Raises it for
    a request that insists, naming the accuracy at which it would be served.
    """
    objective, queue = store.objective, admission.queue
    if objective is None or queue is None:
        return route
    late = 0.0
    if objective.ttft_ms is not None and priority <= 0:
        wait = admission.least_wait_seconds(store.price_at(objective.min_accuracy)) or 0.0
        late = 1000 * wait / objective.ttft_ms
        if late > 1 and tier.priority >= 0:
            message = f"the first token would come after {wait:.1f} s at any accuracy, later than the target of this server"
            admission.refuse(QueueFull(message, retry_after=retry_after(wait - objective.ttft_ms / 1000)))
    if max(queue.share, late) <= PRESSED_SHARE:
        return route
    if route.floor is not None and route.accuracy is not None and route.floor < route.accuracy:
        return store.moved(route, route.floor, "queue")
    level = store.resolve().accuracy
    assert level is not None
    accuracy = route.highest_accuracy
    accepts = route.floor is not None or (accuracy is not None and accuracy <= level)
    if not accepts and tier.priority >= 0 and level < 1:
        message = f"the queue is nearly full; at accuracy {level:g} or less this request would be served now"
        seconds = admission.meter.wait_seconds(queue)
        admission.refuse(QueueFull(message, retry_after=retry_after(seconds), accuracy=level))
    return route
