"""Prepares conversations with tools for the checkpoint's chat template.

A template that knows tools gets tools and calls as data. For any other template, a system text lists the functions and explains
how to call them. Earlier calls become messages of the assistant, and earlier results become messages of the user.
"""

import json
from collections.abc import Sequence
from typing import Any

from server.text.tool_dialects import Function, ToolDialect

ChatMessage = dict[str, Any]

INSTRUCTIONS = """\
You can call functions. Each of the following lines describes one: its name, what it does, and the JSON schema of its arguments.
{functions}
To call a function, write nothing but this, with its name and arguments: {call}
Call several by writing one after the other. The results follow in the next message. Without a call, answer in plain text."""


def for_template(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Change messages in OpenAI's form as templates with tools expect them.

    Arguments become objects, null content becomes an empty string, and each result gets the name of its function.
    """
    names: dict[str, str] = {}
    shaped = []
    for message in messages:
        shape = {**message, "content": message.get("content") or ""}
        if message.get("tool_calls"):
            shape["tool_calls"] = [_call_for_template(call) for call in message["tool_calls"]]
            names |= {call["id"]: call["function"]["name"] for call in message["tool_calls"]}
        name = names.get(message.get("tool_call_id", ""))
        if name is not None:
            shape.setdefault("name", name)
        shaped.append(shape)
    return shaped


def as_plain_messages(
    messages: Sequence[ChatMessage], functions: Sequence[Function], dialect: ToolDialect
) -> list[ChatMessage]:
    """The same conversation as plain messages, for a template that does not know tools."""
    plain: list[ChatMessage] = []
    results: list[str] = []  # joined into one message, because many templates require turns that alternate
    for message in for_template(messages):
        if message["role"] == "tool":
            results.append(f"Result of {message.get('name', 'the function')}: {message['content']}")
            continue
        if results:
            plain.append({"role": "user", "content": "\n".join(results)})
            results = []
        calls = [_call_text(call["function"], dialect) for call in message.pop("tool_calls", ())]
        content = "\n".join(part for part in (message["content"], dialect.separator.join(calls)) if part)
        plain.append({**message, "content": content})
    if results:
        plain.append({"role": "user", "content": "\n".join(results)})
    return _instructed(plain, functions, dialect) if functions else plain


def _instructed(messages: list[ChatMessage], functions: Sequence[Function], dialect: ToolDialect) -> list[ChatMessage]:
    lines = "\n".join(json.dumps(each.to_dict()["function"], ensure_ascii=False) for each in functions)
    text = INSTRUCTIONS.format(functions=lines, call=dialect.call("NAME", "{...}"))
    if messages[0]["role"] in ("system", "developer"):
        first, *rest = messages
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, *messages]


def _call_for_template(call: dict[str, Any]) -> dict[str, Any]:
    """Parse the arguments of a call. Models sometimes write broken arguments: if they are not a JSON object, they stay text."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        arguments = None
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _call_text(function: dict[str, Any], dialect: ToolDialect) -> str:
    arguments = function["arguments"]
    return dialect.call(
        function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    )
