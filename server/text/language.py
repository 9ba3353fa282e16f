"""The parts of a model that read and write text."""

from dataclasses import dataclass

from server.text.grammar import GrammarCompiler
from server.text.tokenizer import Tokenizer
from server.text.tool_dialects import ToolDialect


@dataclass(frozen=True, slots=True)
class Language:
    """The tokenizer, the form of the model's tool calls, and the compiler of grammars for structured output."""

    tokenizer: Tokenizer
    tool_dialect: ToolDialect
    grammars: GrammarCompiler
