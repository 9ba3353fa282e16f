"""Finds tool calls in a model's text while it is generated.

No text is lost: text that only looks like a call is returned as text. White space beside a call belongs to its markup.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from server.text.tool_dialects import SPACES, ToolDialect

BRACKETS = {"}": "{", "]": "["}
# The first characters of a JSON text decide whether it can be a call. This is longer than any header.
MAX_START = 160


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A part of call number `index` of the answer. The first piece of a call has its `name`. The arguments of all its pieces,
    joined in order, are JSON text."""

    index: int
    name: str | None
    arguments: str


Piece = str | CallPiece


class _Place(Enum):
    TEXT = "outside of calls"
    CALL = "in what may be a call"
    ARGUMENTS = "in arguments that go out as they come"
    BRACE = "before the brace that ends such a call"
    AFTER = "after a call"


class ToolParser:
    """Parses one answer. `push` and `flush` return its text and calls in order, however the text is divided into pieces.

    names: the functions that may be called. constrained: a grammar makes calls begin exactly as `ToolDialect.header` says, so
    their arguments are returned as they come. Otherwise a call is returned whole, when it is complete and valid. forced: the
    answer consists of constrained calls only. single: the answer ends with its first call (see `done`).
    """

    def __init__(
        self,
        dialect: ToolDialect,
        names: Collection[str],
        *,
        constrained: bool = False,
        forced: bool = False,
        single: bool = False,
    ) -> None:
        assert dialect.opening.rfind(dialect.opening[:1]) <= 0  # so that `_step_text` need not look back
        self._dialect, self._names, self._forced, self._single = dialect, frozenset(names), forced, single
        headers = {_without_spaces(dialect.header(name)): name for name in names}
        self._headers = headers if constrained or forced else {}
        self._starts = list(self._headers) or _starts(names)
        self._brackets = {start[0] for start in self._starts}
        self._place = _Place.TEXT
        self._space = ""  # white space that was held back; it belongs to a call if one follows
        self._marker = ""  # the beginning of possible markup, held back
        self._closing = ""  # the markup that may still follow a call
        self._call: list[str] = []  # the JSON of a possible call, held back
        self._scan = _JsonScan()
        self._line_start = True
        self._pieces: list[Piece] = []
        self._num_calls = 0

    @property
    def done(self) -> bool:
        """Whether the answer has ended with its only call."""
        return self._single and self._num_calls > 0 and self._place is _Place.AFTER

    def push(self, text: str) -> list[Piece]:
        """Take the next piece of text. Returns the text and calls that are certain now."""
        for char in text:
            if self.done:
                break
            self._step(char)
        return self._take()

    def flush(self) -> list[Piece]:
        """Return what was held back when the answer ended. An incomplete call becomes text."""
        if self._place in (_Place.TEXT, _Place.CALL, _Place.AFTER):
            self._not_a_call()
        return self._take()

    def _step(self, char: str) -> None:
        match self._place:
            case _Place.TEXT:
                self._step_text(char)
            case _Place.CALL:
                self._step_call(char)
            case _Place.ARGUMENTS:
                self._step_arguments(char)
            case _Place.BRACE:
                if char not in SPACES:
                    self._end_call()
                    if char != "}":  # another constraint allowed the same header, see `_step_arguments`
                        self._step(char)
            case _Place.AFTER:
                self._step_after(char)

    def _step_text(self, char: str) -> None:
        opening = self._dialect.opening
        if opening.startswith(self._marker + char):
            self._marker += char
            if self._marker == opening:
                self._begin_call()
        elif self._marker:
            self._not_a_call()
            self._step_text(char)
        elif char in SPACES:
            self._space += char
            self._line_start = self._line_start or char == "\n"
        elif self._dialect.bare and self._line_start and char in self._brackets:
            self._begin_call()
            self._step_call(char)
        else:
            self._say(self._space + char)
            self._space = ""

    def _step_call(self, char: str) -> None:
        if not self._scan.push(char) or not self._scan.may_begin(self._starts):
            self._not_a_call()
            self._step_text(char)
            return
        self._call.append(char)
        if char == ":" and (name := self._headers.get(self._scan.start)) is not None:
            self._add_call(name, "")
            self._place, self._scan = _Place.ARGUMENTS, _JsonScan()
        elif self._scan.complete:
            calls = [] if self._headers else _read_calls("".join(self._call), self._names)
            if not calls:
                self._not_a_call()
                return
            for name, arguments in calls[: 1 if self._single else None]:
                self._add_call(name, arguments)
            self._end_call()

    def _step_arguments(self, char: str) -> None:
        if not self._scan.push(char):  # another constraint of the answer allows the same header
            self._end_call()
            self._step(char)
            return
        if not self._scan.start:
            return  # white space before the arguments
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, CallPiece):
            self._pieces[-1] = replace(last, arguments=last.arguments + char)
        else:
            self._pieces.append(CallPiece(self._num_calls - 1, None, char))
        if self._scan.complete:
            self._place = _Place.BRACE

    def _step_after(self, char: str) -> None:
        if self._closing.startswith(self._marker + char):
            self._marker += char
            if self._marker == self._closing:
                self._closing = self._marker = ""
        elif self._marker or char not in SPACES:
            marker, self._marker, self._place = self._marker, "", _Place.TEXT
            for each in marker + char:
                self._step(each)

    def _begin_call(self) -> None:
        self._place, self._scan = _Place.CALL, _JsonScan()

    def _add_call(self, name: str, arguments: str) -> None:
        self._pieces.append(CallPiece(self._num_calls, name, arguments))
        self._num_calls += 1

    def _end_call(self) -> None:
        self._space, self._marker, self._call = "", "", []
        self._closing = self._dialect.closing or self._dialect.separator.strip()
        self._place, self._line_start = _Place.AFTER, True

    def _not_a_call(self) -> None:
        """Add what has been held back to the pieces, as text."""
        self._say(self._space + self._marker + "".join(self._call))
        self._place, self._space, self._marker, self._call = _Place.TEXT, "", "", []

    def _say(self, text: str) -> None:
        if not text or self._forced:
            return
        self._line_start = text.endswith("\n")
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, str):
            self._pieces[-1] = last + text
        else:
            self._pieces.append(text)

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces


