"""How many bytes of weights a step of a nested model reads.

Rows of a step share what they read: each plane of a matrix is read once, whatever the number of rows that want it. So the bytes
follow from the set of policies in the step.
"""

from collections.abc import Collection

from ladimo.model.config import ModelConfig
from ladimo.model.precision import GROUP, KEY_VALUE_BITS, NESTED_BITS, SCALE_BYTES, WHOLE_BYTES, bytes_per_weight
from ladimo.policy import RoutingPolicy

MAX_SETS = 1024  # of policies, whose bytes are remembered


class WeightBytes:
    """Counts for one model. The output head counts once per step, as every other matrix."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._known: dict[frozenset[str], float] = {}

    def of_step(self, policies: Collection[RoutingPolicy], refined_rows: int) -> float:
        """The bytes that a step under these policies reads, when its tokens refine so many rows of weights in all. A row that
        several tokens refine counts for each, so this is an upper limit. 0 for a model of one precision."""
        if not self._config.nested_bits:
            return 0.0
        versions = frozenset(policy.version for policy in policies)
        if versions not in self._known:
            if len(self._known) == MAX_SETS:
                self._known.clear()
            self._known[versions] = self._planes(policies)
        return self._known[versions] + refined_rows * self._config.hidden_size * bytes_per_weight(NESTED_BITS[0])

    def _planes(self, policies: Collection[RoutingPolicy]) -> float:
        config, read = self._config, self._config.bits_read
        queries = config.attention_parameters - config.key_value_parameters
        total = config.head_parameters * union_bytes({read(policy.head_bits) for policy in policies})
        for layer in range(config.num_hidden_layers):
            rules = [policy.layers[layer] for policy in policies]
            attention = {read(None if rule is None else rule.attention_bits) for rule in rules}
            careful = {None if bits is None else max(bits, KEY_VALUE_BITS) for bits in attention}
            total += queries * union_bytes(attention) + config.key_value_parameters * union_bytes(careful)
            total += config.ffn_parameters * union_bytes({read(None if rule is None else rule.bits) for rule in rules})
        return total


def union_bytes(wanted: Collection[int | None]) -> float:
    """Bytes per weight of a matrix whose readers want so many bits; None stands for all of them."""
    whole = WHOLE_BYTES if None in wanted else 0.0
    most = max((bits for bits in wanted if bits is not None), default=0)
    return whole + (most / 8 + SCALE_BYTES / GROUP if most else 0.0)
