"""Policies as values: JSON, versions, validation, table rows."""

import hashlib
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ladimo.checkpoint import moe_config_json
from ladimo.model.config import MoeLayerConfig, moe_layers_to_json
from ladimo.model.families import read_model_config
from ladimo.model.rule import RuleNumber
from ladimo.policy import RULE_FIELDS, LayerRule, RoutingPolicy

EXPERTS = 8
LAYER = MoeLayerConfig(EXPERTS, 2, 8)
CONFIG = read_model_config(
    moe_config_json(
        {
            "model_type": "llama",
            "vocab_size": 10,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
        },
        moe_layers_to_json((LAYER, None, LAYER)),
    )
)

rules = st.builds(
    LayerRule,
    top_k=st.integers(1, EXPERTS),
    mass=st.none() | st.floats(0, 10) | st.integers(0, 3),
    floor=st.floats(0, 1) | st.integers(0, 1),
    relative_floor=st.floats(0, 1) | st.integers(0, 1),
    renormalize=st.booleans(),
    experts=st.none() | st.sets(st.integers(0, EXPERTS - 1), min_size=1).map(lambda chosen: tuple(sorted(chosen))),
)
policies = st.builds(
    RoutingPolicy,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    description=st.text(),
    layers=st.lists(st.none() | rules, max_size=5).map(tuple),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)

NO_EXPERT_LISTS: list[Any] = [[], [0, 0], [-1], [True], [1.0], "01", {"0": 1}, 3, [[0]]]


def policy_json(**rule: Any) -> dict[str, Any]:
    """A good policy for CONFIG with the given fields of its first rule replaced."""
    first = {"top_k": 2, "mass": 0.8, "floor": 0.0, "renormalize": True, "experts": [0, 3]}
    return {"name": "balanced", "description": "d", "layers": [{**first, **rule}, None, {"top_k": 1}]}


@given(policy=policies)
def test_json_round_trip(policy: RoutingPolicy) -> None:
    again = RoutingPolicy.from_dict(json.loads(json.dumps(policy.to_dict())))
    assert again == policy
    assert again.version == policy.version


@given(policy=policies)
def test_version_is_the_hash_of_canonical_json(policy: RoutingPolicy) -> None:
    """With non-ASCII text as UTF-8; for ASCII text that is json.dumps as it comes."""
    canonical = json.dumps(policy.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert policy.version == hashlib.sha256(canonical.encode()).hexdigest()[:12]
    if all(" " <= character <= "~" for character in policy.description):
        assert canonical == json.dumps(policy.to_dict(), sort_keys=True, separators=(",", ":"))


@given(first=policies, second=policies)
def test_versions_are_equal_exactly_when_policies_are(first: RoutingPolicy, second: RoutingPolicy) -> None:
    assert (first.version == second.version) == (first == second)


def test_equal_numbers_have_one_spelling() -> None:
    """1 and 1.0, 0.0 and -0.0 are equal, and so must the versions be; defaults left out of the JSON are the defaults."""
    spelled = [policy_json(mass=mass, floor=floor) for mass in (1, 1.0) for floor in (0, 0.0, -0.0)]
    assert len({RoutingPolicy.from_dict(raw).version for raw in spelled}) == 1
    directly = RoutingPolicy.from_dict(spelled[0]).layers[0]
    assert directly is not None
    by_hand = RoutingPolicy("balanced", "d", (LayerRule(2, 1, -0.0, True, (0, 3)), None, LayerRule(1)))
    assert by_hand.version == RoutingPolicy.from_dict(spelled[0]).version
    short = {**policy_json(), "layers": [{"top_k": 2}]}
    long = {**policy_json(), "layers": [{"top_k": 2, "mass": None, "floor": 0.0, "renormalize": True, "experts": None}]}
    assert RoutingPolicy.from_dict(short).version == RoutingPolicy.from_dict(long).version
    assert RoutingPolicy.from_dict(policy_json(experts=[3, 0])) == RoutingPolicy.from_dict(policy_json(experts=[0, 3]))


def test_version_is_stable_across_releases() -> None:
    """Versions are stored and compared between machines. This is sha256sum of the canonical JSON, computed outside Python."""
    assert RoutingPolicy("full", "", (LayerRule(2), None)).version == "519844618ca7"


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        *(({"top_k": value}, "layers[0].top_k") for value in (0, -1, True, 1.0, "2", None, [2], math.nan)),
        *(({"mass": value}, "layers[0].mass") for value in (-0.1, math.nan, math.inf, "1", True, 10**400, [1])),
        *(({"floor": value}, "layers[0].floor") for value in (-0.1, 1.1, math.nan, None, "0", False, 10**400)),
        *(({"relative_floor": value}, "layers[0].relative_floor") for value in (-0.1, 1.1, math.nan, None, "0", True)),
        *(({"renormalize": value}, "layers[0].renormalize") for value in (0, 1, "true", None)),
        *(({"experts": value}, "layers[0].experts") for value in NO_EXPERT_LISTS),
        *(({"batch_experts": value}, "layers[0].batch_experts") for value in (0, -1, True, 1.0, "2", [2])),
        ({"temperature": 1}, "layers[0].temperature"),
    ],
)
def test_wrong_rule_field_is_named(rule: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match="^" + field.replace("[", r"\[").replace("]", r"\]") + ":"):
        RoutingPolicy.from_dict(policy_json(**rule))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        *(({"name": value}, "name") for value in ("", "a" * 65, "../up", "a/b", ".hidden", "a\n", "ä", 3, None, ["a"])),
        *(({"description": value}, "description") for value in (None, 3, "\ud800")),
        *(({"layers": value}, "layers") for value in (None, {"0": None}, "x", 3)),
        ({"layers": [3]}, r"layers\[0\]"),
        ({"layers": [None, [1]]}, r"layers\[1\]"),
        ({"extra": 1}, "extra"),
    ],
)
def test_wrong_policy_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}:"):
        RoutingPolicy.from_dict({**policy_json(), **change})


