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
    is off.

    A request that does not allow so little accuracy gets the lowest that it allows. How long each phase of a request will be is
    not known, so each is treated as if the whole answer ran in it. `deadline`: the event loop's time by which the answer must
    be complete. `token_limit`: the most tokens that the request asks for.

    Raises QueueFull if all phases would be late and none allows any less, naming the accuracy at which the answer would come in
    time.
    """
    if store.objective is None or deadline is None:
        return route
    left = deadline - asyncio.get_running_loop().time()

    def late(price: float) -> float:
        return admission.answer_seconds(price, token_limit) - left

    def in_time(accuracy: float) -> float | None:
        """The highest accuracy below this one at which the answer would come in time."""
        return next((each for each in store.accuracies if each < accuracy and late(store.price_at(each)) <= 0), None)

    def lowered(part: Route) -> Route:
        if part.accuracy is None or late(store.price(part.policy.name)) <= 0:
            return part
        return store.lowered(part, in_time(part.accuracy) or 0.0, "deadline")

    fixed = [part.accuracy for part in route.parts if part.floor is None and part.accuracy is not None]
    if len(fixed) == len(route.parts):
        too_late, accuracy = min(late(store.price(policy.name)) for policy in route.policies), in_time(min(fixed))
        if too_late > 0 and accuracy is not None:
            message = f"the answer would come too late; at accuracy {accuracy:g} or less it would be in time"
            admission.refuse(QueueFull(message, retry_after=retry_after(too_late), accuracy=accuracy))
    return route.map(lowered)


def under_pressure(route: Route, tier: Tier, priority: int, store: PolicyStore, admission: Admission) -> Route:
    """The route, or one of lower accuracy that the request allows. Does nothing while automatic control is off.

    The pressure is how full the queue is, or the least wait over the target of the first token, if this is more. A tier that
    goes before others keeps its places. A request that lets others go first (`priority` above 0) has no target.

    Raises QueueFull if the request would be late at any accuracy, because it would only make others late, too. Raises it for
    a request that insists, be it in one phase, naming the accuracy at which it would be served.
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
    level = store.resolve().accuracy
    assert level is not None
    insists = any(part.floor is None and (part.accuracy is None or part.accuracy > level) for part in route.parts)
    if insists and tier.priority >= 0 and level < 1:
        message = f"the queue is nearly full; at accuracy {level:g} or less this request would be served now"
        seconds = admission.meter.wait_seconds(queue)
        admission.refuse(QueueFull(message, retry_after=retry_after(seconds), accuracy=level))
    return route.map(lambda part: store.lowered(part, 0.0, "queue"))
