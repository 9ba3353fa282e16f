"""Structured output: grammars that llguidance compiles, and their state while tokens are generated.

The HTTP layer checks and compiles a `Grammar`. The engine sees only its own protocol `TokenConstraint`.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import llguidance.hf
import numpy as np
from llguidance import LLMatcher, LLTokenizer, grammar_from
from numpy.typing import NDArray

from server.text.json_schema import readable


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Building a compiler is slow, so all requests share one.

    `tokenizer`: a transformers fast tokenizer. `vocab_size`: the model's. A ValueError of a method says what is wrong with the
    grammar in one line.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer: LLTokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(vocab_size, len(tokenizer)))
        self._vocab_size = vocab_size
        self._special = {name: tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens}

    def json_schema(self, schema: dict[str, Any]) -> "Grammar":
        """JSON text that follows the schema. An empty schema allows any JSON object. Raises ValueError."""
        source = json.dumps(readable(schema) if schema else {"type": "object"})
        # Only one spelling of white space: where blanks are allowed, a small model may add them for ever.
        return self._compile(partial(LLMatcher.grammar_from_json_schema, overrides={"whitespace_flexible": False}), source)

    def regex(self, pattern: str) -> "Grammar":
        """Text that matches the whole regular expression. Raises ValueError."""
        return self._compile(LLMatcher.grammar_from_regex, pattern)

    def choice(self, choices: Sequence[str]) -> "Grammar":
        """Exactly one of these texts. Raises ValueError."""
        if not choices or not all(choices):
            raise ValueError("choices must be a list of non-empty strings")
        rule = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        return self.lark(f"start: {rule}")

    def lark(self, source: str) -> "Grammar":
        """Text of a grammar in llguidance's dialect of Lark. Raises ValueError."""
        return self._compile(LLMatcher.grammar_from_lark, source)

    def literal(self, text: str) -> str:
        """A text as a Lark expression. The name of a special token in it stands for that token."""
        names = sorted(self._special, key=len, reverse=True)
        written, plain, at = [], "", 0
        while at < len(text):
            name = next((name for name in names if text.startswith(name, at)), None)
            if name is None:
                plain, at = plain + text[at], at + 1
                continue
            written += [json.dumps(plain)] if plain else []
            written.append(f"<[{self._special[name]}]>")
            plain, at = "", at + len(name)
        written += [json.dumps(plain)] if plain else []
        return f"({' '.join(written)})"

    def grammar(self, text: str) -> "Grammar":
        """Text of a grammar in GBNF or in llguidance's dialect of Lark. Raises ValueError."""
        return self._compile(partial(grammar_from, "gbnf"), text)

    def _compile(self, read: Callable[[str], str], source: str) -> "Grammar":
        try:
            matcher = LLMatcher(self._tokenizer, read(source), log_level=0)
        except (ValueError, RecursionError) as error:
            raise ValueError(_first_line(str(error))) from error
        if matcher.is_error():
            raise ValueError(_first_line(matcher.get_error()))
        return Grammar(matcher, self._vocab_size)


class Grammar:
    """A valid, compiled grammar. `start` makes the state for one sequence; it is fast even for a large grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def start(self) -> "GrammarState":
        """The state at the beginning of a text."""
        return GrammarState(self._matcher.deep_copy(), self._vocab_size)


class GrammarState:
    """The state of a grammar for one sequence. Implements the engine's `TokenConstraint`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def problem(self) -> str | None:
        """Why the grammar stopped before its text was complete; None if it did not.

        Some grammars need more work for one token than the library allows.
        """
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def allowed_tokens(self) -> NDArray[np.bool_]:
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits: NDArray[np.bool_] = np.unpackbits(words, bitorder="little")[: self._vocab_size].astype(np.bool_)
        assert bits.any(), self._matcher.get_error()
        return bits

    def advance(self, token_id: int) -> None:
        # The grammar ignores tokens after its text is complete: the end of text, or more with ignore_eos.
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)


def _first_line(text: str) -> str:
    return " ".join(text.split())[:200]
