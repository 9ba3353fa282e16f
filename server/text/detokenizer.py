"""Token ids into text as they come: characters that need several tokens are held back, stop strings are cut out."""

import codecs
from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
# No character of UTF-8 has more than four bytes, so that of one whose last bytes are missing there are at most three.
MAX_INCOMPLETE = 3
PROMPT_CONTEXT_TOKENS = 4

_utf8 = codecs.getincrementaldecoder("utf-8")


class TokenDecoder(Protocol):
    """What a detokenizer needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int], /) -> str: ...

    def text_bytes(self, token_id: int, /) -> bytes:
        """What `decode` makes of the token within a text, in UTF-8; nothing for a token that it skips."""


class Detokenizer:
    """One sequence's text, piece by piece. The pieces join to the decoded text; where that ends within a character, it is left
    out.

    Each step decodes a short window that begins one settled piece back, because decoders treat the first token of a text
    specially (SentencePiece drops its leading space). `prompt_ids` is what the output continues; a character that it only
    begins belongs to the output.
    """

    def __init__(self, decoder: TokenDecoder, prompt_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._sent = 0  # characters of the window's text that are out
        self._start_window(list(prompt_ids[self._boundary(prompt_ids) :]))

    def push(self, token_id: int) -> str:
        """The text that this token settles; may be empty."""
        if not self._decoder.text_bytes(token_id):
            return ""
        self._window.append(token_id)
        incomplete = self._incomplete_bytes(self._window)
        text = self._whole_characters(self._window, incomplete)
        piece = text[self._sent :]
        self._sent = max(self._sent, len(text))
        if not incomplete:
            self._start_window(self._window[self._context :])
        return piece

    def _start_window(self, context: list[int]) -> None:
        """Go on after `context`, whose text is out already."""
        self._window, self._context = context, len(context)
        self._sent = len(self._whole_characters(context, self._incomplete_bytes(context))) if context else 0

    def _whole_characters(self, token_ids: Sequence[int], incomplete: int) -> str:
        """The decoded text without the last `incomplete` bytes. A U+FFFD stays where it was written, or stands for bytes that
        are no character."""
        if not incomplete:
            return self._decoder.decode(token_ids)
        # Tokens that hold nothing else are taken off before the text is decoded: while a run of SentencePiece's byte tokens
        # ends within a character, its decoder shows U+FFFD for every byte of the run.
        kept = len(token_ids)
        while incomplete and (size := len(self._decoder.text_bytes(token_ids[kept - 1]))) <= incomplete:
            incomplete -= size
            kept -= 1
        text = self._decoder.decode(token_ids[:kept])
        return text.removesuffix(REPLACEMENT) if incomplete else text

    def _incomplete_bytes(self, token_ids: Sequence[int]) -> int:
        """How many bytes at the end begin a character whose other bytes are not there."""
        tail = b""
        for token_id in reversed(token_ids):
            tail = self._decoder.text_bytes(token_id) + tail
            if len(tail) >= MAX_INCOMPLETE:
                break
        decoder = _utf8("replace")
        decoder.decode(tail)
        held, _ = decoder.getstate()
        # Python also waits for the end of a surrogate, which UTF-8 does not have.
        return 0 if held[:1] == b"\xed" and held[1:] >= b"\xa0" else len(held)

    def _boundary(self, prompt_ids: Sequence[int]) -> int:
        """Where the prompt's last few tokens begin: not within a character, whose rest alone would decode to another text."""
        start = max(0, len(prompt_ids) - PROMPT_CONTEXT_TOKENS)
        while start and self._incomplete_bytes(prompt_ids[max(0, start - MAX_INCOMPLETE) : start]):
            start -= 1
        return start


class StopStrings:
    """Cuts a text at the stop string that is complete first, however the text is divided into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = stops
        self._held = ""

    def push(self, piece: str, early: bool = False) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string ended it (then the rest is dropped).

        `early`: the answer may not end yet, so a stop string that is complete in this piece is text like any other. One that
        begins in it and is complete later is found.
        """
        if not self._stops:
            return piece, False
        text, before = self._held + piece, len(self._held)
        if not early:
            # What is held may hold a whole stop string, if it came early: only those count that end in this piece.
            starts = ((text.find(stop, max(0, before + 1 - len(stop))), stop) for stop in self._stops)
            # The match that ends first; of those that end together, the one that begins first.
            found = [(start + len(stop), start) for start, stop in starts if start >= 0]
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
