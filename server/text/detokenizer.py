"""Token ids into text as they come: characters that need several tokens are held back, stop strings are cut out."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
# No character of UTF-8 has more than four bytes, so three tokens may wait for a fourth.
MAX_INCOMPLETE = 3
# Output that never becomes valid text is passed on as it is after this many tokens.
MAX_HELD_TOKENS = 32
PROMPT_CONTEXT_TOKENS = 4


class Detokenizer:
    """One sequence's text, piece by piece. The pieces, `flush` included, join to the decoded text.

    Each step decodes a short window that begins one settled piece back, because decoders treat the first token of a text
    specially (SentencePiece drops its leading space). `prompt_ids` is what the output continues.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._sent = 0  # characters of the window's text that are out
        self._start_window(list(prompt_ids[_boundary(decode, prompt_ids) :]))
        # A character that began in the prompt belongs to the output that completes it.
        self._sent -= _incomplete(decode(self._window)) if prompt_ids else 0

    def push(self, token_id: int) -> str:
        """The text that this token settles; may be empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        held = _incomplete(text)
        settled = len(text) - held
        piece = text[self._sent : settled]
        self._sent = max(self._sent, settled)
        if held and len(self._window) - self._context > MAX_HELD_TOKENS:
            piece += self.flush()
            self._start_window([])
        elif not held:
            self._start_window(self._window[self._context :])
        return piece

    def flush(self) -> str:
        """What was still held back when the sequence ended."""
        text = self._decode(self._window)
        piece = text[self._sent :]
        self._sent = len(text)
        return piece

    def _start_window(self, context: list[int]) -> None:
        """Go on after `context`, whose text is out already."""
        self._window, self._context = context, len(context)
        self._sent = len(self._decode(context)) if context else 0


def _boundary(decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]) -> int:
    """Where the prompt's last few tokens begin: not within a character, whose rest alone would decode to another text."""
    latest = max(0, len(prompt_ids) - PROMPT_CONTEXT_TOKENS)
    for start in range(latest, max(0, latest - MAX_HELD_TOKENS), -1):
        # Tokens have a byte at least: the last character of four of them shows whole if it is whole.
        if not decode(prompt_ids[max(0, start - MAX_INCOMPLETE - 1) : start]).endswith(REPLACEMENT):
            return start
    return max(0, latest - MAX_HELD_TOKENS)


def _incomplete(text: str) -> int:
    """Characters at the end of a decoded text that the next tokens may still turn into another one."""
    return min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_INCOMPLETE)


class StopStrings:
    """Cuts a text at the stop string that is complete first, however the text is divided into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string ended it (then the rest is dropped)."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        # The match that ends first; of those that end together, the one that begins first.
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def flush(self) -> str:
        """What looked like the beginning of a stop string and was none."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
