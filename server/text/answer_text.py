"""An answer's text as its reader gets it: cut at a stop string, calls of tools taken out of it."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.text.detokenizer import StopStrings
from server.text.tool_parsers import CallPiece, Piece, ToolParser

# The finish reason, in place of `stop`, of an answer that calls.
TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is added to call number `index` of an answer. A call's first delta has its id and its name; the arguments of all
    of them join to JSON text."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Shown:
    """What may be shown now. `ended`: the answer ends here, whatever the model would say next."""

    text: str = ""
    calls: tuple[CallDelta, ...] = ()
    ended: bool = False


class AnswerText:
    """`parser` None: there is nothing to call. Stop strings do not look into calls."""

    def __init__(self, stops: Sequence[str], parser: ToolParser | None = None) -> None:
        self.called = False
        self._stops, self._parser = StopStrings(stops), parser

    def push(self, piece: str, early: bool = False) -> Shown:
        """`early`: no stop string may end the answer yet."""
        if self._parser is None:
            text, stopped = self._stops.push(piece, early)
            return Shown(text, ended=stopped)
        shown = self._read(self._parser.push(piece), early)
        return Shown(shown.text, shown.calls, shown.ended or self._parser.done)

    def flush(self) -> Shown:
        """What was still held back when the model ended the answer."""
        shown = Shown() if self._parser is None else self._read(self._parser.flush())
        return shown if shown.ended else Shown(shown.text + self._stops.flush(), shown.calls)

    def _read(self, pieces: Iterable[Piece], early: bool = False) -> Shown:
        shown, calls, ended = "", list[CallDelta](), False
        for piece in pieces:
            if isinstance(piece, CallPiece):
                shown += self._stops.flush()
                call_id = None if piece.name is None else f"call_{uuid.uuid4().hex[:24]}"
                calls.append(CallDelta(piece.index, call_id, piece.name, piece.arguments))
                self.called = True
            else:
                text, ended = self._stops.push(piece, early)
                shown += text
            if ended:
                break
        return Shown(shown, tuple(calls), ended)


def join_calls(deltas: Iterable[CallDelta]) -> tuple[CallDelta, ...]:
    """Each call's deltas as one."""
    calls: dict[int, CallDelta] = {}
    for delta in deltas:
        first = calls.get(delta.index)
        arguments = delta.arguments if first is None else first.arguments + delta.arguments
        begun = first or delta
        calls[delta.index] = CallDelta(begun.index, begun.id, begun.name, arguments)
    return tuple(calls.values())
