"""Reads JSON in short steps, so that a large body never holds up other threads.

Python's own parser is one call of C, during which no other thread runs. For eight megabytes of small values it needs more than
a second. Here Python code goes from value to value, and other threads can run in between. C code reads only strings, numbers
and pieces of long lists of numbers.
"""

import json
import re
from json import JSONDecodeError
from typing import Any

MAX_DEPTH = 128
# The most names and values, not counting lists of numbers. The largest request that the wire models accept has about 40,000.
MAX_VALUES = 2**16
PIECE = 2**15  # characters of a list of numbers that are read in one call

_space = re.compile(r"[ \t\n\r]*").match
_without_nesting = re.compile(r'[^"\[\]{}]*').match
_decoder = json.JSONDecoder()


def read_json(body: bytes) -> Any:
    """The value of a JSON text. A byte order mark at its start is skipped.

    This is stricter than Python's parser. Raises ValueError for text that is not UTF-8, lone surrogates, a repeated name in an
    object (some readers take the first, others the last), more than MAX_DEPTH levels of nesting, and more than MAX_VALUES
    values.
    """
    text = body.decode("utf-8-sig")
    reader = _Reader(text)
    value, at = reader.value(_space(text, 0).end(), 0)  # type: ignore[union-attr]
    at = _space(text, at).end()  # type: ignore[union-attr]
    if at < len(text):
        raise JSONDecodeError("Extra data", text, at)
    return value


class _Reader:
    """Each method reads from position `at` of the text. It returns the value and the position after it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._num_values = 0
        self._may_have_surrogates = "\\u" in text

    def value(self, at: int, depth: int) -> tuple[Any, int]:
        self._count()
        match self._text[at : at + 1]:
            case "{":
                return self._object(at + 1, depth + 1)
            case "[":
                return self._array(at + 1, depth + 1)
            case '"':
                return self._string(at)
            case _:
                return _decoder.raw_decode(self._text, at)

    def _object(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        members: dict[str, Any] = {}
        at = self._enter(at, depth)
        if self._text[at : at + 1] == "}":
            return members, at + 1
        while True:
            if self._text[at : at + 1] != '"':
                raise JSONDecodeError("Expecting a name in double quotes", self._text, at)
            self._count()
            name, at = self._string(at)
            if name in members:
                raise ValueError(f"the name {name!r} is there twice in one object")
            at = self._skip_space(at)
            if self._text[at : at + 1] != ":":
                raise JSONDecodeError("Expecting ':'", self._text, at)
            members[name], at = self.value(self._skip_space(at + 1), depth)
            at, ended = self._separator(at, "}")
            if ended:
                return members, at

    def _array(self, at: int, depth: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        at = self._enter(at, depth)
        if self._text[at : at + 1] == "]":
            return items, at + 1
        while True:
            at = self._numbers(at, items)
            item, at = self.value(at, depth)
            items.append(item)
            at, ended = self._separator(at, "]")
            if ended:
                return items, at

    def _numbers(self, at: int, items: list[Any]) -> int:
        """Append the numbers, true, false and null that come next, as long as a comma follows them. Returns the position."""
        while True:
            end = _without_nesting(self._text, at, at + PIECE).end()  # type: ignore[union-attr]
            comma = self._text.rfind(",", at, end)
            if comma <= at:
                return at
            try:
                items += _decoder.decode(f"[{self._text[at:comma]}]")
            except JSONDecodeError as error:
                raise JSONDecodeError(error.msg, self._text, at + error.pos - 1) from None
            at = self._skip_space(comma + 1)

    def _string(self, at: int) -> tuple[str, int]:
        string: str
        string, at = _decoder.raw_decode(self._text, at)
        if self._may_have_surrogates and not string.isascii():
            string.encode()
        return string, at

    def _separator(self, at: int, closing: str) -> tuple[int, bool]:
        """The position of the next item, or the position after the end; and whether this is the end."""
        at = self._skip_space(at)
        match self._text[at : at + 1]:
            case ",":
                return self._skip_space(at + 1), False
            case mark if mark == closing:
                return at + 1, True
        raise JSONDecodeError(f"Expecting ',' or '{closing}'", self._text, at)

    def _enter(self, at: int, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep")
        return self._skip_space(at)

    def _skip_space(self, at: int) -> int:
        return _space(self._text, at).end()  # type: ignore[union-attr]

    def _count(self) -> None:
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise ValueError(f"there are more than {MAX_VALUES} names and values, lists of numbers aside")
