"""Routing policies and the accuracy/cost frontier, as plain values: how they are read, checked, written and hashed.

A policy has a `LayerRule` for each expert layer and None for each dense layer. `to_rows` turns a policy into the numbers that
kernels read. So kernels never need to know which policy they run.
"""

from ladimo.policy.frontier import PREFILL, Frontier, FrontierPoint, pareto, token_costs
from ladimo.policy.layer_rule import RULE_FIELDS, LayerRule
from ladimo.policy.routing_policy import NAME_PATTERN, RoutingPolicy, unmeasured_policies

__all__ = [
    "NAME_PATTERN",
    "PREFILL",
    "RULE_FIELDS",
    "Frontier",
    "FrontierPoint",
    "LayerRule",
    "RoutingPolicy",
    "pareto",
    "token_costs",
    "unmeasured_policies",
]
