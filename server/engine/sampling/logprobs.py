"""Log-probabilities of given tokens. Legend: N positions, V vocabulary."""

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from server.engine.request import TokenLogprobs


def token_logprobs(logits: Tensor, token_ids: Rows[int], num_top: int) -> list[TokenLogprobs]:
    """For each position: the log-probability of its token in `token_ids` [N], and the `num_top` most likely tokens.

    Logits are [N, V]. A token that is also among the most likely ones has exactly the same value in both places.
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