@pytest.mark.parametrize("missing", ["name", "layers"])
def test_missing_field_is_named(missing: str) -> None:
    raw = policy_json()
    del raw[missing]
    with pytest.raises(ValueError, match=f"^{missing}:"):
        RoutingPolicy.from_dict(raw)


@settings(max_examples=300, deadline=None)
@given(junk=json_values, place=st.sampled_from(["whole", "field", "layers", "rule", "rule_field"]), data=st.data())
def test_junk_gives_a_policy_or_a_value_error(junk: object, place: str, data: st.DataObject) -> None:
    """Never another exception, and what is accepted works to the end: version, rows, JSON."""
    raw: Any = policy_json()
    if place == "whole":
        raw = junk
    elif place == "field":
        raw[data.draw(st.sampled_from(["name", "description", "layers", "other"]))] = junk
    elif place == "layers":
        raw["layers"] = [junk, None]
    elif place == "rule":
        raw["layers"][0] = junk
    else:
        raw["layers"][0][data.draw(st.sampled_from([*RULE_FIELDS, "other"]))] = junk
    try:
        policy = RoutingPolicy.from_dict(raw)
        policy.validate(CONFIG)
    except ValueError:
        return
    assert len(policy.version) == 12
    assert RoutingPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    policy.to_rows(EXPERTS)


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({**policy_json(), "layers": []}, "layers"),
        ({**policy_json(), "layers": [{"top_k": 1}, None]}, "layers"),
        ({**policy_json(), "layers": [{"top_k": 1}, {"top_k": 1}, {"top_k": 1}]}, r"layers\[1\]"),
        ({**policy_json(), "layers": [{"top_k": 1}, None, None]}, r"layers\[2\]"),
        (policy_json(top_k=EXPERTS + 1), r"layers\[0\].top_k"),
        (policy_json(top_k=10**400), r"layers\[0\].top_k"),
        (policy_json(experts=[0, EXPERTS]), r"layers\[0\].experts"),
        (policy_json(batch_experts=EXPERTS + 1), r"layers\[0\].batch_experts"),
    ],
)
def test_validate_names_the_field_that_does_not_fit(raw: dict[str, Any], field: str) -> None:
    policy = RoutingPolicy.from_dict(raw)
    with pytest.raises(ValueError, match=f"^{field}:"):
        policy.validate(CONFIG)


def test_validate_accepts_what_fits() -> None:
    RoutingPolicy.from_dict(policy_json()).validate(CONFIG)
    RoutingPolicy.from_dict(policy_json(top_k=EXPERTS, experts=list(range(EXPERTS)))).validate(CONFIG)


def test_rows() -> None:
    """The numbers that the routing rule reads; the mask is widened to the table's experts."""

    def numbers(**rule: Any) -> dict[str, float]:
        rows, _ = RoutingPolicy.from_dict(policy_json(**rule)).to_rows(4)
        return {number.field: value for number, value in zip(RuleNumber, rows[0], strict=True)}

    rows, allowed = RoutingPolicy.from_dict(policy_json()).to_rows(4)
    whole = [math.inf if number.field in ("bits", "attention_bits", "refine") else 0.0 for number in RuleNumber]
    assert rows[1] == rows[3] == whole  # the dense layer and the output head
    assert allowed == [[True, False, False, True], [False] * 4, [True] * 4]
    unlimited = {"top_k": 2.0, "mass": math.inf, "floor": 0.25, "renormalize": 1.0}
    without = {
        "relative_floor": 0.0,
        "batch_experts": math.inf,
        "bits": math.inf,
        "attention_bits": math.inf,
        "refine": math.inf,
    }
    assert numbers(mass=None, floor=0.25) == {**unlimited, **without}
    given = {
        "mass": 0.8,
        "renormalize": False,
        "batch_experts": 3,
        "relative_floor": 0.5,
        "bits": 4,
        "attention_bits": 8,
        "refine": 1.5,
    }
    assert numbers(**given) == {"top_k": 2.0, "floor": 0.0, **{name: float(value) for name, value in given.items()}}


def test_every_field_of_a_rule_but_its_experts_is_a_number() -> None:
    """A field that no kernel reads, or a number that no policy can say, would be a mistake."""
    assert set(RULE_FIELDS) == {number.field for number in RuleNumber} | {"experts"}


def test_files_written_before_a_field_existed_keep_their_version() -> None:
    """A rule that leaves a later field out, or sets it to its default, has the JSON and the version of that time."""
    first = ("top_k", "mass", "floor", "renormalize", "experts")
    assert tuple(LayerRule(2).to_dict()) == first
    policy = RoutingPolicy.from_dict(policy_json())
    assert policy.version == "5342c21eb652"
    assert RoutingPolicy.from_dict(policy_json(batch_experts=None, relative_floor=0)).version == policy.version
    later = RoutingPolicy.from_dict(policy_json(relative_floor=0.25))
    assert later.version != policy.version
    assert later.to_dict()["layers"][0] == {**policy_json()["layers"][0], "relative_floor": 0.25}
