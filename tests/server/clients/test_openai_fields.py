"""Every field that the official client can send is known here: honoured, declared to change nothing, or refused by its name."""

from pathlib import Path
from typing import Any

import openai.types.chat as chat
import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.shared_params import response_format_json_schema
from pydantic import BaseModel

from server.api.fields.completions import ChatCompletionRequest, CompletionRequest, Message, StreamOptions, TextPart
from server.api.fields.constraints import JsonSchemaFormat, ResponseFormat
from tests.server.serving import Parts, serving

CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
MESSAGES = [
    chat.ChatCompletionSystemMessageParam,
    chat.ChatCompletionDeveloperMessageParam,
    chat.ChatCompletionUserMessageParam,
    chat.ChatCompletionAssistantMessageParam,
    chat.ChatCompletionToolMessageParam,
]


@pytest.mark.parametrize(
    ("params", "model"),
    [
        (text_params.CompletionCreateParamsNonStreaming, CompletionRequest),
        (text_params.CompletionCreateParamsStreaming, CompletionRequest),
        (chat_params.CompletionCreateParamsNonStreaming, ChatCompletionRequest),
        (chat_params.CompletionCreateParamsStreaming, ChatCompletionRequest),
        (chat.ChatCompletionStreamOptionsParam, StreamOptions),
        (chat.ChatCompletionContentPartTextParam, TextPart),
        (response_format_json_schema.ResponseFormatJSONSchema, ResponseFormat),
        (response_format_json_schema.JSONSchema, JsonSchemaFormat),
        *((params, Message) for params in MESSAGES),
    ],
)
def test_every_field_is_declared(params: type[dict[str, Any]], model: type[BaseModel]) -> None:
    declared = {field.alias or name for name, field in model.model_fields.items()}
    assert set(params.__annotations__) - declared == set()


async def test_labels_and_hints_pass_even_strict_and_what_asks_for_more_is_refused(tmp_path: Path) -> None:
    labels: dict[str, Any] = {
        "metadata": {"a": "b"},
        "safety_identifier": "u1",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {},
        "store": False,
    }
    async with serving(tmp_path, Parts(strict_fields=True)) as server:
        reply = await server.client.post("/v1/chat/completions", json={**CHAT, **labels})
        assert reply.status_code == 200, reply.text
        for name, value in {"moderation": {}, "store": True, "nobody_knows": 1}.items():
            refused = await server.client.post("/v1/chat/completions", json={**CHAT, name: value})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == name
