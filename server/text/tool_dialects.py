"""How model families write tool calls: a JSON object with a name and arguments, and markup around it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The white space of JSON, which may stand between the parts of a call.
SPACES = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a model may call. `parameters`: the JSON schema of its arguments; None: it has no arguments. `strict`:
    the arguments must follow the schema even if the model is free to call the function or not."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The function in OpenAI's form, which chat templates expect."""
        parameters = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": parameters}}


@dataclass(frozen=True, slots=True)
class ToolDialect:
    """How one model family writes a call.

    opening: the markup before a call. bare: calls are written without the opening, and may begin at the start of any line.
    closing: the markup after a call. separator: the text between two calls. arguments: the JSON member with the arguments.
    """

    name: str
    opening: str
    closing: str
    separator: str
    arguments: str
    bare: bool

    @property
    def before(self) -> str:
        """The text before a call's JSON."""
        return "" if self.bare else f"{self.opening}\n"

    @property
    def after(self) -> str:
        """The text after a call's JSON."""
        return f"\n{self.closing}" if self.closing else ""

    def header(self, name: str) -> str:
        """A call's JSON up to its arguments. After the arguments only "}" is missing."""
        return f'{{"name": {json.dumps(name)}, "{self.arguments}": '

    def call(self, name: str, arguments: str) -> str:
        """A whole call with its markup. `arguments` is JSON text."""
        return f"{self.before}{self.header(name)}{arguments}}}{self.after}"


# Qwen2.5, Hermes and models trained on their format.
HERMES = ToolDialect("hermes", "<tool_call>", "</tool_call>", "\n", "arguments", bare=False)
# Llama 3.1 and later: JSON alone, or JSON after the special token for messages to a tool.
LLAMA3 = ToolDialect("llama3", "<|python_tag|>", "", "; ", "parameters", bare=True)
# Models without a format of their own: the format that the built-in prompt describes.
PLAIN_JSON = ToolDialect("json", "", "", "\n", "arguments", bare=True)

DIALECTS = {dialect.name: dialect for dialect in (HERMES, LLAMA3, PLAIN_JSON)}


def detect_dialect(chat_template: str) -> ToolDialect:
    """The dialect whose markup the chat template contains; plain JSON if there is none."""
    return next((each for each in DIALECTS.values() if each.opening and each.opening in chat_template), PLAIN_JSON)
