"""The text of an answer as the client gets it: without tool calls, and cut at the first stop string."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.text.detokenizer import StopStrings
from server.text.tool_parsers import CallPiece, Piece, ToolParser

# The finish reason of an answer with tool calls, in place of `stop`.
TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class CallDelta:
    """An addition to call number `index` of an answer. The first delta of a call has its id and name.

    The arguments of all deltas of a call, joined in order, are JSON text.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Shown:
    """The text and calls to send now. `ended`: the answer ends here, even if the model would go on."""

    text: str = ""
    calls: tuple[CallDelta, ...] = ()
    ended: bool = False


class AnswerText:
    """Splits an answer into text and tool calls as it comes. `parser` None: there are no tools.

    Stop strings are found in text only, never inside a call. `called`: the answer has had a call.
    """

    def __init__(self, stops: Sequence[str], parser: ToolParser | None = None) -> None:
        self.called = False
        self._stops, self._parser = StopStrings(stops), parser

    def push(self, piece: str, early: bool = False) -> Shown:
        """Take the next piece of text and return what to send now. `early`: no stop string may end the answer yet."""
        if self._parser is None:
            text, stopped = self._stops.push(piece, early)
            return Shown(text, ended=stopped)
        shown = self._read(self._parser.push(piece), early)
        return Shown(shown.text, shown.calls, shown.ended or self._parser.done)

    def flush(self) -> Shown:
        """Return what was still held back. Called once, when the model has ended the answer."""
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
    """Join the deltas of each call into one."""
    calls: dict[int, CallDelta] = {}
    for delta in deltas:
        first = calls.get(delta.index)
        arguments = delta.arguments if first is None else first.arguments + delta.arguments
        begun = first or delta
        calls[delta.index] = CallDelta(begun.index, begun.id, begun.name, arguments)
    return tuple(calls.values())
