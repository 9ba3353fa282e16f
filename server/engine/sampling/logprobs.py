"""Log-probabilities of tokens that are known, from the logits of their places. Legend: N places, V vocabulary."""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from server.engine.request import TokenLogprobs


def token_logprobs(logits: Tensor, token_ids: Rows[int], num_top: int) -> list[TokenLogprobs]:
    """For each of the places [N, V] its token's log-probability and the `num_top` best.

    A token that is among the best has the same float in both, since both are read from the same numbers.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    ids = torch.tensor(token_ids, dtype=torch.int64, device=logits.device).unsqueeze(-1)
    chosen = logprobs.gather(-1, ids).squeeze(-1).tolist()
    values, places = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    best = zip(places.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, tuple(zip(top_ids, top_values, strict=True)))
        for token, logprob, (top_ids, top_values) in zip(token_ids, chosen, best, strict=True)
    ]
