"""Chunks of prompts that are as large as a bound on the time of a step allows. Times are made up; nothing is measured."""

from collections.abc import Callable

import pytest

from server.engine.build import step_limits
from server.engine.config import EngineConfig
from server.engine.core import EngineCore
from server.engine.messages import Submit
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.scheduling.chunks import ALONE, FIRST, MOST, ChunkSizes, fit_line
from server.settings import read_settings
from tests.server.fakes import FAKE_CONFIG, Clock, fake_core, fake_policy

BLOCK = 16
Seconds = Callable[[int, int], float]  # from decoding rows and prompt tokens to those of a step


def machine(token: float = 0.002, row: float = 0.003, step: float = 0.02) -> Seconds:
    return lambda rows, tokens: step + row * rows + token * tokens


def learned(sizes: ChunkSizes, takes: Seconds, rows: int = 8, steps: int = 24) -> ChunkSizes:
    """Steps that only decode, then chunks of a long prompt."""
    for count in (1, rows, rows):
        sizes.observe(count, 0, takes(count, 0))
    for _ in range(steps):
        tokens = sizes.tokens(rows)
        sizes.observe(rows, tokens, takes(rows, tokens))
    return sizes


def test_a_step_takes_as_long_as_it_may() -> None:
    takes = machine()
    sizes = learned(ChunkSizes(0.2, BLOCK, MOST), takes)
    for rows in (1, 4, 8):
        tokens = sizes.size(rows)
        assert tokens % BLOCK == 0
        assert takes(rows, tokens) <= 0.2 + 1e-9 < takes(rows, tokens + 2 * BLOCK)
    assert sizes.size(1) > sizes.size(8)


def test_for_a_step_that_decodes_nothing_only_new_requests_wait() -> None:
    takes = machine()
    sizes = learned(ChunkSizes(0.05, BLOCK, MOST), takes, rows=1)
    for _ in range(3):
        sizes.observe(0, sizes.size(0), takes(0, sizes.size(0)))
    assert takes(0, sizes.size(0)) <= ALONE * 0.05 + 1e-9 < takes(0, sizes.size(0) + 2 * BLOCK)


def test_chunks_stay_between_one_block_and_what_the_memory_allows() -> None:
    sizes = ChunkSizes(0.2, BLOCK, 300)
    assert sizes.size(3) == FIRST  # nothing is known yet
    assert ChunkSizes(0.2, BLOCK, 100).size(3) == 96
    assert learned(sizes, machine(token=1e-5)).size(1) == 288
    assert learned(sizes, machine(token=0.5)).size(1) == BLOCK


def test_where_decoding_is_slow_prompts_take_as_long_as_it_does() -> None:
    """Else a prompt would take one block per step for ever."""
    takes = machine(step=1.0)
    sizes = learned(ChunkSizes(0.2, BLOCK, MOST), takes)
    tokens = sizes.size(8)
    assert takes(8, tokens) <= 2 * takes(8, 0) < takes(8, tokens + 2 * BLOCK)


def test_a_machine_with_slow_steps_is_not_driven_to_small_chunks() -> None:
    """If all time counted as that of tokens, smaller chunks would make them look dearer, and so on."""
    takes = machine(token=0.005, row=0.0, step=0.19)
    sizes = ChunkSizes(0.2, BLOCK, MOST)
    for _ in range(200):
        tokens = sizes.tokens(1)
        sizes.observe(1, tokens, takes(1, tokens))
    assert takes(1, sizes.size(1)) <= 2 * 0.19 + 1e-9 < takes(1, sizes.size(1) + 2 * BLOCK)


def test_sizes_grow_step_by_step() -> None:
    """Noise can make tokens look free."""
    sizes = ChunkSizes(0.2, BLOCK, MOST)
    sizes.observe(1, 16, 0.1)
    sizes.observe(1, 32, 0.1001)
    assert sizes.size(1) == FIRST
    sizes.observe(1, FIRST, 0.1002)
    assert sizes.size(1) == 2 * FIRST


def test_first_steps_that_compiled_are_forgotten() -> None:
    takes, slow = machine(), ChunkSizes(0.2, BLOCK, MOST)
    slow.observe(0, 128, 60.0)
    assert slow.size(1) == BLOCK
    slow.observe(0, 48, 20.0)
    assert learned(slow, takes).size(8) == learned(ChunkSizes(0.2, BLOCK, MOST), takes).size(8)


def test_a_machine_that_gets_slower_gets_smaller_chunks() -> None:
    sizes = learned(ChunkSizes(0.2, BLOCK, MOST), machine())
    before, slower = sizes.size(8), machine(token=0.008)
    learned(sizes, slower)
    assert sizes.size(8) < before / 3
    assert slower(8, sizes.size(8)) <= 0.2


