"""Names of rules and policies, for people."""

from collections.abc import Sequence

from ladimo.convert.evaluation.variants import Rules, policy_of
from ladimo.model.config import ModelConfig
from ladimo.policy import LayerRule


def rule_name(rule: LayerRule | None, nested: bool = False) -> str:
    """TOP2, DYN(0.8), 5 fixed (a static mask), or dense. Other limits are added, as in "TOP4 relative_floor 0.3". For layers
    with nested weights, how many bits are read: "8 bits", "FFN 4 bits refined by token, attention 8 bits"."""
    if rule is None:
        return "dense"
    if nested:
        ffn, attention = _precision(rule.bits, rule.refine), _precision(rule.attention_bits)
        return ffn if ffn == attention else f"FFN {ffn}, attention {attention}"
    if not rule.limits and rule.experts is not None and rule.top_k >= len(rule.experts):
        return f"{len(rule.experts)} fixed"
    name = f"TOP{rule.top_k}" if rule.mass is None else f"DYN({rule.mass:g})"
    return name + "".join(f" {limit} {value:g}" for limit, value in rule.limits.items() if limit != "mass")


def describe_rules(rules: Rules, config: ModelConfig) -> str:
    """A description such as "TOP2 in 3 layers, DYN(0.8) in 2 layers". For a nested model, what each part of it reads: "FFN: 8
    bits in 3 layers, 4 bits in 1 layer; attention: 8 bits in 4 layers; output head: 4 bits refined by token"."""
    policy = policy_of("rules", "", rules, config)
    layers = [rule for rule in policy.layers if rule is not None]
    if not config.nested_bits:
        return _counted([rule_name(rule) for rule in layers])
    ffns = [_precision(rule.bits, rule.refine) for rule in layers]
    attentions = [_precision(rule.attention_bits) for rule in layers]
    head = _precision(policy.head_bits, policy.head_refine)
    if {*ffns, *attentions} == {head}:
        return f"{head} everywhere"
    return f"FFN: {_counted(ffns)}; attention: {_counted(attentions)}; output head: {head}"


def _precision(bits: int | None, refine: float | None = None) -> str:
    return f"{bits or 'all'} bits" + ("" if refine is None else " refined by token")


def _counted(names: Sequence[str]) -> str:
    counts = {name: names.count(name) for name in names}
    return ", ".join(f"{name} in {count} layer{'s' * (count > 1)}" for name, count in counts.items())
