"""The named policies, the default policy and its history. Finds the policy version that a request runs under.

All that operators set is in one immutable `State`. An admin action takes three steps: it makes the next state, the engine
accepts it, and `commit` stores it, first on disk and then in memory. A running request keeps the `RoutingPolicy` that it began
with, whatever the state is.

The accuracy that automatic control has set (`auto_accuracy`) is not part of the state. It can change every second and is not
stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ladimo.checkpoint import read_json, write_json
from ladimo.model.config import ModelConfig
from ladimo.policy import Frontier, RoutingPolicy
from ladimo.prefill import FormCosts, highest_cost
from server.errors import (
    BadRequest,
    Conflict,
    InvalidPolicy,
    NoCanary,
    NoFrontier,
    NoPreviousDefault,
    PolicyInUse,
    UnknownPolicy,
)
from server.policies.canary import parse_canary
from server.policies.content import read_policy, wrong_field
from server.policies.route import Choice, Route, RoutePhase, in_phases
from server.policies.state import PastDefault, State
from server.policies.targets import AUTO, Ask, AtAccuracy, Automatic, InPhases, Named, Objective, Target, parse_default
from server.policies.tiers import FIXED, Tier, default_tiers

STATE_FILE = "routing.json"
MAX_HISTORY = 32


@dataclass(frozen=True, slots=True)
class Rollback:
    """The state that a rollback leads to, and what happens to the policy that the previous default names.

    `restored`: the old version comes back under its name. `skipped`: the old version does not come back, because the name has
    a newer version by now. The default then means the newer one.
    """

    state: State
    restored: RoutingPolicy | None = None
    skipped: RoutingPolicy | None = None


class PolicyStore:
    """The policies of the checkpoint and of the operator, and the current state.

    `checkpoint`: the policies of the model, by name. `frontier`: the measured points for one batch size; None for a dense
    model. `default`: None takes the default from the directory, or else `full`. `directory`: where the state is stored; None
    keeps it in memory. `batch_budgets`: whether policies with `batch_experts` are accepted. `tiers`: the operator's service
    tiers; None takes `default_tiers`. `form_costs`: those of a frontier for prompts of nested weights.

    Raises ValueError naming the wrong file, policy or tier, and UnknownPolicy or NoFrontier if `default` cannot be served.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Mapping[str, RoutingPolicy],
        frontier: Frontier | None,
        default: Target | None = None,
        directory: Path | None = None,
        batch_budgets: bool = False,
        tiers: Mapping[str, Tier] | None = None,
        form_costs: FormCosts | None = None,
    ) -> None:
        self.config, self.frontier, self._batch_budgets, self.form_costs = config, frontier, batch_budgets, form_costs
        self.checkpoint = MappingProxyType(dict(checkpoint))
        for name, policy in checkpoint.items():
            try:
                self._check_budgets(policy)
            except ValueError as error:
                raise ValueError(f"policy {name!r} of the checkpoint: {error}") from None
        self.auto_accuracy = 1.0  # the accuracy that automatic control has set
        self._file = None if directory is None else directory / STATE_FILE
        for point in () if frontier is None else frontier.points:
            if point.policy not in checkpoint:
                raise ValueError(f"the frontier names the policy {point.policy!r}, which the checkpoint lacks")
        self.state = self._load()
        if default is not None and default != self.state.default:
            self._check_default(self.state, default)
            self.state = self._next(self.state.stored, default)
        if tiers is None:
            tiers = default_tiers("fast" in self.policies(), frontier is not None)
        self.tiers: Mapping[str, Tier] = MappingProxyType({**FIXED, **tiers})
        for name, tier in self.tiers.items():
            try:
                self.resolve(tier.ask)
            except (UnknownPolicy, NoFrontier) as error:
                raise ValueError(f"the service tier {name!r} cannot be served: {error}") from error

    # Reading

    def policies(self, state: State | None = None) -> dict[str, RoutingPolicy]:
        """All policies by name, in the given state or the current one."""
        return {**self.checkpoint, **(state or self.state).stored}

    def get(self, name: str, param: str | None = None, state: State | None = None) -> RoutingPolicy:
        """The policy of this name. Raises UnknownPolicy, with `param` as the wrong field."""
        policy = (state or self.state).stored.get(name) or self.checkpoint.get(name)
        if policy is None:
            raise UnknownPolicy(f"there is no routing policy {name!r}; GET /v1/routing lists them", param=param)
        return policy

    @property
    def most_accurate(self) -> RoutingPolicy:
        """The policy of accuracy 1; `full` without a frontier."""
        return self.get("full") if self.frontier is None else self._at(1.0, "default", "default").policy

    def price(self, name: str) -> float:
        """The cost of the policy of this name: as measured on the frontier, else at most. Unknown names have that of all
        experts."""
        policy = self.policies().get(name)
        if policy is None:
            return 1.0
        if self.frontier is not None and self.checkpoint.get(name) == policy:
            point = self.frontier.find(name)
            if point is not None:
                return point.cost
        return highest_cost(policy, self.config, self.form_costs, self.frontier is not None and self.frontier.is_prefill)

    def price_at(self, accuracy: float) -> float:
        """The cost of the policy that this accuracy chooses; 1 without a frontier."""
        return 1.0 if self.frontier is None else self.frontier.choose(accuracy).cost

    @property
    def accuracies(self) -> list[float]:
        """Those at which the frontier chooses another policy, highest first; empty without a frontier."""
        frontier = self.frontier
        found = [] if frontier is None else [frontier.position(point.policy) for point in frontier.points]
        return sorted((accuracy for accuracy in found if accuracy is not None), reverse=True)

    def position(self, policy: RoutingPolicy) -> float | None:
        """The accuracy at which the frontier chooses this policy version; None if the frontier has no such point."""
        if self.frontier is None or self.checkpoint.get(policy.name) != policy:
            return None
        return self.frontier.position(policy.name)

    def tier(self, name: str) -> Tier:
        """The service tier of this name. Raises BadRequest if the server does not offer it."""
        if name not in self.tiers:
            offered = ", ".join(self.tiers)
            raise BadRequest(f"service_tier: {name!r} is not offered by this server, which has {offered}", param="service_tier")
        return self.tiers[name]

    @property
    def objective(self) -> Objective | None:
        """The targets of automatic control; None while it is off."""
        return self.state.default.objective if isinstance(self.state.default, Automatic) else None

    def resolve(self, ask: Ask | None = None, state: State | None = None, controlled: bool = True) -> Route:
        """Find the policy version that a request runs under. `ask` None: the request did not choose.

        `controlled` False: automatic control does not apply to this request. If the default is automatic, its accuracy is then
        1. Raises UnknownPolicy, NoFrontier.
        """
        state = state or self.state
        if isinstance(state.default, Automatic) and not controlled:
            state = replace(state, default=AtAccuracy(1.0))
        if ask is None:
            return self._default_route(state, None, "default")
        if isinstance(ask.target, InPhases):
            return self._in_phases(ask.target, ask, state)
        if isinstance(ask.target, Automatic):
            return replace(self._default_route(state, ask.min_accuracy, AUTO), reason=AUTO)
        if isinstance(ask.target, Named):
            policy = self.get(ask.target.policy, param=ask.param, state=state)
            route = Route(policy, self.position(policy), ask.source, policy.name)
        else:
            route = self._at(ask.target.accuracy, ask.source, "accuracy")
        # With min_accuracy, a request allows automatic control to lower its accuracy that far.
        if isinstance(state.default, Automatic) and ask.min_accuracy is not None and route.accuracy is not None:
            floor = max(state.default.objective.min_accuracy, ask.min_accuracy)
            own = Choice(route.policy, route.accuracy, route.reason)
            return self.followed(replace(route, floor=floor, follows=True, own=own))
        return route

    def followed(self, route: Route) -> Route:
        """The route at the accuracy of now, in each part that follows automatic control: the accuracy that this has set, at
        least the floor, and at most what the request itself asked for."""
        return route.map(lambda part: self._now(part) if part.follows else part)

    def _now(self, route: Route) -> Route:
        assert route.floor is not None
        allowed, own = max(self.auto_accuracy, route.floor), route.own
        if own is not None and own.accuracy <= allowed:
            return replace(route, policy=own.policy, accuracy=own.accuracy, reason=own.reason)
        return replace(self._at(allowed, AUTO, route.requested), floor=route.floor, follows=True, own=own)

    def resident(self, state: State | None = None) -> list[RoutingPolicy]:
        """The policies that the engine should keep ready: those of the default and of the canary."""
        state = state or self.state
        asks = [None] if state.canary is None else [None, Ask(state.canary.target, "canary", "canary")]
        return [self.resolve(ask, state).policy for ask in asks]

    def canary_route(self, request_id: str, requested: str) -> Route | None:
        """The route of a request that leaves the choice to the server, if the canary takes it. Automatic control may lower it
        as it lowers the default. `requested`: what it asked for, "auto" or "default"."""
        canary = self.state.canary
        if canary is None or not canary.takes(request_id):
            return None
        floor = None if self.objective is None else self.objective.min_accuracy
        return replace(self.resolve(Ask(canary.target, "canary", "canary", floor)), requested=requested)

    def lowered(self, part: Route, accuracy: float, reason: str) -> Route:
        """A route without phases at this accuracy, or at its floor if that is higher; itself if it allows no less."""
        if part.floor is None or part.accuracy is None or part.floor >= part.accuracy:
            return part
        return replace(self._at(max(accuracy, part.floor), reason, part.requested), floor=part.floor)

    # Next states

    def put(self, name: str, raw: Mapping[str, object]) -> State:
        """The next state with this policy stored under `name`. Raises InvalidPolicy naming the first wrong field."""
        try:
            policy = read_policy(name, raw)
            policy.validate(self.config)
            self._check_budgets(policy)
        except ValueError as error:
            raise InvalidPolicy(str(error), param=wrong_field(error)) from error
        return self._next({**self.state.stored, name: policy}, self.state.default)

    def remove(self, name: str) -> State:
        """The next state without this stored policy. A checkpoint policy that it hid becomes visible again.

        Raises UnknownPolicy, PolicyInUse for the default and for a tier's policy, Conflict for a policy of the checkpoint.
        """
        self.get(name)
        if self.state.default == Named(name):
            raise PolicyInUse(f"{name!r} is the default; set another default first")
        if name not in self.state.stored:
            raise Conflict(f"{name!r} belongs to the checkpoint and cannot be removed")
        for tier_name, tier in self.tiers.items():
            if tier.target == Named(name) and name not in self.checkpoint:
                raise PolicyInUse(f"{name!r} serves the service tier {tier_name!r}")
        if self.state.canary is not None and self.state.canary.target == Named(name):
            raise PolicyInUse(f"{name!r} is the canary; promote it or roll it back first")
        return self._next({key: policy for key, policy in self.state.stored.items() if key != name}, self.state.default)

    def set_default(self, raw: object) -> State:
        """The next state with this default, given as JSON. Raises InvalidPolicy, UnknownPolicy, NoFrontier."""
        try:
            target = parse_default(raw)
        except ValueError as error:
            raise InvalidPolicy(str(error), param=wrong_field(error)) from error
        self._check_default(self.state, target)
        return self._next(self.state.stored, target)

    def set_canary(self, raw: object) -> State:
        """The next state with this canary, given as JSON. Raises InvalidPolicy, UnknownPolicy, NoFrontier."""
        try:
            canary = parse_canary(raw)
        except ValueError as error:
            raise InvalidPolicy(str(error), param=wrong_field(error)) from error
        self._check_default(self.state, canary.target)
        return replace(self.state, canary=canary)

    def promote_canary(self) -> State:
        """The next state in which the canary is the default. Raises NoCanary."""
        if self.state.canary is None:
            raise NoCanary("there is no canary")
        return replace(self._next(self.state.stored, self.state.canary.target), canary=None)

    def end_canary(self) -> State:
        """The next state without the canary. Raises NoCanary."""
        if self.state.canary is None:
            raise NoCanary("there is no canary")
        return replace(self.state, canary=None)

    def roll_back(self, restore_policy: bool = False) -> Rollback:
        """Go back to the previous default. Raises NoPreviousDefault.

        The previous default may name a policy. Its old version comes back if the policy was removed, or if it was replaced
        while it was the default. If it was replaced later, under another default, the newer version stays. `restore_policy`
        brings the old version back in this case, too.
        """
        if not self.state.history:
            raise NoPreviousDefault("the default has not been changed; there is nothing to roll back to")
        *history, previous = self.state.history
        stored, then = dict(self.state.stored), previous.policy
        now = None if then is None else self.policies().get(then.name)
        back = replace(self.state, default=previous.target, history=tuple(history))
        if then is None or now == then:
            return Rollback(back)
        if now is not None and self.state.default != previous.target and not restore_policy:
            return Rollback(back, skipped=then)
        if self.checkpoint.get(then.name) == then:
            del stored[then.name]
        else:
            stored[then.name] = then
        return Rollback(replace(back, stored=stored), restored=then)

    def commit(self, state: State) -> None:
        """Make this state the current one. It goes to disk first, so an answered change survives a crash. Raises OSError."""
        if self._file is not None:
            write_json(self._file, state.to_dict())
        self.state = state

    # Parts

    def _in_phases(self, asked: InPhases, ask: Ask, state: State) -> Route:
        phases = []
        for place, each in enumerate(asked.phases):
            asked_here = Ask(each.target, ask.source, f"{ask.param}.phases[{place}].policy", each.min_accuracy)
            phases.append(RoutePhase(self.resolve(asked_here, state), each.until))
        return in_phases(phases)

    def _default_route(self, state: State, min_accuracy: float | None, requested: str) -> Route:
        match state.default:
            case Named(name):
                policy = self.get(name, state=state)
                route = Route(policy, self.position(policy), "default", requested)
            case AtAccuracy(accuracy):
                route = self._at(accuracy, "default", requested)
            case Automatic(objective):
                floor = max(objective.min_accuracy, min_accuracy or 0.0)
                route = replace(self._at(max(self.auto_accuracy, floor), AUTO, requested), floor=floor, follows=True)
        if min_accuracy is not None and route.accuracy is not None and route.accuracy < min_accuracy:
            return replace(self._at(min_accuracy, route.reason, requested), floor=route.floor)
        return route

    def _at(self, accuracy: float, reason: str, requested: str) -> Route:
        if self.frontier is None:
            raise NoFrontier("this checkpoint has no measured frontier, so accuracy cannot be chosen; name a policy")
        # The frontier was measured with the checkpoint's versions. They are served even if stored policies hide them.
        return Route(self.checkpoint[self.frontier.choose(accuracy).policy], accuracy, reason, requested)

    def _check_default(self, state: State, target: Target) -> None:
        match target:
            case Named(name):
                self.get(name, param="policy", state=state)
            case AtAccuracy(accuracy):
                self._at(accuracy, "default", "default")
            case Automatic():
                self._at(1.0, AUTO, AUTO)

    def _next(self, stored: Mapping[str, RoutingPolicy], default: Target) -> State:
        state = replace(self.state, stored=stored, default=default)
        before, after = self._past(self.state), self._past(state)
        return state if before == after else replace(state, history=(*state.history, before)[-MAX_HISTORY:])

    def _past(self, state: State) -> PastDefault:
        named = self.get(state.default.policy, state=state) if isinstance(state.default, Named) else None
        return PastDefault(state.default, named)

    def read(self, raw: Any) -> State:
        """The state that `State.to_dict` has written. Raises ValueError if this model cannot serve it."""
        try:
            stored = {name: self._policy(policy) for name, policy in raw["policies"].items()}
            history = tuple(
                PastDefault(parse_default(past["default"]), None if past["policy"] is None else self._policy(past["policy"]))
                for past in raw["history"]
            )
            canary = None if raw.get("canary") is None else parse_canary(raw["canary"])
            state = State(stored, parse_default(raw["default"]), history, canary)
            for target in [state.default] if canary is None else [state.default, canary.target]:
                self._check_default(state, target)
        except (ValueError, KeyError, TypeError, AttributeError, UnknownPolicy, NoFrontier) as error:
            raise ValueError(f"does not fit this model ({error})") from error
        return state

    def _load(self) -> State:
        if self._file is None or not self._file.exists():
            return State({}, Named("full"))
        raw = read_json(self._file)
        try:
            return self.read(raw)
        except ValueError as error:
            raise ValueError(f"{self._file}: {error}") from error

    def _policy(self, raw: object) -> RoutingPolicy:
        policy = RoutingPolicy.from_dict(raw)
        policy.validate(self.config)
        self._check_budgets(policy)
        return policy

    def _check_budgets(self, policy: RoutingPolicy) -> None:
        for index, rule in enumerate(() if self._batch_budgets else policy.layers):
            if rule is not None and rule.batch_experts is not None:
                raise ValueError(f"layers[{index}].batch_experts: needs a server started with --batch-budgets")
