"""The named policies, the default and its history; how a request's choice becomes one policy version.

What operators set is one immutable `State`. An admin action makes the next state, has the engine accept it, and then commits
it: to disk whole, then to memory. Requests hold the `RoutingPolicy` they resolved to and see nothing of it.

Where automatic control has put the knob is not part of the state. It changes every second and is not kept: `auto_accuracy`.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from ladimo.checkpoint import read_json, write_json
from ladimo.model.config import ModelConfig
from ladimo.policy import Frontier, RoutingPolicy
from server.errors import BadRequest, Conflict, InvalidPolicy, NoFrontier, NoPreviousDefault, PolicyInUse, UnknownPolicy
from server.policies.targets import AUTO, Ask, AtAccuracy, Automatic, Named, Objective, Target, parse_default
from server.policies.tiers import FIXED, Tier, default_tiers

STATE_FILE = "routing.json"
MAX_HISTORY = 32
MAX_DESCRIPTION = 1000  # characters
CONTROLS = {"Cc", "Zl", "Zp"}  # Unicode categories: control characters and line separators
# What GET tells of a policy besides its content. A PUT may hold them, so that what was read can be sent again.
READ_ONLY = frozenset({"version", "source", "accuracy", "figures"})


@dataclass(frozen=True, slots=True)
class Route:
    """One request's routing: the policy version it keeps, where the knob stands, and why."""

    policy: RoutingPolicy
    accuracy: float | None
    reason: str
    requested: str  # a policy's name, "accuracy", "auto" or "default"


@dataclass(frozen=True, slots=True)
class PastDefault:
    """A default and, where it names a policy, the version that name had."""

    target: Target
    policy: RoutingPolicy | None


@dataclass(frozen=True, slots=True)
class State:
    """`stored`: policies put by admins, which hide checkpoint policies of the same name. `history`: oldest first."""

    stored: Mapping[str, RoutingPolicy]
    default: Target
    history: tuple[PastDefault, ...] = ()


@dataclass(frozen=True, slots=True)
class Rollback:
    """The state before the default's last change, and what becomes of the policy that the default named then.

    `restored`: the version that comes back under its name. `skipped`: the version that does not, because its name has got a
    newer one since; the default then means the newer one.
    """

    state: State
    restored: RoutingPolicy | None = None
    skipped: RoutingPolicy | None = None


