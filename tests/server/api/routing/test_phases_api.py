"""Requests in phases over HTTP: what may be asked, what the answer says, in streams, with stop strings and several choices."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.policies.controller import Control
from server.policies.targets import Automatic, Objective
from tests.factories import EOS_ID
from tests.server.serving import Parts, events, serving

EOS = frozenset({EOS_ID})
THINK = {"phases": [{"policy": "fast", "until": "</t>"}, {"policy": "quality"}]}


def split(body: dict[str, Any]) -> list[tuple[str, int]]:
    return [(phase["policy"], phase["completion_tokens"]) for phase in body["routing"]["phases"]]


async def test_the_answer_says_what_ran(tmp_path: Path) -> None:
    async with serving(tmp_path, eos_token_ids=EOS) as server:
        server.say("hm</t>yes")
        body = await server.complete("a", max_tokens=20, routing=THINK, routing_trace=True)
        routing = body["routing"]
        assert split(body) == [("fast", 6), ("quality", 4)]  # the last token is the end of the text
        assert routing["phases"][0] == {
            "policy": "fast",
            "version": server.services.store.get("fast").version,
            "accuracy": 0.0,
            "reason": "body",
            "until": "</t>",
            "completion_tokens": 6,
        }
        assert routing["phases"][1]["until"] is None
        assert (routing["policy"], routing["reason"]) == ("fast", "body")
        # 2 tokens of the prompt; the pass over a token draws the next one, so 7 passes ran one expert and 4 ran three.
        assert routing["experts_per_token"] == pytest.approx((7 * 1 + 4 * 3) / 11)
        trace = body["choices"][0]["routing_trace"]["tokens"]
        assert [len(layers[0]) for layers in trace] == [1] * 6 + [3] * 4
        sample = 'ladimo_policy_requests_total{reason="body",requested="phases",served="fast"}'
        metrics = await server.metrics()
        assert metrics[sample] == 1
        assert metrics['ladimo_generation_tokens_total{policy="quality"}'] == 4
        assert metrics['ladimo_expert_tokens_total{expert="2",layer="0",policy="quality"}'] == 4


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
async def test_every_endpoint_takes_phases_whole_and_streamed(tmp_path: Path, path: str) -> None:
    prompt: dict[str, Any] = {"prompt": "a"} if path.endswith("/completions") else {"input": "a"}
    if "chat" in path:
        prompt = {"messages": [{"role": "user", "content": "a"}]}
    async with serving(tmp_path, eos_token_ids=EOS) as server:
        server.say("x</t>y")
        whole = (await server.client.post(path, json=prompt | {"routing": THINK})).json()
        assert split(whole) == [("fast", 5), ("quality", 2)]
        server.say("x</t>y")
        streamed = await server.client.post(path, json=prompt | {"routing": THINK, "stream": True})
        assert streamed.headers["X-Routing-Policy"] == "fast"
        if path == "/v1/responses":
            assert '"completion_tokens":5' in streamed.text.replace(" ", "")
        else:
            assert split(events(streamed.text)[-1]) == [("fast", 5), ("quality", 2)]


async def test_the_prompt_is_a_phase(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        phases = [{"accuracy": 1, "until": "prefill"}, {"policy": "fast", "until": "d"}, {"accuracy": 0.5, "until": "decode"}]
        body = await server.complete("a", max_tokens=6, routing={"phases": phases})  # bcd efg
        assert [count for _, count in split(body)] == [1, 2, 3]
        assert [phase["until"] for phase in body["routing"]["phases"]] == ["prefill", "d", "decode"]
        assert [phase["accuracy"] for phase in body["routing"]["phases"]] == [1, 0, 0.5]
        assert body["routing"]["policy"] == "full"


async def test_an_end_that_never_comes_leaves_the_rest_unused(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        body = await server.complete("a", max_tokens=4, routing=THINK)
        assert split(body) == [("fast", 4), ("quality", 0)]
        body = await server.complete("a", max_tokens=0, echo=True, routing=THINK)
        assert split(body) == [("fast", 0), ("quality", 0)]
        body = await server.complete("a", max_tokens=2, routing={"phases": [{"policy": "fast"}]})
        assert split(body) == [("fast", 2)]


async def test_stop_strings_and_several_choices(tmp_path: Path) -> None:
    """The end of a phase may be a part of the stop string, and each choice has its own phases."""
    async with serving(tmp_path, eos_token_ids=EOS) as server:
        server.say("a</t>bSTOPc")
        body = await server.complete("a", max_tokens=20, routing=THINK, stop="STOP")
        assert body["choices"][0]["text"] == "a</t>b"
        assert split(body) == [("fast", 5), ("quality", 5)]
        server.say("x</t>", "longer</t>y", "none")
        body = await server.complete("a", max_tokens=20, routing=THINK, n=3)
        assert split(body) == [("fast", 5 + 10 + 5), ("quality", 1 + 2)]
        server.say("STOP</t>STOP")
        body = await server.complete(
            "a", max_tokens=20, routing={"phases": [{"policy": "fast", "until": "STO"}, {"policy": "full"}]}, stop="STOP"
        )
        assert (body["choices"][0]["text"], split(body)) == ("", [("fast", 3), ("full", 1)])


async def test_a_special_token_ends_a_phase_by_its_name(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        routing = {"phases": [{"policy": "fast", "until": "<|eos|>"}, {"policy": "full"}]}
        body = await server.complete([254], max_tokens=6, routing=routing, ignore_eos=True)  # 255, BOS, EOS, 0, ...
        assert split(body) == [("fast", 3), ("full", 3)]


def routed(body: dict[str, Any]) -> list[tuple[str, float, str]]:
    return [(phase["policy"], phase["accuracy"], phase["reason"]) for phase in body["routing"]["phases"]]


async def test_each_phase_follows_automatic_control_as_a_whole_request_would(tmp_path: Path) -> None:
    async with serving(tmp_path, Parts(default=Automatic(Objective(ttft_ms=1e6)), strict_fields=True)) as server:
        server.services.store.auto_accuracy = 0.0
        asked: list[tuple[dict[str, Any], tuple[str, float, str]]] = [
            ({"policy": "auto"}, ("fast", 0.0, "auto")),
            ({"policy": "auto", "min_accuracy": 0.7}, ("quality", 0.7, "auto")),
            ({"policy": "full", "min_accuracy": 0.4}, ("balanced", 0.4, "auto")),
            ({"policy": "fast", "min_accuracy": 0.4}, ("fast", 0.0, "body")),
            ({"accuracy": 0.9, "min_accuracy": 0.4}, ("balanced", 0.4, "auto")),
            ({"accuracy": 0.9}, ("quality", 0.9, "body")),
            ({"policy": "full"}, ("full", 1.0, "body")),
        ]
        ends = [{"until": end} for end in "bcdefg"] + [{}]
        phases = [{**phase, **end} for (phase, _), end in zip(asked, ends, strict=True)]
        body = await server.complete("a", max_tokens=7, routing={"phases": phases})  # bcdefgh
        assert routed(body) == [expected for _, expected in asked]
        assert [count for _, count in split(body)] == [1] * 7
        for phase, expected in asked:
            whole = (await server.complete("a", max_tokens=1, routing=phase))["routing"]
            assert (whole["policy"], whole["accuracy"], whole["reason"]) == expected


async def test_phases_that_wait_take_the_accuracy_of_the_moment_when_their_request_begins(tmp_path: Path) -> None:
    still = Control(interval_seconds=0.01, react_seconds=1e9, dwell_seconds=1e9)
    default = Automatic(Objective(itl_ms=1e6, min_accuracy=0.2))
    async with serving(tmp_path, Parts(default=default, control=still), max_num_seqs=1) as server:
        control, store, waiting = server.services.automatic_control, server.services.store, server.services.waiting
        await server.until(lambda: control.status() is not None)
        phases = [
            {"policy": "full", "min_accuracy": 0.5, "until": "prefill"},
            {"policy": "quality", "until": "c"},
            {"policy": "auto"},
        ]
        ask = {"prompt": "a", "max_tokens": 4, "routing": {"phases": phases}}
        steps = server.step_by_step()
        running = asyncio.create_task(server.client.post("/v1/completions", json=ask))
        await steps.begun()
        late = asyncio.create_task(server.client.post("/v1/completions", json=ask))
        await server.until(lambda: len(waiting) == 2)
        steps.go()
        await server.until(lambda: len(waiting) == 1)  # the first has begun
        await steps.begun()
        store.auto_accuracy = 0.2
        await server.until(lambda: bool(waiting._asked))
        for _ in range(7):
            await steps.begun()
            steps.go()
        first, second = await running, await late
        full = ("full", 1.0, "body")
        assert routed(first.json()) == [full, ("quality", pytest.approx(2 / 3), "body"), ("full", 1.0, "auto")]
        lowered = [("balanced", 0.5, "auto"), ("quality", pytest.approx(2 / 3), "body"), ("fast", 0.2, "auto")]
        assert routed(second.json()) == lowered
        assert split(second.json()) == [("balanced", 1), ("quality", 1), ("fast", 2)]
        routing = second.json()["routing"]
        assert (routing["policy"], routing["accuracy"], routing["reason"]) == ("balanced", 0.5, "auto")
        assert [reply.headers["X-Routing-Policy"] for reply in (first, second)] == ["full", "balanced"]
        metrics = await server.metrics()
        assert metrics['ladimo_policy_requests_total{reason="body",requested="phases",served="full"}'] == 1
        assert metrics['ladimo_policy_requests_total{reason="auto",requested="phases",served="balanced"}'] == 1
        assert metrics['ladimo_request_success_total{finish_reason="length",policy="balanced"}'] == 1
        tokens = {name: metrics[f'ladimo_generation_tokens_total{{policy="{name}"}}'] for name in ("full", "quality", "fast")}
        assert tokens == {"full": 3, "quality": 2, "fast": 2}
        assert metrics['ladimo_prompt_tokens_total{policy="balanced"}'] == 2


async def test_whether_there_are_too_many_policies_does_not_depend_on_the_load(tmp_path: Path) -> None:
    """At accuracy 1 all phases run under one policy. At another they would need three."""
    async with serving(tmp_path, Parts(default=Automatic(Objective(ttft_ms=1e6))), max_policies=2) as server:
        phases = [{"policy": "auto", "until": "x"}, {"policy": "auto", "min_accuracy": 0.5, "until": "y"}, {"policy": "full"}]
        for accuracy in (1.0, 0.0):
            server.services.store.auto_accuracy = accuracy
            reply = await server.client.post("/v1/completions", json={"prompt": "a", "routing": {"phases": phases}})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "routing.phases")
        phases[1] = {"policy": "auto", "until": "y"}
        assert len(routed(await server.complete("a", routing={"phases": phases}))) == 3


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"phases": []}, "routing.phases", "at least 1 item"),
    ({"phases": [{"policy": "fast"}] * 9}, "routing.phases", "at most 8 items"),
    ({"phases": [{"policy": "fast"}, {"policy": "full"}]}, "routing.phases[0].until", "every phase but the last"),
    ({"phases": [{"policy": "fast", "until": ""}, {"policy": "full"}]}, "routing.phases[0].until", "at least 1 character"),
    ({"phases": [{"policy": "fast", "until": "decode"}, {"policy": "full"}]}, "routing.phases[0].until", "only the last phase"),
    ({"phases": [{"policy": "fast", "until": "x"}]}, "routing.phases[0].until", "the last phase lasts to the end"),
    ({"phases": [{"policy": "fast", "until": "prefill"}]}, "routing.phases[0].until", "the last phase lasts to the end"),
    (
        {"phases": [{"policy": "fast", "until": "x"}, {"policy": "full", "until": "prefill"}, {"policy": "fast"}]},
        "routing.phases[1].until",
        "only the first phase",
    ),
    ({"phases": [{"until": "x"}, {"policy": "full"}]}, "routing.phases[0]", "name either a policy or an accuracy"),
    ({"phases": [{"policy": "fast", "accuracy": 1}]}, "routing.phases[0]", "name either a policy or an accuracy"),
    ({"phases": [{"policy": "fast"}], "policy": "full"}, "routing", "a policy, an accuracy or phases"),
    ({"phases": [{"policy": "fast"}], "min_accuracy": 0.5}, "routing", "min_accuracy cannot be combined"),
]


@pytest.mark.parametrize(("routing", "param", "message"), WRONG)
async def test_what_makes_no_sense_is_refused_by_name(
    tmp_path: Path, routing: dict[str, Any], param: str, message: str
) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.post("/v1/completions", json={"prompt": "a", "routing": routing})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, param)
        assert message in error["message"]


async def test_unknown_policies_and_too_many_of_them(tmp_path: Path) -> None:
    async with serving(tmp_path, max_policies=2) as server:
        phases = [{"policy": "fast", "until": "x"}, {"policy": "nobody"}]
        reply = await server.client.post("/v1/completions", json={"prompt": "a", "routing": {"phases": phases}})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "unknown_policy")
        assert reply.json()["error"]["param"] == "routing.phases[1].policy"
        three = [{"policy": "fast", "until": "x"}, {"policy": "full", "until": "y"}, {"policy": "quality"}]
        reply = await server.client.post("/v1/completions", json={"prompt": "a", "routing": {"phases": three}})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "routing.phases")
        again = [{"policy": "fast", "until": "b"}, {"policy": "full", "until": "c"}, {"policy": "fast"}]
        assert split(await server.complete("a", max_tokens=3, routing={"phases": again})) == [
            ("fast", 1),
            ("full", 1),
            ("fast", 1),
        ]
