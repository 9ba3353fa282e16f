"""Latencies and token counts of one engine step."""

from collections import Counter

from server.engine.request import Sequence


class Tally:
    """Latencies in seconds and token counts of one step, by policy name."""

    def __init__(self) -> None:
        self.first_token_seconds: list[tuple[str, float]] = []
        self.inter_token_seconds: list[tuple[str, float]] = []
        self.prompt_tokens: Counter[str] = Counter()
        self.generation_tokens: Counter[str] = Counter()

    def token(self, sequence: Sequence, now: float) -> None:
        """The sequence has a new token. `now`: seconds of the engine's clock."""
        request = sequence.request
        policy = request.policies[sequence.phase(sequence.num_computed - 1)].name  # that of the pass that drew the token
        if sequence.last_token is None:
            sequence.first_token = now
            self.first_token_seconds.append((policy, now - sequence.arrived))
            self.prompt_tokens[request.policy.name] += len(request.prompt_ids)
        else:
            self.inter_token_seconds.append((policy, now - sequence.last_token))
        sequence.last_token = now
        self.generation_tokens[policy] += 1
