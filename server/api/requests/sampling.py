"""Translates request fields into sampling parameters, and makes the checks that need the model's sizes."""

from collections.abc import Iterable, Sequence

from server.api.fields.completions import SEEDS, GenerationFields
from server.engine.request import SamplingParams
from server.errors import BadRequest, ContextLengthExceeded

# Division by a smaller temperature can overflow fp32 logits. The result would be greedy anyway.
SMALLEST_TEMPERATURE = 1e-4


def make_sampling(fields: GenerationFields, max_tokens: int, prompt_logprobs: int | None, vocab_size: int) -> SamplingParams:
    """The sampling parameters. Raises BadRequest with the name of the field that does not fit the model."""
    check_ids(fields.stop_token_ids, vocab_size, "stop_token_ids")
    biases = tuple((int(token), bias) for token, bias in fields.logit_bias.items())
    check_ids((token for token, _ in biases), vocab_size, "logit_bias")
    if fields.min_tokens > max_tokens:
        raise BadRequest(
            f"min_tokens: {fields.min_tokens} is more than the {max_tokens} tokens there may be", param="min_tokens"
        )
    greedy = fields.temperature < SMALLEST_TEMPERATURE or fields.top_p == 0 or fields.top_k == 1
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if greedy else fields.temperature,
        top_p=fields.top_p,
        top_k=max(fields.top_k, 0),
        min_p=fields.min_p,
        seed=None if fields.seed is None else fields.seed % SEEDS,
        ignore_eos=fields.ignore_eos,
        stop_token_ids=frozenset(fields.stop_token_ids),
        min_tokens=fields.min_tokens,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=biases,
        logprobs=fields.num_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def choice_seed(seed: int | None, choice: int) -> int | None:
    """The seed of choice number `choice` of a prompt. The first choice has the request's seed, whatever `n` is."""
    return None if seed is None else (seed + choice) % SEEDS


def check_length(prompt: Sequence[int], max_tokens: int | None, max_model_len: int, param: str) -> int:
    """The number of tokens left for the answer. `max_tokens`: from the request. Raises BadRequest, ContextLengthExceeded."""
    room = max_model_len - len(prompt)
    if not prompt:
        raise BadRequest(f"{param}: must not be empty", param=param)
    if room < 1:
        raise too_long(f"{len(prompt)} tokens", max_model_len, param)
    if max_tokens is not None and max_tokens > room:
        asked = f"{max_tokens + len(prompt)} tokens ({len(prompt)} of the prompt, {max_tokens} of max_tokens)"
        raise too_long(asked, max_model_len, "max_tokens")
    return room


def too_long(what: str, max_model_len: int, param: str) -> ContextLengthExceeded:
    """The error for a prompt that is too long. Client libraries recognise it by OpenAI's words in the first sentence."""
    limit = f"This model's maximum context length is {max_model_len} tokens, one of them for the answer."
    return ContextLengthExceeded(f"{limit} However, {param} asked for {what}.", param=param)


def check_ids(token_ids: Iterable[int], vocab_size: int, param: str) -> None:
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise BadRequest(f"{param}: token id {largest} is not below the vocabulary's size {vocab_size}", param=param)
