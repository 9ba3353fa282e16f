"""A request in phases: each token runs under the policy of its phase, whatever else happens to the request."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladimo.checkpoint import load_model, read_config, read_policies
from ladimo.model.inputs import StepInputs
from ladimo.model.transformer import MoeTransformer
from ladimo.policy import RoutingPolicy
from server.engine.build import assemble_core, build_core
from server.engine.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.messages import Abort, Submit
from server.engine.policy_table import PolicyTable
from server.engine.request import GenerationRequest, LaterPhases, SamplingParams
from server.text.phase_ends import PhaseEnds
from tests.factories import make_nested
from tests.server.engine.graphs import Driver, assert_idle, eight_policies, graph_core, random_prompts
from tests.server.fakes import fake_core, fake_policy

CONFIG = EngineConfig(device="cpu", max_num_seqs=9, block_size=4, max_step_tokens=24, max_policies=12, max_model_len=96)
MAX_TOKENS = 20


@pytest.fixture(scope="module")
def model(moe_dir: Path) -> MoeTransformer:
    return load_model(moe_dir, torch.float32, torch.device("cpu"))


class AfterTokens:
    """Phases that end with the tokens of these numbers, counted from 1 in the answer."""

    def __init__(self, *ends: int) -> None:
        self._ends, self._read = ends, 0

    def read(self, token_id: int) -> int:
        self._read += 1
        return self._ends.count(self._read)


def in_phases(
    name: str,
    policies: Sequence[RoutingPolicy],
    prompt: list[int],
    *ends: int,
    after_prompt: bool = False,
    max_tokens: int = MAX_TOKENS,
    temperature: float = 0.0,
) -> GenerationRequest:
    """With `after_prompt`, the first policy computes the prompt. `ends`: see AfterTokens."""
    later = LaterPhases(tuple(policies[1:]), after_prompt, AfterTokens(*ends) if ends else None)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=7, ignore_eos=True)
    return GenerationRequest(name, tuple(prompt), sampling, policies[0], later=later if len(policies) > 1 else None)


def likeliest(model: MoeTransformer, tokens: list[int], policies: Sequence[RoutingPolicy]) -> list[int]:
    """The most likely next token after each token, if token i runs under policies[i]. Computed in one pass, without a cache."""
    table = PolicyTable(model.config, 12, torch.device("cpu"))
    rows = [(table.acquire([policy]) or (0,))[0] for policy in policies]
    inputs = replace(StepInputs.whole_sequences(torch.tensor([tokens])), policy_ids=torch.tensor(rows))
    with torch.inference_mode():
        return model.forward(inputs, None, table.tables).logits.argmax(dim=-1).tolist()


def answers(core: EngineCore, *requests: GenerationRequest) -> list[list[int]]:
    driver = Driver(core)
    driver.submit(*requests)
    driver.run()
    assert_idle(core)
    return [driver.tokens[request.request_id] for request in requests]


@pytest.mark.parametrize(
    ("after_prompt", "ends"), [(True, ()), (False, (6,)), (True, (5, 11)), (False, (9, 9)), (False, (99,))]
)
def test_each_token_runs_under_the_policy_of_its_phase(
    moe_dir: Path, model: MoeTransformer, after_prompt: bool, ends: tuple[int, ...]
) -> None:
    """The pass over a token belongs to the phase that begins with it. A pass draws the token after it."""
    policies = eight_policies(moe_dir)[: 1 + after_prompt + len(ends)]
    changed = 0
    for number, prompt in enumerate(random_prompts(4)):
        asked = in_phases(f"r{number}", policies, prompt, *ends, after_prompt=after_prompt)
        (answer,) = answers(assemble_core(model, CONFIG), asked)
        starts = [len(prompt)] * after_prompt + [len(prompt) - 1 + end for end in ends]
        tokens = prompt + answer[:-1]
        ran = [policies[sum(start <= place for start in starts)] for place in range(len(tokens))]
        assert likeliest(model, tokens, ran)[len(prompt) - 1 :] == answer
        (plain,) = answers(assemble_core(model, CONFIG), in_phases("plain", policies[:1], prompt))
        changed += plain != answer
    assert changed or ends == (99,), "the phases are decoration"


def test_phases_survive_preemption_other_requests_and_graphs(moe_dir: Path, model: MoeTransformer) -> None:
    policies = eight_policies(moe_dir)

    def asked() -> list[GenerationRequest]:
        return [
            in_phases(
                f"r{i}", [policies[i], policies[7 - i], policies[(i + 3) % 8]], prompt, 3 + i, 6 + 2 * i, temperature=i % 2
            )
            for i, prompt in enumerate(random_prompts(6))
        ]

    alone = [answers(assemble_core(model, CONFIG), one)[0] for one in asked()]
    small = replace(CONFIG, kv_cache_blocks=26)
    core = assemble_core(model, small)
    assert answers(core, *asked()) == alone
    assert core._scheduler.preemptions, "nothing was preempted: the test does not test"
    assert answers(graph_core(model, CONFIG), *asked()) == alone
    assert answers(graph_core(model, small), *asked()) == alone


@pytest.mark.parametrize("kind", ["experts", "nested"])
def test_the_back_end_that_serves_computes_phases_again_alike(moe_dir: Path, tmp_path: Path, kind: str) -> None:
    """After a preemption, a prompt and an answer of several phases are computed in one piece."""
    directory = moe_dir if kind == "experts" else make_nested(tmp_path)
    policies = list(read_policies(directory, read_config(directory)).values())

    def asked() -> list[GenerationRequest]:
        prompts = random_prompts(6)
        return [in_phases(f"r{i}", [policies[i % 4], policies[(i + 2) % 4]], prompt, 4 + i) for i, prompt in enumerate(prompts)]

    alone = [answers(build_core(directory, CONFIG), one)[0] for one in asked()]
    core = build_core(directory, replace(CONFIG, kv_cache_blocks=26))
    assert answers(core, *asked()) == alone
    assert core._scheduler.preemptions, "nothing was preempted: the test does not test"


def test_a_step_may_be_launched_early_only_when_its_policies_are_known(moe_dir: Path, model: MoeTransformer) -> None:
    policies = eight_policies(moe_dir)[:2]
    driver = Driver(graph_core(model, CONFIG))
    driver.submit(in_phases("r", policies, random_prompts(1)[0], 8))
    early = []
    while driver.core.has_work:
        driver.step()
        early.append(driver.core._flight is not None)
    # Step n draws token n. Token 8 ends the phase, so the first step that is launched early draws token 10.
    assert early == [False] * 8 + [True] * 11 + [False]


def test_cached_blocks_are_shared_by_those_that_ran_the_same_policies(moe_dir: Path, model: MoeTransformer) -> None:
    slow, fast = eight_policies(moe_dir)[3], eight_policies(moe_dir)[0]
    prompt = random_prompts(8)[7]
    whole = (len(prompt) - 1) // 4 * 4

    def run(core: EngineCore, name: str, policies: Sequence[RoutingPolicy], tokens: list[int], *ends: int, **how: bool) -> int:
        """How many tokens came from the cache. The answer must be that of an engine without a cache."""
        driver = Driver(core)
        driver.submit(in_phases(name, policies, tokens, *ends, **how))
        driver.run()
        fresh = assemble_core(model, replace(CONFIG, prefix_caching=False))
        assert answers(fresh, in_phases(name, policies, tokens, *ends, **how)) == [driver.tokens[name]]
        return driver.events[0].cached_tokens

    core = assemble_core(model, CONFIG)
    assert run(core, "first", [slow, fast], prompt, after_prompt=True) == 0
    assert run(core, "the same prompt phase", [slow], prompt) == whole
    assert run(core, "the same phases", [slow, fast], prompt, after_prompt=True) == whole
    assert run(core, "another policy for the prompt", [fast], prompt) == 0
    assert run(core, "the phases in the other order", [fast, slow], prompt, after_prompt=True) == whole  # fast's own prompt
    # The conversation goes on. Only the blocks of the first phase's policy are those that `slow` alone would compute.
    (said,) = answers(assemble_core(model, CONFIG), in_phases("x", [slow, fast], prompt, after_prompt=True))
    longer = [*prompt, *said]
    assert run(core, "longer, slow", [slow], longer) == len(prompt) // 4 * 4


def test_a_block_of_two_phases_has_a_key_of_its_own(moe_dir: Path, model: MoeTransformer) -> None:
    """Two phases within the prompt's last block: no request with one policy may reuse it, and none with another boundary."""
    policies = eight_policies(moe_dir)[:2]
    core = assemble_core(model, CONFIG)
    prompt = random_prompts(1)[0][:6]
    keys = {}
    for name, ends in (("a", (1,)), ("b", (2,)), ("c", (9,))):
        request = in_phases(name, policies, prompt, *ends, max_tokens=10)
        core.handle(Submit(request))
        (sequence,) = core._scheduler.waiting
        sequence.output_ids = [1] * 9
        sequence.phase_starts = [0, 5 + ends[0]]
        keys[name] = sequence.prefix_keys(3, 4)
        core.handle(Abort(name))
    assert len({each[0] for each in keys.values()}) == 1
    assert len({each[1] for each in keys.values()}) == 3
    assert len({each[2] for each in keys.values()}) == 3