class _JsonScan:
    """Finds the end of a JSON object or array. Does not check whether the JSON is valid.

    start: its first characters, at most MAX_START, without white space outside of strings.
    """

    def __init__(self) -> None:
        self.start = ""
        self.complete = False
        self._settled = False
        self._open: list[str] = []
        self._in_string = self._escaped = False

    def push(self, char: str) -> bool:
        """Add a character. False if the text can no longer become a JSON object or array."""
        if len(self.start) < MAX_START and (self._in_string or char not in SPACES):
            self.start += char
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
            return char >= " "
        if char in "{[":
            self._open.append(char)
        elif char in "}]":
            if not self._open or self._open.pop() != BRACKETS[char]:
                return False
            self.complete = not self._open
        elif char == '"':
            self._in_string = True
        return bool(self._open) or self.complete or char in SPACES

    def may_begin(self, starts: Collection[str]) -> bool:
        """Whether the text begins with one of `starts`, or may still do so."""
        if not self._settled:
            self._settled = self.start.startswith(tuple(starts))
        return self._settled or any(start.startswith(self.start) for start in starts)


def _without_spaces(header: str) -> str:
    return header.replace(" ", "")


def _starts(names: Collection[str]) -> list[str]:
    """The ways in which the JSON of calls can begin, without white space. They exclude most other JSON early."""
    members = [f'"name":{json.dumps(name)}' for name in names]
    members += ['"type":"function"', '"function":', '"arguments":', '"parameters":', '"id":']
    return [bracket + member for bracket in ("{", "[{") for member in members]


def _read_calls(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """Read a JSON text as a call or a list of calls. Returns names and arguments; empty if it is neither."""
    try:
        value = json.loads(text)
        calls = [_read_call(each, names) for each in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return []
    return calls


def _read_call(value: Any, names: Collection[str]) -> tuple[str, str]:
    """The name of the called function and its arguments as JSON text. Raises ValueError if `value` is not a call."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise ValueError("not an object")
    name = value.get("name", value.get("function"))
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        raise ValueError("not a call")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    # Half of a surrogate pair cannot be written in UTF-8, but its JSON escape can.
    return name, text if text.isprintable() else json.dumps(arguments)
