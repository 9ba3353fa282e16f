"""How the served model reads and writes."""

from dataclasses import dataclass

from server.text.grammar import GrammarCompiler
from server.text.tokenizer import Tokenizer
from server.text.tool_dialects import ToolDialect


@dataclass(frozen=True, slots=True)
class Language:
    """Texts and chats as tokens, how the model writes calls of tools, and what constrains its answers."""

    tokenizer: Tokenizer
    tool_dialect: ToolDialect
    grammars: GrammarCompiler