def test_a_line_through_steps() -> None:
    exact = [(tokens, 0.5 + 0.01 * tokens) for tokens in (16, 32, 64, 64, 128)]
    assert fit_line(exact) == pytest.approx((0.5, 0.01))
    assert fit_line([*exact, (16, 9.0)]) == pytest.approx((0.5, 0.01), rel=0.01)  # it was held up
    assert fit_line([(64, 0.64), (64, 0.64), (60, 0.6)]) == pytest.approx((0, 0.01))  # too much alike
    assert fit_line([(16, 0.5), (64, 0.5)]) == pytest.approx((0, (0.5 / 16 + 0.5 / 64) / 2))


def timed_core(chunks: ChunkSizes | None, takes: Seconds) -> EngineCore:
    """An engine whose steps take so long on a clock that nothing else moves."""
    clock = Clock()
    core, runner = fake_core(
        max_num_seqs=4, max_model_len=1024, num_blocks=300, block_size=BLOCK, max_step_tokens=256, clock=clock, chunks=chunks
    )
    execute = runner.execute

    def timed(batch):  # type: ignore[no-untyped-def]
        clock.now += takes(len(batch.decode), batch.num_tokens - len(batch.decode))
        return execute(batch)

    runner.execute = timed  # type: ignore[method-assign]
    return core


def request(name: str, prompt: int, tokens: int) -> Submit:
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    ids = tuple(range(ord(name[0]), ord(name[0]) + prompt))  # no prompt begins like another
    return Submit(GenerationRequest(name, ids, sampling, fake_policy("p")))


def steps_beside_long_prompts(chunks: ChunkSizes | None) -> list[tuple[int, int, float, int]]:
    """Rows, prompt tokens, seconds and limit of the steps while one request decodes and three long prompts come."""
    core = timed_core(chunks, machine())
    core.handle(request("decodes", 4, 60))
    seen = []
    for name in ("a", "b", "c"):
        for _ in range(4):
            core.step()
        core.handle(request(name, 600, 1))
        while any(sequence.request.request_id == name for sequence in (*core._scheduler.waiting, *core._scheduler.running)):
            stats = core.step().stats
            seen.append((stats.decode_tokens, stats.prefill_tokens, stats.seconds, stats.prompt_limit))
    return seen


def test_the_engine_learns_from_its_own_steps() -> None:
    steps = steps_beside_long_prompts(ChunkSizes(0.2, BLOCK, 256))
    late = steps[4:]
    assert all(rows == 1 and seconds <= 0.2 for rows, _, seconds, _ in late)
    assert all(tokens <= limit for _, tokens, _, limit in steps)
    full = sorted(tokens for _, tokens, _, limit in late if tokens == limit)
    assert machine()(1, full[-1] + 2 * BLOCK) > 0.2


def test_a_number_of_tokens_means_what_it_meant() -> None:
    steps = steps_beside_long_prompts(None)
    assert [limit for *_, limit in steps] == [255] * len(steps)
    assert sum(tokens == 255 for _, tokens, _, _ in steps) == 3 * 2


def test_the_limits_of_a_configuration() -> None:
    assert step_limits(EngineConfig(max_step_tokens=77), FAKE_CONFIG, 2**29) == (77, None)
    auto = EngineConfig(max_num_seqs=4, max_step_tokens="auto", max_step_ms=50, block_size=BLOCK)
    limit, chunks = step_limits(auto, FAKE_CONFIG, 2**29)
    assert chunks is not None
    assert (limit, chunks.seconds, chunks.most) == (4 + MOST, 0.05, MOST)
    wide = 4 * (FAKE_CONFIG.vocab_size + 8 * FAKE_CONFIG.hidden_size + 3 * FAKE_CONFIG.intermediate_size)
    _, chunks = step_limits(auto, FAKE_CONFIG, 100 * wide)
    assert chunks is not None and chunks.most == 100
    _, chunks = step_limits(auto, FAKE_CONFIG, 0)
    assert chunks is not None and chunks.most == chunks.size(0) == BLOCK


def test_the_setting() -> None:
    assert read_settings(["m"]).max_step_tokens == "auto"
    assert read_settings(["m", "--max-step-tokens", "64"]).max_step_tokens == 64
    with pytest.raises(ValueError, match=r"^--max-step-tokens .*'auto'$"):
        read_settings(["m", "--max-step-tokens", "many"])
    with pytest.raises(ValueError, match="--max-step-ms"):
        read_settings(["m", "--max-step-ms", "0"])
