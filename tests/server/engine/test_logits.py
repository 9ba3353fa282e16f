"""Penalties, bias, grammars and log-probabilities: rule by rule against the definition, and through the real engine."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from ladimo.checkpoint import read_config, read_policies
from server.engine.request import GenerationRequest, SamplingParams, Sequence
from server.engine.sampling.logit_adjuster import LogitAdjuster, adjusts
from tests.server.engine.graphs import random_prompts
from tests.server.engine.test_generation import CONFIG, events, ids, request, running
from tests.server.fakes import fake_policy

VOCAB = 20
EOS = frozenset({19})


def sequence(prompt: list[int], output: list[int], **params: Any) -> Sequence:
    asked = GenerationRequest("r", tuple(prompt), SamplingParams(**{"max_tokens": 50, **params}), fake_policy("p"))
    made = Sequence(request=asked, rows=(1,), seed=0, arrived=time.monotonic(), expert_counts=[])
    made.output_ids = output
    return made


def adjusted(logits: torch.Tensor, *sequences: Sequence) -> torch.Tensor:
    out = logits.clone()
    LogitAdjuster(EOS, torch.device("cpu")).adjust(out, sequences)
    return out


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 3


def test_who_asks_for_nothing_is_not_adjusted(logits: torch.Tensor) -> None:
    assert not adjusts(sequence([1], [2]))
    assert torch.equal(adjusted(logits, sequence([1], [2])), logits)
    for params in ({"presence_penalty": 1.0}, {"logit_bias": ((1, 1.0),)}, {"min_tokens": 2}, {"constraint": Alternating()}):
        assert adjusts(sequence([1], [2], **params))
    assert not adjusts(sequence([1], [2, 2], min_tokens=2))


def test_penalties_as_defined(logits: torch.Tensor) -> None:
    prompt, output = [1, 2, 2], [3, 4, 4, 4]
    params = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.2}
    out = adjusted(logits, sequence(prompt, output, **params))[0]
    for token in range(VOCAB):
        expected = float(logits[0, token])
        if token in prompt + output:
            expected = expected / 1.3 if expected > 0 else expected * 1.3
        expected -= 0.2 * output.count(token) + 0.7 * (token in output)
        assert float(out[token]) == pytest.approx(expected, abs=1e-5)


def test_counts_follow_the_draws(logits: torch.Tensor) -> None:
    adjuster = LogitAdjuster(EOS, torch.device("cpu"))
    followed = sequence([1, 5], [], frequency_penalty=0.5)
    for token in (4, 5, 4, 1):
        adjuster.adjust(logits.clone(), [followed])
        followed.output_ids.append(token)
        adjuster.drawn(followed, token)
    out = logits.clone()
    adjuster.adjust(out, [followed])
    assert torch.equal(out, adjusted(logits, followed))
    assert not torch.equal(out, logits)


def test_bias_and_least_number_of_tokens(logits: torch.Tensor) -> None:
    out = adjusted(logits, sequence([1], [2], logit_bias=((3, 2.5), (7, -100.0)), min_tokens=2, stop_token_ids=frozenset({5})))
    expected = logits.clone()
    expected[0, 3] += 2.5
    expected[0, 7] -= 100
    expected[0, [5, 19]] = -torch.inf
    assert torch.equal(out, expected)
    assert torch.equal(adjusted(logits, sequence([1], [2, 2], min_tokens=2)), logits)
    assert adjusted(logits, sequence([1], [], min_tokens=1, ignore_eos=True))[0, 19] == logits[0, 19]


def test_a_complete_text_may_end_before_the_least_number_of_tokens(logits: torch.Tensor) -> None:
    class OnlyEnd:
        def allowed_tokens(self) -> NDArray[np.bool_]:
            allowed: NDArray[np.bool_] = np.arange(VOCAB) == 19
            return allowed

        def advance(self, token_id: int) -> None:
            assert token_id == 19

    out = adjusted(logits, sequence([1], [], min_tokens=5, constraint=OnlyEnd()))
    assert int(out[0].argmax()) == 19
    assert out[0].isfinite().sum() == 1
    everything = adjusted(logits, sequence([1], [], min_tokens=5, stop_token_ids=frozenset(range(VOCAB))))
    assert torch.equal(everything, logits)


class Alternating:
    """Even and odd tokens take turns."""

    def __init__(self) -> None:
        self.parity, self.taken = 0, list[int]()

    def allowed_tokens(self) -> NDArray[np.bool_]:
        allowed: NDArray[np.bool_] = np.arange(258) % 2 == self.parity
        return allowed

    def advance(self, token_id: int) -> None:
        self.taken.append(token_id)
        self.parity = 1 - self.parity


async def test_a_constraint_steers_one_request_and_no_other(moe_dir: Path) -> None:
    policy = read_policies(moe_dir, read_config(moe_dir))["full"]
    constraint = Alternating()
    async with running(moe_dir) as engine:
        free = request("free", policy, random_prompts(1)[0])
        alone = ids(await events(engine, replace(free, request_id="alone")))
        bound = request("bound", policy, random_prompts(1)[0], constraint=constraint)
        answers = await asyncio.gather(events(engine, free), events(engine, bound))
    assert ids(answers[0]) == alone
    assert [token % 2 for token in ids(answers[1])] == [0, 1] * 12
    assert constraint.taken == ids(answers[1])


@pytest.mark.parametrize("small_cache", [False, True])
async def test_logprobs_equal_transformers(moe_dir: Path, small_cache: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe_dir, dtype=torch.float32)
    policy = read_policies(moe_dir, read_config(moe_dir))["full"]
    config = replace(CONFIG, max_model_len=64, kv_cache_blocks=24) if small_cache else CONFIG
    asked = [
        request(f"r{i}", policy, prompt[:35], max_tokens=20, temperature=1.0, seed=i, logprobs=3, prompt_logprobs=2)
        for i, prompt in enumerate(random_prompts(5))
    ]
    async with running(moe_dir, config) as engine:
        answers = await asyncio.gather(*(events(engine, one) for one in asked))
    for one, answer in zip(asked, answers, strict=True):
        tokens = [*one.prompt_ids, *ids(answer)]
        with torch.no_grad():
            reference = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        prompt_logprobs = answer[0].prompt_logprobs
        assert prompt_logprobs is not None
        assert all(event.prompt_logprobs is None for event in answer[1:])
        assert prompt_logprobs[0] is None
        assert len(prompt_logprobs) == len(one.prompt_ids)
        known = [*prompt_logprobs[1:], *(event.logprobs for event in answer)]
        for place, entry in enumerate(known):
            assert entry is not None
            assert entry.token_id == tokens[place + 1]
            assert entry.logprob == pytest.approx(float(reference[place, entry.token_id]), abs=1e-4)
            assert len(entry.top) == (2 if place + 1 < len(one.prompt_ids) else 3)
            assert [value for _, value in entry.top] == pytest.approx(
                reference[place].topk(len(entry.top)).values.tolist(), abs=1e-4
            )
            assert all(value == entry.logprob for token, value in entry.top if token == entry.token_id)


async def test_priority_goes_first_and_keeps_every_token(moe_dir: Path) -> None:
    policy = read_policies(moe_dir, read_config(moe_dir))["full"]
    prompt = random_prompts(1)[0]
    finished: list[str] = []

    async with running(moe_dir, replace(CONFIG, max_num_seqs=1)) as engine:

        async def one(name: str, priority: int) -> list[int]:
            answer = ids(await events(engine, replace(request(name, policy, prompt, max_tokens=6), priority=priority)))
            finished.append(name)
            return answer

        answers = await asyncio.gather(one("first", 0), one("low", 5), one("mid", 1), one("high", -3))
    assert finished.index("high") < finished.index("mid") < finished.index("low")
    assert all(answer == answers[0] for answer in answers)