def test_tokens_and_latencies_count_for_the_policy_that_ran(moe_dir: Path, model: MoeTransformer) -> None:
    policies = eight_policies(moe_dir)[:3]
    prompt = random_prompts(1)[0]
    driver = Driver(assemble_core(model, CONFIG))
    driver.submit(in_phases("r", policies, prompt, 5, after_prompt=True))
    driver.run()
    assert [event.phase for event in driver.events] == [0] + [1] * 4 + [2] * 15
    generated = {policy.name: sum(step.generation_tokens.get(policy.name, 0) for step in driver.steps) for policy in policies}
    assert generated == {policies[0].name: 1, policies[1].name: 4, policies[2].name: 15}
    decoded = {policy.name: sum(step.decode_rows.get(policy.name, 0) for step in driver.steps) for policy in policies}
    assert decoded == {policies[0].name: 0, policies[1].name: 4, policies[2].name: 15}
    waits = [name for step in driver.steps for name, _ in step.inter_token_seconds]
    assert waits == [policies[1].name] * 4 + [policies[2].name] * 15
    assert driver.core._table._routed_tokens == {policies[0].name: len(prompt), policies[1].name: 4, policies[2].name: 15}


requests = st.lists(
    st.tuples(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3), st.integers(1, 12), st.integers(-1, 1)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=50, deadline=None)
