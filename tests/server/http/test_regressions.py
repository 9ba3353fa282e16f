"""Vulnerabilities and bugs that other servers had, by name: each is a test here, or says which test elsewhere it is."""

import ast
import hashlib
import json
import math
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from re import _parser  # type: ignore[attr-defined]
from typing import Any

import httpx
import pytest

import server
from server.engine.request import GenerationRequest, SamplingParams, Sequence
from server.settings import read_settings
from server.text.grammar import GrammarCompiler
from tests.deploy import test_dashboards
from tests.factories import VOCAB_SIZE, make_moe, make_tokenizer
from tests.ladimo.model import test_capture
from tests.server.api import test_choices, test_logprobs, test_structured_output
from tests.server.api.routing import test_routing_api
from tests.server.engine import test_generation, test_logits
from tests.server.engine.scheduling import test_scheduler
from tests.server.fakes import fake_policy
from tests.server.http import test_access, test_bad_input, test_fuzz, test_slow_clients, test_storms
from tests.server.process import test_hostile_checkpoints, test_life_cycle
from tests.server.real import serving_model
from tests.server.serving import CONTEXT, serving

ELSEWHERE: dict[str, Callable[..., object]] = {
    "CVE-2025-48942, -48943, -48944: a bad schema or regex kills the engine": (
        test_structured_output.test_a_broken_constraint_is_refused_and_the_next_request_works
    ),
    "CVE-2025-48956: giant headers exhaust memory": test_access.test_giant_headers_are_refused_and_the_connection_closed,
    "CVE-2025-59425: keys compared in variable time": test_access.test_each_key_opens_and_comparison_takes_constant_time,
    "CVE-2026-53923, CVE-2025-53630: a weight file's header with absurd sizes": (
        test_hostile_checkpoints.test_weights_with_absurd_headers_are_one_line_and_no_memory
    ),
    "CVE-2026-44223: an unlucky mix of sampling options kills the engine": test_fuzz.test_completions,
    "CVE-2026-48746, CVE-2026-48710: the Host header opens closed routes": test_access.test_no_path_and_no_host_opens_a_door,
    "vllm#54947, #10806, #9428: left, and goes on": test_life_cycle.test_a_client_that_leaves_frees_everything,
    "sglang#36475: a client leaves and the scheduler crashes": test_storms.test_500_clients_that_leave_at_random_moments,
    "smg#1172: draining stops streams": test_life_cycle.test_drain_finishes_what_runs_and_refuses_the_rest,
    "logprobs as text, NaN, surrogates, deep JSON: 500": test_bad_input.test_malformed_bodies,
    "a name twice in one object": test_access.test_a_name_twice_in_one_object_is_refused,
    "guided_json accepted and ignored": test_structured_output.test_text_satisfies_its_constraint_in_every_spelling,
    "text_offset follows held back text": test_logprobs.test_text_held_back_by_a_stop_string_does_not_move_the_places,
    "a character over several tokens gives U+FFFD": test_logprobs.test_places_of_characters_that_take_several_tokens,
    "usage and finish reasons with n > 1": test_choices.test_a_stream_of_n_choices_ends_each_once,
    "[DONE] is missing after an error": test_life_cycle.test_a_failed_step_in_mid_stream_is_an_error_event_and_done,
    "/metrics redirects": test_bad_input.test_content_type_size_route_and_method,
    "a swap in mid-stream": test_routing_api.test_a_running_stream_keeps_its_version_and_the_next_request_gets_the_new_one,
    "an invalid policy table is taken": test_routing_api.test_a_broken_policy_is_refused_with_its_first_wrong_field,
    "a failed step leaves the server up but dead": test_life_cycle.test_a_failed_step_ends_every_request_and_is_told,
    "alive, ready, and nothing runs": test_life_cycle.test_a_stuck_step_is_not_alive_and_a_long_prompt_is,
    "clients that send, or read, without end or hardly at all": (
        test_slow_clients.test_a_stream_that_nobody_reads_is_cut_and_its_places_are_free
    ),
    "a constraint is left without a word": (
        test_structured_output.test_a_constraint_that_cannot_be_followed_to_its_end_is_an_error_not_a_short_text
    ),
    "a metric renamed under a dashboard": test_dashboards.test_query_reads_what_is_exported,
    "padding rows are counted": test_capture.test_padded_rows_run_nothing_and_disturb_nobody,
    "penalties of another row": test_logits.test_who_asks_for_nothing_is_not_adjusted,
    "a batch changes an answer": test_generation.test_a_request_is_the_same_alone_and_among_seven_other_policies,
    "a prefix of policy A under policy B": (
        test_generation.test_a_cached_prefix_changes_no_token_and_is_never_shared_between_policies
    ),
    "blocks do not come back": test_scheduler.test_every_request_finishes_with_its_own_tokens,
    "experts' counters are not tokens times k": test_generation.test_counters_are_exactly_tokens_times_k,
    "swap storm": test_storms.test_the_default_changes_hundreds_of_times_a_second_under_load,
}

