"""Tools through the client libraries that people use, unmodified, over a socket: what they ask for by default is answered.

The model is SmolLM2 where LADIMO_SMOLLM2 or models/smollm2 has it, the demo's dense model elsewhere. Neither can be relied on
to choose a call, so calls are forced; the server makes them valid.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from threading import Thread
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.server.real import find_model, serving_model


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    celsius: bool
    days: list[Literal["today", "tomorrow"]]


QUESTION = "What will the weather be in Paris?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
TOOL: Any = openai.pydantic_function_tool(Weather)
# The answer ends: a list of words may be long, but not longer than this.
LIMITS: dict[str, Any] = {"temperature": 0, "max_tokens": 400}


def only(items: Sequence[Any] | None) -> Any:
    assert items is not None
    (item,) = items
    return item


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server on a thread of its own, as clients that block need it."""
    loop, stack = asyncio.new_event_loop(), AsyncExitStack()
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def wait(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(120)

    try:
        yield wait(stack.enter_async_context(serving_model(find_model()))) + "/v1"
    finally:
        wait(stack.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """Connections and an event loop that are closed after the test; these libraries leave theirs to the end of the process."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    with httpx.Client(timeout=60) as client:
        yield client
    asyncio.set_event_loop(None)
    loop.close()


def test_openai_parses_tools_whole_and_streamed(url: str) -> None:
    fields: dict[str, Any] = {"model": "model", "messages": MESSAGES, "tools": [TOOL], "tool_choice": "required", **LIMITS}
    with openai.OpenAI(base_url=url, api_key="none") as client:
        whole = client.chat.completions.parse(**fields, parallel_tool_calls=False)
        assert whole.choices[0].finish_reason == "tool_calls"
        assert whole.choices[0].message.content is None
        call = only(whole.choices[0].message.tool_calls)
        assert isinstance(call.function.parsed_arguments, Weather)
        with client.chat.completions.stream(**fields, parallel_tool_calls=False) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert kinds.count("tool_calls.function.arguments.delta") > 3
        assert kinds.count("tool_calls.function.arguments.done") == 1
        streamed = only(final.choices[0].message.tool_calls)
        assert streamed.function.parsed_arguments == call.function.parsed_arguments
        # The call and its result go back; the next answer may be a text.
        talk = [*MESSAGES, whole.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        answer = client.chat.completions.create(model="model", messages=talk, tools=[TOOL], temperature=0, max_tokens=8)
        assert answer.choices[0].message.content


def test_openai_names_a_function_and_parses_a_schema(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none") as client:
        choice: Any = {"type": "function", "function": {"name": "Weather"}}
        named = client.chat.completions.parse(model="model", messages=MESSAGES, tools=[TOOL], tool_choice=choice, **LIMITS)
        call = only(named.choices[0].message.tool_calls)
        assert isinstance(call.function.parsed_arguments, Weather)
        parsed = client.chat.completions.parse(model="model", messages=MESSAGES, response_format=Weather, **LIMITS)
        assert isinstance(parsed.choices[0].message.parsed, Weather)
        either = client.chat.completions.parse(
            model="model", messages=MESSAGES, response_format=Weather, tools=[TOOL], parallel_tool_calls=False, **LIMITS
        )
        message = either.choices[0].message
        found = message.tool_calls[0].function.parsed_arguments if message.tool_calls else message.parsed
        assert isinstance(found, Weather)


@pytest.mark.parametrize("method", ["default", "function_calling", "json_schema"])
def test_langchain_structured_output(url: str, http: httpx.Client, method: str) -> None:
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(base_url=url, api_key="none", model="model", http_client=http, temperature=0, max_tokens=400)
    structured = llm.with_structured_output(Weather, **({} if method == "default" else {"method": method}))
    assert isinstance(structured.invoke(QUESTION), Weather)


def test_langchain_binds_tools(url: str, http: httpx.Client) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(base_url=url, api_key="none", model="model", http_client=http, temperature=0, max_tokens=400)
    for choice in ("any", "Weather"):
        bound = llm.bind_tools([Weather], tool_choice=choice, parallel_tool_calls=False)
        answer = bound.invoke(QUESTION)
        (call,) = answer.tool_calls
        assert call["name"] == "Weather"
        Weather.model_validate(call["args"])
        merged: Any = None
        for chunk in bound.stream(QUESTION):
            merged = chunk if merged is None else merged + chunk
        assert [(each["name"], each["args"]) for each in merged.tool_calls] == [("Weather", call["args"])]
        talk = [HumanMessage(QUESTION), answer, ToolMessage("sunny", tool_call_id=str(call["id"]))]
        again = llm.bind_tools([Weather]).invoke(talk, max_tokens=8)
        assert again.content or again.tool_calls


@pytest.mark.long
def test_litellm_completes_with_tools(url: str, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask a public host for prices
    import litellm

    monkeypatch.setattr(litellm, "client_session", http)
    fields: dict[str, Any] = {"model": "openai/model", "api_base": url, "api_key": "none", "messages": MESSAGES, **LIMITS}
    fields |= {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    whole = litellm.completion(**fields)
    assert whole.choices[0].finish_reason == "tool_calls"
    (call,) = whole.choices[0].message.tool_calls
    Weather.model_validate_json(call.function.arguments)
    chunks = list(litellm.completion(**fields, stream=True))
    rebuilt: Any = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    (streamed,) = rebuilt.choices[0].message.tool_calls
    assert (streamed.function.name, streamed.function.arguments) == ("Weather", call.function.arguments)
    parsed = litellm.completion(
        **{**fields, "tools": None, "tool_choice": None, "parallel_tool_calls": None}, response_format=Weather
    )
    Weather.model_validate_json(parsed.choices[0].message.content)


@pytest.mark.long
def test_litellm_knows_a_prompt_that_is_too_long(url: str, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    monkeypatch.setattr(litellm, "client_session", http)
    fields: dict[str, Any] = {"model": "openai/model", "api_base": url, "api_key": "none", "num_retries": 0}
    long = [{"role": "user", "content": "word " * 300_000}]
    for more in ({"messages": long}, {"messages": MESSAGES, "max_tokens": 10**7}):
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(**fields, **more)


def test_llamaindex_predicts_structures(url: str, http: httpx.Client) -> None:
    from llama_index.core.prompts import PromptTemplate
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(
        model="model",
        api_base=url,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        http_client=http,
        temperature=0,
        max_tokens=400,
    )
    weather = llm.structured_predict(Weather, PromptTemplate("What will the weather be in {city}?"), city="Paris")
    assert isinstance(weather, Weather)
