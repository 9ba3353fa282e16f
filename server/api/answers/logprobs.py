"""Log-probabilities in the forms of the two completion endpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.engine.request import TokenLogprobs
from server.text.tokenizer import Tokenizer

# OpenAI sends this for a probability of zero, because JSON has no infinity.
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of an answer or of an echoed prompt. `offset`: the number of characters before the character that it begins or
    continues. `logprobs`: None for the first token of a prompt, which is not predicted."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None


def text_logprobs(tokens: Sequence[ScoredToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """The completions endpoint's `logprobs`: parallel arrays. Each entry of `top_logprobs` contains the token itself, too."""
    return {
        "tokens": [tokenizer.token_text(token.token_id) for token in tokens],
        "token_logprobs": [None if token.logprobs is None else _floor(token.logprobs.logprob) for token in tokens],
        "top_logprobs": [None if token.logprobs is None else _top_map(token.logprobs, tokenizer) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokens: Sequence[ScoredToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat endpoint's `logprobs`: one object per generated token."""
    return {"content": [_content(token.logprobs, tokenizer) for token in tokens if token.logprobs is not None], "refusal": None}


def _top_map(logprobs: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float]:
    """Log-probabilities by token text. Of several tokens with the same text, the most likely one counts."""
    best: dict[str, float] = {}
    for token_id, value in [*logprobs.top, (logprobs.token_id, logprobs.logprob)]:
        text = tokenizer.token_text(token_id)
        best[text] = max(best.get(text, LEAST_LOGPROB), value)
    return best


def _content(logprobs: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    top = [_token(token_id, value, tokenizer) for token_id, value in logprobs.top]
    return _token(logprobs.token_id, logprobs.logprob, tokenizer) | {"top_logprobs": top}


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    piece = tokenizer.token_bytes(token_id)
    return {"token": tokenizer.token_text(token_id), "logprob": _floor(logprob), "bytes": list(piece)}


def _floor(value: float) -> float:
    return max(value, LEAST_LOGPROB)