CHAT = {"messages": [{"role": "user", "content": "a"}]}
REFUSED: dict[str, list[dict[str, Any]]] = {
    "CVE-2024-8768: an empty prompt kills the server": [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [""]},
        {"prompt": ["a", ""]},
    ],
    "CVE-2024-8939, CVE-2026-34756: best_of or n without limit": [
        *({"prompt": "a", "n": n} for n in (0, 17, 10**9, 10**30)),
        {"prompt": "a", "best_of": 10**9},
        {"prompt": ["a"] * 1000, "n": 16, "max_tokens": 60},
    ],
    "CVE-2025-61620, -62426: templates from the client": [
        {**CHAT, "chat_template": "{% for i in range(10**9) %}x{% endfor %}"},
        {**CHAT, "chat_template_kwargs": {"tokenize": True}},
        {**CHAT, "chat_template_kwargs": {"chat_template": "x"}},
    ],
    "CVE-2025-62164: tensors from the client": [{"prompt": "a", "prompt_embeds": "gASVAAAA"}, {"prompt_embeds": "gASVAAAA"}],
    "CVE-2026-0599: images are fetched": [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}]}
    ],
    "CVE-2026-53923, CVE-2025-53630, CVE-2026-27940, CVE-2026-21869: numbers out of range": [
        {"prompt": "a", name: value}
        for name in (
            *("max_tokens", "min_tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "priority"),
            *("presence_penalty", "frequency_penalty", "repetition_penalty", "best_of"),
        )
        for value in (-(2**64), 2**64, 10**400, math.nan, math.inf, -math.inf, "1", [1])
    ],
    "mini-sglang: a prompt longer than the context is dropped": [{"prompt": [5] * CONTEXT}, {"prompt": "x" * 10_000}],
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refused_and_the_next_request_is_served(tmp_path: Path, name: str) -> None:
    async with serving(tmp_path) as server:
        for body in REFUSED[name]:
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            content = json.dumps(body).encode()
            reply = await server.client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert reply.status_code == 400, (body, reply.text)
            assert len(reply.content) < 1500
        assert server.runner.batches == []
        assert (await server.complete("a", max_tokens=1))["choices"][0]["text"] == "b"


def test_cve_2025_32381_a_grammar_cache_that_grows() -> None:
    compiler = GrammarCompiler(make_tokenizer(), VOCAB_SIZE)

    def compile_many(begin: int, end: int) -> int:
        for number in range(begin, end):
            properties = {f"name{number}": {"const": "x" * (number % 50)}}
            compiler.json_schema({"type": "object", "properties": properties, "additionalProperties": False}).start()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = compile_many(0, 500)
    assert compile_many(500, 10_000) - before < 20 * 1024  # KiB


def repeats(pattern: Any, endless: bool = False) -> Iterator[str]:
    """The repetitions without end inside another such, in a parsed pattern: what makes backtracking take exponential time."""
    for operation, argument in pattern:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            _, most, inner = argument
            if endless and most > 16:
                yield str(inner)
            yield from repeats(inner, endless or most > 16)
        elif name == "SUBPATTERN":
            yield from repeats(argument[-1], endless)
        elif name == "BRANCH":
            for branch in argument[1]:
                yield from repeats(branch, endless)


def _makes_pattern(function: ast.expr) -> bool:
    """`re.escape` only writes text that stands for itself."""
    name = ast.unparse(function)
    return name.startswith("re.") and name != "re.escape"


def test_cve_2025_48887_no_pattern_of_ours_can_backtrack_for_ever() -> None:
    assert list(repeats(_parser.parse("(a+)+"))) != []
    assert list(repeats(_parser.parse("(a|b*c){2,}"))) != []
    patterns = []
    for file in Path(server.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and _makes_pattern(node.func) and node.args:
                assert isinstance(node.args[0], ast.Constant), f"{file}:{node.lineno}: a pattern made at run time"
                patterns.append(node.args[0].value)
    assert len(patterns) >= 3
    for pattern in patterns:
        assert list(repeats(_parser.parse(pattern))) == [], pattern


def sequence(prompt: list[int], version: str = "full", salt: str = "") -> Sequence:
    request = GenerationRequest("x", tuple(prompt), SamplingParams(max_tokens=1), fake_policy(version), cache_salt=salt)
    return Sequence(request, (1,), 0, 0.0, [])


def test_cve_2025_25183_prefixes_that_python_hashes_alike_have_different_keys() -> None:
    modulus = sys.hash_info.modulus
    for left, right in (([-1] * 8, [-2] * 8), ([0] * 8, [modulus] * 8), ([7] * 8, [7 + modulus] * 8)):
        assert hash(tuple(left)) == hash(tuple(right))
        assert sequence(left).prefix_keys(2, 4) != sequence(right).prefix_keys(2, 4)
    base = sequence([1, 2, 3, 4, 5, 6, 7, 8]).prefix_keys(2, 4)
    assert all(len(key) == hashlib.sha256().digest_size for key in base)
    others = {
        "an earlier block": sequence([9, 2, 3, 4, 5, 6, 7, 8]),
        "the same tokens, cut elsewhere": sequence([1, 2, 3, 4, 0, 5, 6, 7, 8]),
        "the salt": sequence([1, 2, 3, 4, 5, 6, 7, 8], salt="s"),
        "the policy": sequence([1, 2, 3, 4, 5, 6, 7, 8], version="fast"),
    }
    for what, other in others.items():
        assert other.prefix_keys(2, 4)[1] != base[1], what
    assert sequence([1, 2, 3, 4, 5, 6, 7, 8]).prefix_keys(2, 4) == base


async def test_cve_2025_46570_cached_prompts_are_shared_under_the_same_salt_only(moe_dir: Path) -> None:
    async with serving_model(moe_dir) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def hits(**fields: str) -> float:
            body = {"prompt": [7] * 100, "max_tokens": 1, **fields}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            lines = (await client.get("/metrics")).text.splitlines()
            (value,) = [line.split()[1] for line in lines if line.startswith("ladimo_prefix_cache_hits_total ")]
            return float(value)

        assert await hits(cache_salt="one") == 0
        assert await hits(cache_salt="two") == 0
        assert await hits() == 0
        assert await hits(cache_salt="one", routing="fast") == 0  # another policy computes other keys and values
        assert await hits(cache_salt="one") > 0


async def test_a_cached_prompt_has_its_log_probabilities_all_the_same(moe_dir: Path) -> None:
    async with serving_model(moe_dir) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        body = {"prompt": [7, 8] * 50, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        plain = {name: value for name, value in body.items() if name not in ("echo", "logprobs")}
        await client.post("/v1/completions", json=plain)
        first, second = [(await client.post("/v1/completions", json=body)).json()["choices"] for _ in range(2)]
        assert len(first[0]["logprobs"]["token_logprobs"]) == 101
        assert first == second


async def test_cve_2025_66448_and_2026_22807_a_checkpoint_runs_no_code_of_its_own(tmp_path: Path, dense_dir: Path) -> None:
    model = make_moe(tmp_path / "model", dense=dense_dir)
    proof = tmp_path / "was-run"
    (model / "evil.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Evil: ...\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((model / file).read_text())
        auto_map: dict[str, Any] = dict.fromkeys(names, "evil.Evil")
        if file == "tokenizer_config.json":
            auto_map["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        (model / file).write_text(json.dumps({**content, "auto_map": auto_map}))
    async with serving_model(model) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        assert (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200
    assert not proof.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ raise_exception('no') }}",
        "{% broken",
    ],
)
async def test_cve_2026_5760_and_2024_34359_a_checkpoint_s_template_runs_in_a_sandbox(tmp_path: Path, template: str) -> None:
    async with serving(tmp_path) as server:
        server.services.language.tokenizer.chat_template = template
        for path in ("/v1/chat/completions", "/tokenize"):
            reply = await server.client.post(path, json=CHAT)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages"), reply.text
        assert (await server.complete("a", max_tokens=1))["choices"][0]["text"] == "b"


async def test_cve_2025_62426_long_texts_are_worked_on_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as server:
        tokenizer, threads = server.services.language.tokenizer, list[str]()
        for name in ("_encode", "_decode_long"):
            work = getattr(tokenizer, name)

            def watched(*arguments: Any, _work: Callable[..., object] = work, **options: Any) -> object:
                threads.append(threading.current_thread().name)
                return _work(*arguments, **options)

            monkeypatch.setattr(tokenizer, name, watched)
        text = "abc " * 100_000
        tokens = (await server.client.post("/tokenize", json={"prompt": text, "add_special_tokens": False})).json()["tokens"]
        assert (await server.client.post("/detokenize", json={"tokens": tokens})).json()["prompt"] == text
        assert (await server.client.post("/tokenize", json=CHAT)).status_code == 200
        assert len(threads) == 3
        assert all(thread.startswith("tokenizer") for thread in threads)


def test_cve_2026_3059_and_others_the_server_is_bound_to_this_machine_unless_told_otherwise() -> None:
    assert read_settings(["model"]).is_loopback


async def test_an_error_is_never_much_larger_than_its_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        for body in (
            {"prompt": [[-1] * 500] * 10},
            {"prompt": "a", "routing": "x" * 4000},
            {"prompt": "a", "model": "é" * 2000},
            {"prompt": "a", "x" * 4000: 1, "stop": [{"a": 1}] * 30},
            {"messages": [{"role": "r" * 100}] * 100},
        ):
            path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            reply = await server.client.post(path, json=body)
            assert reply.status_code in (400, 404)
            assert len(reply.content) < 3000
            assert "/" not in reply.json()["error"]["message"].replace("/v1/routing", "")  # no path of a file