class PolicyStore:
    """`frontier`: the points the knob walks, all of one batch size; None for a dense model. `batch_budgets`: whether the engine
    can run policies with `batch_experts`; if not, they are refused. `tiers`: the operator's service tiers; None:
    `default_tiers`.

    `default` None takes the persisted default, or `full`. Raises ValueError naming the file or policy that is wrong.
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
    ) -> None:
        self.config, self.frontier, self._batch_budgets = config, frontier, batch_budgets
        self.checkpoint = MappingProxyType(dict(checkpoint))
        for name, policy in checkpoint.items():
            try:
                self._check_budgets(policy)
            except ValueError as error:
                raise ValueError(f"policy {name!r} of the checkpoint: {error}") from None
        self.auto_accuracy = 1.0  # where automatic control has the knob
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
        return {**self.checkpoint, **(state or self.state).stored}

    def get(self, name: str, param: str | None = None, state: State | None = None) -> RoutingPolicy:
        """Raises UnknownPolicy."""
        policy = (state or self.state).stored.get(name) or self.checkpoint.get(name)
        if policy is None:
            raise UnknownPolicy(f"there is no routing policy {name!r}; GET /v1/routing lists them", param=param)
        return policy

    def position(self, policy: RoutingPolicy) -> float | None:
        """Where the knob stands when it serves this version; None when it was not measured."""
        if self.frontier is None or self.checkpoint.get(policy.name) != policy:
            return None
        return self.frontier.position(policy.name)

    def tier(self, name: str) -> Tier:
        """Raises BadRequest for a tier that is not offered."""
        if name not in self.tiers:
            offered = ", ".join(self.tiers)
            raise BadRequest(f"service_tier: {name!r} is not offered by this server, which has {offered}", param="service_tier")
        return self.tiers[name]

    @property
    def objective(self) -> Objective | None:
        """What automatic control is to hold; None while it is off."""
        return self.state.default.objective if isinstance(self.state.default, Automatic) else None

    def resolve(self, ask: Ask | None = None, state: State | None = None, controlled: bool = True) -> Route:
        """The policy version a request runs under. `controlled` False: automatic control does not move it; where it would set
        the knob, the knob stands at 1. Raises UnknownPolicy, NoFrontier."""
        state = state or self.state
        if isinstance(state.default, Automatic) and not controlled:
            state = replace(state, default=AtAccuracy(1.0))
        if ask is None:
            return self._default_route(state, None, "default")
        if isinstance(ask.target, Automatic):
            return replace(self._default_route(state, ask.min_accuracy, AUTO), reason=AUTO)
        if isinstance(ask.target, Named):
            policy = self.get(ask.target.policy, param=ask.param, state=state)
            route = Route(policy, self.position(policy), ask.source, policy.name)
        else:
            route = self._at(ask.target.accuracy, ask.source, "accuracy")
        # A request that names a floor lets automatic control lower it that far.
        if isinstance(state.default, Automatic) and ask.min_accuracy is not None and route.accuracy is not None:
            allowed = max(self._level(state.default.objective), ask.min_accuracy)
            if route.accuracy > allowed:
                return self._at(allowed, AUTO, route.requested)
        return route

    # Next states

    def put(self, name: str, raw: Mapping[str, object]) -> State:
        """Store a policy under `name`. Raises InvalidPolicy naming the first wrong field."""
        try:
            given = {key: value for key, value in raw.items() if key not in READ_ONLY and value is not None}
            policy = RoutingPolicy.from_dict({"name": name, **given})
            if policy.name != name:
                raise ValueError(f"name: is {policy.name!r}, the path says {name!r}")
            if name == AUTO:
                raise ValueError(f"name: {AUTO!r} means automatic control and cannot name a policy")
            _check_description(policy.description)
            policy.validate(self.config)
            self._check_budgets(policy)
        except ValueError as error:
            raise InvalidPolicy(str(error), param=_field(error)) from error
        return self._next({**self.state.stored, name: policy}, self.state.default)

    def remove(self, name: str) -> State:
        """Forget a stored policy; a checkpoint policy that it hid is visible again.

        Raises UnknownPolicy, PolicyInUse, and Conflict for a checkpoint's own policy.
        """
        self.get(name)
        if self.state.default == Named(name):
            raise PolicyInUse(f"{name!r} is the default; set another default first")
        if name not in self.state.stored:
            raise Conflict(f"{name!r} belongs to the checkpoint and cannot be removed")
        for tier_name, tier in self.tiers.items():
            if tier.target == Named(name) and name not in self.checkpoint:
                raise PolicyInUse(f"{name!r} serves the service tier {tier_name!r}")
        return self._next({key: policy for key, policy in self.state.stored.items() if key != name}, self.state.default)

    def set_default(self, raw: object) -> State:
        """Raises InvalidPolicy, UnknownPolicy, NoFrontier."""
        try:
            target = parse_default(raw)
        except ValueError as error:
            raise InvalidPolicy(str(error), param=_field(error)) from error
        self._check_default(self.state, target)
        return self._next(self.state.stored, target)

    def roll_back(self, restore_policy: bool = False) -> Rollback:
        """Back to the previous default. Raises NoPreviousDefault.

        The policy version that it named comes back where it was replaced as the default, or removed. A version that was put
        after the default had moved on stays, unless `restore_policy` says otherwise.
        """
        if not self.state.history:
            raise NoPreviousDefault("the default has not been changed; there is nothing to roll back to")
        *history, previous = self.state.history
        stored, then = dict(self.state.stored), previous.policy
        now = None if then is None else self.policies().get(then.name)
        if then is None or now == then:
            return Rollback(State(stored, previous.target, tuple(history)))
        if now is not None and self.state.default != previous.target and not restore_policy:
            return Rollback(State(stored, previous.target, tuple(history)), skipped=then)
        if self.checkpoint.get(then.name) == then:
            del stored[then.name]
        else:
            stored[then.name] = then
        return Rollback(State(stored, previous.target, tuple(history)), restored=then)

    def commit(self, state: State) -> None:
        """Make a state the current one; on disk first, so that what was answered survives a crash."""
        if self._file is not None:
            write_json(self._file, _to_dict(state))
        self.state = state

    # Parts

    def _default_route(self, state: State, min_accuracy: float | None, requested: str) -> Route:
        match state.default:
            case Named(name):
                policy = self.get(name, state=state)
                route = Route(policy, self.position(policy), "default", requested)
            case AtAccuracy(accuracy):
                route = self._at(accuracy, "default", requested)
            case Automatic(objective):
                route = self._at(self._level(objective), AUTO, requested)
        if min_accuracy is not None and route.accuracy is not None and route.accuracy < min_accuracy:
            return self._at(min_accuracy, route.reason, requested)
        return route

    def _at(self, accuracy: float, reason: str, requested: str) -> Route:
        if self.frontier is None:
            raise NoFrontier("this checkpoint has no measured frontier, so accuracy cannot be chosen; name a policy")
        # The frontier was measured with the checkpoint's versions, so the knob serves those whatever hides them.
        return Route(self.checkpoint[self.frontier.choose(accuracy).policy], accuracy, reason, requested)

    def _level(self, objective: Objective) -> float:
        return max(self.auto_accuracy, objective.min_accuracy)

    def _check_default(self, state: State, target: Target) -> None:
        match target:
            case Named(name):
                self.get(name, param="policy", state=state)
            case AtAccuracy(accuracy):
                self._at(accuracy, "default", "default")
            case Automatic():
                self._at(1.0, AUTO, AUTO)

    def _next(self, stored: Mapping[str, RoutingPolicy], default: Target) -> State:
        state = State(stored, default, self.state.history)
        before, after = self._past(self.state), self._past(state)
        return state if before == after else replace(state, history=(*state.history, before)[-MAX_HISTORY:])

    def _past(self, state: State) -> PastDefault:
        named = self.get(state.default.policy, state=state) if isinstance(state.default, Named) else None
        return PastDefault(state.default, named)

    def _load(self) -> State:
        if self._file is None or not self._file.exists():
            return State({}, Named("full"))
        raw = read_json(self._file)
        try:
            stored = {name: self._policy(policy) for name, policy in raw["policies"].items()}
            history = tuple(
                PastDefault(parse_default(past["default"]), None if past["policy"] is None else self._policy(past["policy"]))
                for past in raw["history"]
            )
            state = State(stored, parse_default(raw["default"]), history)
            self._check_default(state, state.default)
        except (ValueError, KeyError, TypeError, AttributeError, UnknownPolicy, NoFrontier) as error:
            raise ValueError(f"{self._file}: does not fit this model ({error})") from error
        return state

    def _policy(self, raw: object) -> RoutingPolicy:
        policy = RoutingPolicy.from_dict(raw)
        policy.validate(self.config)
        self._check_budgets(policy)
        return policy

    def _check_budgets(self, policy: RoutingPolicy) -> None:
        for index, rule in enumerate(() if self._batch_budgets else policy.layers):
            if rule is not None and rule.batch_experts is not None:
                raise ValueError(f"layers[{index}].batch_experts: needs a server started with --batch-budgets")


def _check_description(text: str) -> None:
    if len(text) > MAX_DESCRIPTION:
        raise ValueError(f"description: has {len(text)} characters, at most {MAX_DESCRIPTION} are allowed")
    if any(unicodedata.category(character) in CONTROLS for character in text):
        raise ValueError("description: must not have control characters or line breaks")


def _to_dict(state: State) -> dict[str, object]:
    return {
        "default": state.default.to_dict(),
        "policies": {name: policy.to_dict() for name, policy in state.stored.items()},
        "history": [
            {"default": past.target.to_dict(), "policy": None if past.policy is None else past.policy.to_dict()}
            for past in state.history
        ],
    }


def _field(error: ValueError) -> str:
    return str(error).partition(": ")[0]
