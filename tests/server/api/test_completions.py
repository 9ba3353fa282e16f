"""The two completion endpoints: what goes in comes out right, streamed or whole."""

from pathlib import Path

import pytest

from tests.server.serving import CONTEXT, MODEL, events, serving


async def test_completion_has_openai_shape(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 4})
        body = reply.json()
        assert reply.headers["x-routing-policy"] == "full"
        assert reply.headers["x-request-id"]
        assert body["object"] == "text_completion"
        assert body["model"] == MODEL
        assert body["choices"] == [{"index": 0, "text": "bcde", "logprobs": None, "finish_reason": "length"}]
        assert body["usage"] == {
            "prompt_tokens": 2,
            "completion_tokens": 4,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 0},
        }  # the prompt has a BOS


async def test_default_max_tokens_is_16_and_shrinks_to_the_context(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        assert (await server.complete("a"))["usage"]["completion_tokens"] == 16
        near_the_end = await server.complete([1] * (CONTEXT - 3))
        assert near_the_end["usage"]["completion_tokens"] == 3
        assert near_the_end["choices"][0]["finish_reason"] == "length"


async def test_chat_renders_the_template_and_fills_the_context(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        messages = [
            {"role": "system", "content": "be"},
            {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        ]
        reply = await server.client.post("/v1/chat/completions", json={"messages": messages})
        body = reply.json()
        rendered = await server.client.post("/tokenize", json={"messages": messages})
        prompt = (await server.client.post("/detokenize", json={"tokens": rendered.json()["tokens"]})).json()["prompt"]
        assert prompt == "<|bos|>system: be\nuser: hi\nassistant: "
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"]["role"] == "assistant"
        assert body["usage"]["prompt_tokens"] == rendered.json()["count"]
        assert body["usage"]["total_tokens"] == CONTEXT
        assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_stream_has_one_chunk_per_token_and_equals_the_whole_answer(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path) as server:
        prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
        fields = {**prompt, "max_tokens": 5}
        whole = (await server.client.post(path, json=fields)).json()
        reply = await server.client.post(path, json={**fields, "stream": True, "stream_options": {"include_usage": True}})
        assert reply.headers["content-type"].startswith("text/event-stream")
        *chunks, usage = events(reply.text)
        said = chunks
        if path == "/v1/completions":
            text, expected = "".join(c["choices"][0]["text"] for c in chunks), whole["choices"][0]["text"]
        else:
            *said, end = chunks
            assert end["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
            text = "".join(c["choices"][0]["delta"]["content"] for c in said)
            expected = whole["choices"][0]["message"]["content"]
            assert [c["choices"][0]["delta"].get("role") for c in said] == ["assistant", None, None, None, None]
            assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
        assert text == expected
        assert len(said) == 5
        before = [None] * (len(chunks) - 1)
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [*before, "length"]
        assert all(c["usage"] is None for c in chunks)
        assert usage["choices"] == []
        for counted in (usage["usage"], whole["usage"]):
            del counted["prompt_tokens_details"]  # the second answer found the first one's prompt in the cache
        assert usage["usage"] == whole["usage"]
        assert [c.get("routing") is None for c in chunks] == [True] * len(before) + [False]
        assert chunks[-1]["routing"] == usage["routing"] == whole["routing"]
        assert len({c["id"] for c in [*chunks, usage]}) == 1


async def test_stream_without_usage_option_has_none(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        reply = await server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": True})
        assert [c["choices"][0]["text"] for c in events(reply.text)] == ["b", "c"]
        assert "usage" not in reply.text


@pytest.mark.parametrize("prompt", [["a", "k", "0"], [[64, 65], [74], [15]]])
async def test_every_prompt_of_a_list_is_a_choice_with_its_index(tmp_path: Path, prompt: list[object]) -> None:
    async with serving(tmp_path, max_num_seqs=2) as server:
        singles = [(await server.complete(each, max_tokens=3))["choices"][0]["text"] for each in prompt]
        body = await server.complete(prompt, max_tokens=3)
        assert [c["index"] for c in body["choices"]] == [0, 1, 2]
        assert [c["text"] for c in body["choices"]] == singles
        assert len(set(singles)) == 3
        assert body["usage"]["completion_tokens"] == 9
        stream = await server.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 3, "stream": True})
        texts = ["", "", ""]
        chunks = events(stream.text)
        for chunk in chunks:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert texts == singles
        assert ["routing" in chunk for chunk in chunks] == [False] * 8 + [True]


@pytest.mark.parametrize(
    ("stop", "text"), [("e", "bcd"), ("ef", "bcd"), (["zz", "def", "e"], "bcd"), (["hx"], "bcdefghi"), ("b", "")]
)
async def test_stop_strings_cut_the_text_across_tokens(tmp_path: Path, stop: object, text: str) -> None:
    async with serving(tmp_path) as server:
        body = await server.complete("a", max_tokens=8, stop=stop)
        assert body["choices"][0]["text"] == text
        assert body["choices"][0]["finish_reason"] == ("length" if text == "bcdefghi" else "stop")
        stream = await server.client.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 8, "stop": stop, "stream": True}
        )
        chunks = events(stream.text)
        assert "".join(c["choices"][0]["text"] for c in chunks) == text
        assert chunks[-1]["routing"] == body["routing"]
        assert len(chunks) == body["usage"]["completion_tokens"]
        await server.idle()
        assert server.services.admission.in_flight == 0


@pytest.mark.parametrize(
    ("min_tokens", "stop", "text"),
    [
        (3, "c", "bcdefghi"),  # complete too early, so it is text
        (3, ["c", "ef"], "bcd"),  # begins in the fourth token
        (3, "de", "bc"),  # begins in the third and is complete in the fourth: found, and cut out
        (4, "de", "bcdefghi"),
        (1, ["b", "bcx", "e"], "bcd"),  # "b" is held back for "bcx" and is no match when "c" comes
    ],
)
async def test_stop_strings_wait_for_the_least_number_of_tokens(
    tmp_path: Path, min_tokens: int, stop: object, text: str
) -> None:
    async with serving(tmp_path) as server:
        fields = {"prompt": "a", "max_tokens": 8, "min_tokens": min_tokens, "stop": stop}
        body = await server.complete(**fields)
        assert body["choices"][0]["text"] == text
        assert body["choices"][0]["finish_reason"] == ("length" if text == "bcdefghi" else "stop")
        chunks = events((await server.client.post("/v1/completions", json={**fields, "stream": True})).text)
        assert "".join(c["choices"][0]["text"] for c in chunks) == text


async def test_a_stopped_request_reports_measured_experts_and_counts_as_stopped(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        body = await server.complete("a", max_tokens=40, stop="cd", routing="balanced")
        assert body["routing"]["experts_per_token"] == 2.0
        assert body["usage"]["completion_tokens"] == 3
        samples = await server.metrics()
        assert samples['ladimo_request_success_total{finish_reason="stop",policy="balanced"}'] == 1
        assert not any(value for name, value in samples.items() if "abort" in name)


async def test_stop_token_ids_and_end_of_text(tmp_path: Path) -> None:
    stop_id = 68  # "e"; the runner's byte order begins at "!"
    async with serving(tmp_path, eos_token_ids=frozenset({66})) as server:
        stopped = await server.complete("a", max_tokens=9)
        assert (stopped["choices"][0]["finish_reason"], stopped["usage"]["completion_tokens"]) == ("stop", 2)
        ignored = await server.complete("a", max_tokens=9, ignore_eos=True)
        assert ignored["usage"]["completion_tokens"] == 9
        by_id = await server.complete("a", max_tokens=9, ignore_eos=True, stop_token_ids=[stop_id])
        assert (by_id["choices"][0]["finish_reason"], by_id["usage"]["completion_tokens"]) == ("stop", 4)


async def test_nulls_unknown_fields_and_neutral_values_are_taken(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        fields = {
            **dict.fromkeys(["stop", "seed", "temperature", "logprobs", "logit_bias", "routing", "suffix", "user"]),
            **{"n": 1, "best_of": 1, "echo": False, "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
            **{"response_format": {"type": "text"}, "do_sample": True, "nobody_knows": {"this": 1}},
        }
        assert (await server.complete("a", max_tokens=2, **fields))["choices"][0]["text"] == "bc"


async def test_models_tokens_version_and_page(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        models = (await server.client.get("/v1/models")).json()
        assert [m["id"] for m in models["data"]] == [MODEL, *(f"{MODEL}:{p}" for p in ("fast", "balanced", "quality", "full"))]
        assert (await server.client.get(f"/v1/models/{MODEL}:fast")).json() == models["data"][1]
        assert (await server.client.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"
        assert (await server.client.get(f"/v1/models/{MODEL}:other")).status_code == 404
        tokens = (await server.client.post("/tokenize", json={"prompt": "é!", "add_special_tokens": False})).json()
        assert tokens["count"] == 3
        assert tokens["max_model_len"] == CONTEXT
        assert (await server.client.post("/detokenize", json={"tokens": tokens["tokens"]})).json() == {"prompt": "é!"}
        info = (await server.client.get("/tokenizer_info")).json()
        assert (info["bos_token"], info["eos_token"]) == ("<|bos|>", "<|eos|>")
        assert "version" in (await server.client.get("/version")).json()
        page = await server.client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert not [line for line in page.text.splitlines() if "http://" in line or "https://" in line]