@given(requests, st.integers(3, 5), st.integers(0, 2), st.data())
def test_requests_that_need_several_rows_all_get_them(
    specs: list[tuple[list[str], int, int]], max_policies: int, resident: int, data: st.DataObject
) -> None:
    """With fewer rows than policies, and requests that come and leave at any time: nothing hangs and nothing is lost."""
    core, _ = fake_core(max_policies=max_policies, num_blocks=18)
    core._table.set_resident([fake_policy(name) for name in "ab"[:resident]])
    done = []
    for number, (names, max_tokens, priority) in enumerate(specs):
        policies = [fake_policy(name) for name in names]
        ends = range(2, 2 + len(names) - 1)
        asked = in_phases(f"r{number}", policies, [1, 2, 3], *ends, max_tokens=max_tokens)
        core.handle(Submit(replace(asked, priority=priority)))
        if data.draw(st.booleans()):
            core.handle(Abort(f"r{data.draw(st.integers(0, number))}"))
        for _ in range(data.draw(st.integers(0, 3))):
            if core.has_work:
                done += [stats.request_id for stats in core.step().stats.finished]
    for _ in range(2000):
        if not core.has_work:
            break
        done += [stats.request_id for stats in core.step().stats.finished]
    assert sorted(done) == sorted(f"r{number}" for number in range(len(specs)))
    assert_idle(core)


def test_a_request_with_two_policies_is_not_passed_for_ever() -> None:
    """Others keep coming for policies that have rows. Both rows that it lacks are closed to them."""
    core, _ = fake_core(max_policies=2, max_num_seqs=8)
    core.handle(Submit(in_phases("a0", [fake_policy("a")], [1], max_tokens=6)))
    core.handle(Submit(in_phases("b0", [fake_policy("b")], [1], max_tokens=6)))
    core.handle(Submit(in_phases("both", [fake_policy("c"), fake_policy("d")], [1], 1, max_tokens=2)))
    done: list[str] = []
    for step in range(1, 30):
        done += [stats.request_id for stats in core.step().stats.finished]
        for name in "ab":
            core.handle(Submit(in_phases(f"{name}{step}", [fake_policy(name)], [1], max_tokens=6)))
    assert done.index("both") == 2


@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet="ab</>é", max_size=40), st.lists(st.text(alphabet="ab</>é", min_size=1, max_size=4), max_size=3), st.data()
)
def test_ends_are_found_however_the_text_is_cut_into_tokens(text: str, ends: list[str], data: st.DataObject) -> None:
    """A token may begin and end within a character, and hold several ends. The token that completes an end, ends the phase."""
    raw, places = text.encode(), []
    position = 0
    for end in (each.encode() for each in ends):
        found = raw.find(end, position)
        if found < 0:
            break
        position = found + len(end)
        places.append(position)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=8)))
    tokens = [raw[begin:stop] for begin, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    watch = PhaseEnds(ends, lambda token_id: tokens[token_id])
    seen, read = [], 0
    for token_id, token in enumerate(tokens):
        read += len(token)
        seen += [read] * watch.read(token_id)
    assert seen == [next(stop for stop in [*cuts, len(raw)] if stop >= place) for place in places]
