"""Nobody's text holds up another's: long ones have their own lane, keep no lock, and are bounded."""

import asyncio
import threading
from pathlib import Path

from server.api.fields.completions import MAX_TEXT
from server.text.lanes import SHORT, Lanes
from server.text.tokenizer import MAX_CHARACTERS_PER_TOKEN, Tokenizer
from tests.server.api.test_chat_prompts import DEMO
from tests.server.serving import CONTEXT, serving


async def test_short_texts_do_not_wait_for_long_ones() -> None:
    lanes, release = Lanes(), threading.Event()
    long = [asyncio.create_task(lanes.run(release.wait, SHORT + 1)) for _ in range(5)]
    await asyncio.sleep(0)
    try:
        async with asyncio.timeout(30):
            assert await lanes.run(lambda: "short", SHORT) == "short"
        assert not any(task.done() for task in long)
    finally:
        release.set()
        await asyncio.gather(*long)
        lanes.close()


async def test_the_event_loop_turns_while_a_long_text_is_encoded_and_decoded() -> None:
    tokenizer = Tokenizer(DEMO)

    async def turns_during(task: "asyncio.Task[object]") -> int:
        turns = 0
        while not task.done():
            await asyncio.sleep(0.001)
            turns += 1
        return turns

    encoding = asyncio.create_task(tokenizer.encode("the quick brown fox " * (MAX_TEXT // 20)))
    assert await turns_during(encoding) > 10
    decoding = asyncio.create_task(tokenizer.detokenize(encoding.result() * 2))
    assert await turns_during(decoding) > 3
    tokenizer.close()


async def test_texts_are_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        most = server.services.language.tokenizer.most_characters(CONTEXT)
        assert most == CONTEXT * min(len("<|bos|>"), MAX_CHARACTERS_PER_TOKEN)
        for path, body, status, code, param in [
            ("/tokenize", {"prompt": "x" * MAX_TEXT}, 200, None, None),
            ("/tokenize", {"prompt": "x" * (MAX_TEXT + 1)}, 400, "invalid_request", "prompt"),
            ("/tokenize", {"messages": [{"role": "user", "content": "x" * MAX_TEXT}] * 2}, 400, "invalid_request", "messages"),
            ("/detokenize", {"tokens": [7] * MAX_TEXT}, 200, None, None),
            ("/detokenize", {"tokens": [7] * (MAX_TEXT + 1)}, 400, "invalid_request", "tokens"),
            ("/v1/completions", {"prompt": "x" * (most + 1)}, 400, "context_length_exceeded", "prompt"),
            ("/v1/completions", {"prompt": ["x", "x" * most]}, 400, "context_length_exceeded", "prompt[1]"),
        ]:
            reply = await server.client.post(path, json=body)
            assert reply.status_code == status, reply.text[:300]
            if code is not None:
                assert (reply.json()["error"]["code"], reply.json()["error"]["param"]) == (code, param)


async def test_every_way_to_exceed_the_context_says_so_in_openai_s_words(tmp_path: Path) -> None:
    phrase = f"This model's maximum context length is {CONTEXT} tokens"
    async with serving(tmp_path) as server:
        for path, body in [
            ("/v1/completions", {"prompt": "x" * CONTEXT}),
            ("/v1/completions", {"prompt": "x" * 5000}),
            ("/v1/completions", {"prompt": [5] * CONTEXT}),
            ("/v1/completions", {"prompt": [5] * CONTEXT, "echo": True, "max_tokens": 0}),
            ("/v1/completions", {"prompt": "x", "max_tokens": CONTEXT}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * CONTEXT}]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 5000}]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": CONTEXT}),
        ]:
            error = (await server.client.post(path, json=body)).json()["error"]
            assert error["code"] == "context_length_exceeded"
            assert error["message"].startswith(phrase)
