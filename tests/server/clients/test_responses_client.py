"""The official client's `responses`, unmodified, over a socket. It validates every answer and event against its own types."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.server.real import find_model, serving_model
from tests.server.serving import MODEL, Server, serving_http


@asynccontextmanager
async def strict_client(tmp_path: Path) -> AsyncIterator[tuple[openai.AsyncOpenAI, Server]]:
    async with (
        serving_http(tmp_path) as server,
        openai.AsyncOpenAI(
            base_url=f"{server.client.base_url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        yield client, server


async def test_it_creates_a_response(tmp_path: Path) -> None:
    async with strict_client(tmp_path) as (client, _):
        found = await client.responses.create(
            model=MODEL,
            input="hi",
            instructions="be brief",
            max_output_tokens=3,
            top_logprobs=1,
            service_tier="flex",
            metadata={"a": "b"},
            extra_body={"seed": 1},
        )
        assert found.output_text
        assert (found.status, found.service_tier, found.metadata) == ("incomplete", "flex", {"a": "b"})
        assert found.incomplete_details is not None
        assert found.incomplete_details.reason == "max_output_tokens"
        assert found.usage is not None
        assert found.usage.output_tokens == 3
        assert found.model_extra is not None
        assert found.model_extra["routing"]["policy"] == "fast"
        again = await client.responses.create(
            model=MODEL,
            input=[{"role": "user", "content": "hi"}, *found.output, {"role": "user", "content": "more"}],  # type: ignore[list-item]
            max_output_tokens=1,
        )
        assert again.usage is not None
        assert again.usage.input_tokens > 0


async def test_it_reads_raw_events(tmp_path: Path) -> None:
    async with strict_client(tmp_path) as (client, _):
        stream = await client.responses.create(model=MODEL, input="hi", max_output_tokens=3, top_logprobs=2, stream=True)
        kinds = [event.type async for event in stream]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.incomplete"


async def test_its_stream_helper_accumulates(tmp_path: Path) -> None:
    async with strict_client(tmp_path) as (client, _):
        stop = {"stop_token_ids": [*range(64)]}  # the answer counts up to the vocabulary's end and begins again
        whole = await client.responses.create(model=MODEL, input="hi", extra_body=stop)
        async with client.responses.stream(model=MODEL, input="hi", extra_body=stop) as stream:
            text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
            final = await stream.get_final_response()
        assert text == final.output_text == whole.output_text
        assert final.status == "completed"


async def test_its_sync_form(tmp_path: Path) -> None:
    def use(base_url: str) -> str:
        with openai.OpenAI(base_url=base_url, api_key="none", _strict_response_validation=True) as client:
            return client.responses.create(model=MODEL, input="hi", max_output_tokens=3).output_text

    async with serving_http(tmp_path) as server:
        assert await asyncio.to_thread(use, f"{server.client.base_url}/v1")


async def test_errors_are_its_own(tmp_path: Path) -> None:
    async with strict_client(tmp_path) as (client, server):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(model=MODEL, input="hi", previous_response_id="resp_1")
        assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "previous_response_id")
        release = server.hold_after(3)
        stream = await client.responses.create(model=MODEL, input="hi", max_output_tokens=20, stream=True)
        kinds = []

        async def read() -> None:
            async for event in stream:
                kinds.append(event.type)
                server.runner.fail_with = RuntimeError("broken")
                release.set()

        with pytest.raises(openai.APIError, match="engine has stopped"):
            await read()
        assert kinds[-1] == "response.failed"


class Answer(BaseModel):
    happy: bool
    colour: Literal["red", "green"]


async def test_it_parses_structured_output(moe_dir: Path) -> None:
    async with (
        serving_model(moe_dir) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", _strict_response_validation=True) as client,
    ):
        found = await client.responses.parse(model="model", input="hi", text_format=Answer, temperature=0)
        assert isinstance(found.output_parsed, Answer)
        async with client.responses.stream(model="model", input="hi", text_format=Answer, temperature=0) as stream:
            final = await stream.get_final_response()
        assert final.output_parsed == found.output_parsed


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    celsius: bool


async def test_it_calls_functions() -> None:
    async with (
        serving_model(find_model()) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", _strict_response_validation=True) as client,
    ):
        asked: dict[str, Any] = {
            "model": "model",
            "input": "Weather?",
            "tools": [openai.pydantic_function_tool(Weather)["function"] | {"type": "function"}],
            "tool_choice": {"type": "function", "name": "Weather"},
            "temperature": 0,
        }
        found = await client.responses.create(**asked)
        assert (found.status, len(found.output)) == ("completed", 1)
        call = found.output[0]
        assert call.type == "function_call"
        assert Weather.model_validate_json(call.arguments)
        async with client.responses.stream(**asked) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
        assert set(kinds[3:-3]) == {"response.function_call_arguments.delta"}
        assert kinds[-3:] == ["response.function_call_arguments.done", "response.output_item.done", "response.completed"]
        streamed = final.output[0]
        assert streamed.type == "function_call"
        assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        after = await client.responses.create(
            model="model",
            input=[{"role": "user", "content": "Weather?"}, call, result],
            tools=asked["tools"],
            tool_choice="none",
            max_output_tokens=5,
        )
        assert [item.type for item in after.output] == ["message"]


def test_langchain_over_responses() -> None:
    from langchain_openai import ChatOpenAI

    def use(url: str) -> None:
        model = ChatOpenAI(model="model", base_url=f"{url}/v1", api_key="none", use_responses_api=True, temperature=0)
        text = model.invoke("hi", max_tokens=5)
        assert text.usage_metadata["output_tokens"] == 5
        assert "".join(chunk.text for chunk in model.stream("hi", max_tokens=5)) == text.text
        found = model.with_structured_output(Answer, method="json_schema").invoke("hi")
        assert isinstance(found, Answer)
        calls = model.bind_tools([Weather], tool_choice="Weather").invoke("Weather?").tool_calls
        assert [call["name"] for call in calls] == ["Weather"]
        assert Weather.model_validate(calls[0]["args"])

    async def serve() -> None:
        async with serving_model(find_model()) as url:
            await asyncio.to_thread(use, url)

    asyncio.run(serve())
