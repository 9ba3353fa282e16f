"""How families of models write calls of tools: one JSON object with a name and arguments, and markup around it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# White space between the parts of a call, which is JSON's.
SPACES = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a model may call. `parameters`: the JSON schema of its arguments; None: it takes none. `strict`: its
    arguments must follow the schema even where the model chooses freely whether to call it."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As chat templates know it, which is as OpenAI writes it."""
        parameters = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": parameters}}


@dataclass(frozen=True, slots=True)
class ToolDialect:
    """opening: the markup before a call. Where `bare`, a call is written without it, and may begin at the start of any line.
    closing: the markup after a call. separator: what stands between two calls. arguments: the name of that member."""

    name: str
    opening: str
    closing: str
    separator: str
    arguments: str
    bare: bool

    @property
    def before(self) -> str:
        """What is written before a call's JSON."""
        return "" if self.bare else f"{self.opening}\n"

    @property
    def after(self) -> str:
        """What is written after it."""
        return f"\n{self.closing}" if self.closing else ""

    def header(self, name: str) -> str:
        """A call's JSON up to its arguments; "}" follows them."""
        return f'{{"name": {json.dumps(name)}, "{self.arguments}": '

    def call(self, name: str, arguments: str) -> str:
        """A whole call. `arguments` is JSON text."""
        return f"{self.before}{self.header(name)}{arguments}}}{self.after}"


# Qwen2.5, Hermes and those who learned from them.
HERMES = ToolDialect("hermes", "<tool_call>", "</tool_call>", "\n", "arguments", bare=False)
# Llama 3.1 and later: JSON alone, or after the token that begins a message to a tool.
LLAMA3 = ToolDialect("llama3", "<|python_tag|>", "", "; ", "parameters", bare=True)
# Models that were taught no form: the one that the built-in prompt describes.
PLAIN_JSON = ToolDialect("json", "", "", "\n", "arguments", bare=True)

DIALECTS = {dialect.name: dialect for dialect in (HERMES, LLAMA3, PLAIN_JSON)}


def detect_dialect(chat_template: str) -> ToolDialect:
    """The dialect that a chat template teaches."""
    return next((each for each in DIALECTS.values() if each.opening and each.opening in chat_template), PLAIN_JSON)
