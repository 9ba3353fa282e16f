"""The official client, unmodified, over a socket."""

import asyncio
from pathlib import Path

import openai
import pytest

from server.app import Access
from tests.server.serving import MODEL, Parts, serving_http


async def test_async_client_completes_and_streams(tmp_path: Path) -> None:
    async with (
        serving_http(tmp_path) as server,
        openai.AsyncOpenAI(base_url=f"{server.client.base_url}/v1", api_key="none") as client,
    ):
        assert [model.id for model in (await client.models.list()).data][0] == MODEL
        whole = await client.completions.create(model=MODEL, prompt="a", max_tokens=3, extra_body={"routing": "fast"})
        assert whole.choices[0].text == "bcd"
        assert whole.model_extra is not None
        assert whole.model_extra["routing"]["policy"] == "fast"
        stream = await client.completions.create(model=f"{MODEL}:fast", prompt="a", max_tokens=3, stream=True)
        assert [chunk.choices[0].text async for chunk in stream] == ["b", "c", "d"]
        scored = await client.completions.create(model=MODEL, prompt="a", max_tokens=1, logprobs=2, echo=True, n=2)
        assert [choice.text for choice in scored.choices] == ["ab", "ab"]
        assert scored.choices[1].logprobs is not None
        assert scored.choices[1].logprobs.text_offset == [0, 0, 1]
        talk = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=1, logprobs=True, top_logprobs=1, n=2
        )
        assert [choice.index for choice in talk.choices] == [0, 1]
        assert talk.choices[0].logprobs is not None
        assert talk.choices[0].logprobs.content is not None
        assert talk.choices[0].logprobs.content[0].top_logprobs[0].logprob == -0.5
        chat = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in chat]
        assert len(chunks) == 5  # three tokens, the finish reason, the usage
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 3


async def test_sync_client_completes_and_streams(tmp_path: Path) -> None:
    def use(base_url: str) -> tuple[str, str | None, str]:
        with openai.OpenAI(base_url=base_url, api_key="none") as client:
            text = client.completions.create(model=MODEL, prompt="a", max_tokens=3).choices[0].text
            messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
            chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3)
            stream = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3, stream=True)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return text, chat.choices[0].message.content, streamed

    async with serving_http(tmp_path) as server:
        text, whole, streamed = await asyncio.to_thread(use, f"{server.client.base_url}/v1")
        assert text == "bcd"
        assert whole == streamed


async def test_errors_become_the_client_s_classes(tmp_path: Path) -> None:
    parts = Parts(access=Access(api_keys=["right"]), max_queue=0)
    async with serving_http(tmp_path, parts, max_num_seqs=1) as server:
        base_url = f"{server.client.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="wrong") as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
        async with openai.AsyncOpenAI(base_url=base_url, api_key="right", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError) as unknown:
                await client.completions.create(model=MODEL, prompt="a", extra_body={"routing": "nope"})
            assert unknown.value.code == "unknown_policy"
            with pytest.raises(openai.BadRequestError) as wrong:
                await client.completions.create(model=MODEL, prompt="a", n=3)
            assert (wrong.value.code, wrong.value.param) == ("invalid_request", "n")
            server.runner.gate.clear()
            held = asyncio.create_task(client.completions.create(model=MODEL, prompt="a", max_tokens=3))
            await server.submitted(1)
            with pytest.raises(openai.RateLimitError) as full:
                await client.completions.create(model=MODEL, prompt="a")
            assert full.value.code == "queue_full"
            server.runner.gate.set()
            assert (await held).choices[0].text == "bcd"
            release = server.hold_after(2)
            stream = await client.completions.create(model=MODEL, prompt="a", max_tokens=60, stream=True)
            await anext(aiter(stream))
            server.runner.fail_with = RuntimeError("broken")
            release.set()
            with pytest.raises(openai.APIError, match="engine has stopped"):
                async for _ in stream:
                    pass
